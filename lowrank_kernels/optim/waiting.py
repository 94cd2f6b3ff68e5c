"""Parameters whose gradients have been all zero so far. They wait with their first basis: an arbitrary one
would last a whole period.

The basis of such a matrix is zero, and so is its update: this is all that a checkpoint has to hold. On a GPU
the host learns later that a parameter has its basis; until then it lets bases be chosen that the device then
does not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .buckets import split


class Waiting:
    """What the host knows of it."""

    def __init__(self) -> None:
        self.params: set[Tensor] = set()
        """All that may be waiting."""
        self._examined = False
        self._unknown: list[tuple[Callable[[], bool], Tensor, list[Tensor]]] = []

    def note(self, params: list[Tensor], bases: list[Tensor]) -> None:
        """These have got a basis, or a part of it, or zeros because there was no gradient to choose it
        from."""
        if not params:
            return
        chosen = torch.stack([_is_chosen(basis) for basis in bases])
        self.params.update(params)
        self._unknown.append((*_on_its_way(chosen), params))
        self._take_in()

    def settle(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Takes in what is known by now; the first time looks at all bases, which may come from a checkpoint,
        and waits for a GPU."""
        if not self._examined:
            self._examined = True
            bases = {param: state["basis"] for param, state in states.items() if "basis" in state}
            self.params.update(param for param, basis in bases.items() if not _is_chosen(basis))
        self._take_in()

    def _take_in(self) -> None:
        while self._unknown and self._unknown[0][0]():
            _, chosen, params = self._unknown.pop(0)
            self.params.difference_update(param for param, is_chosen in zip(params, chosen.tolist(), strict=True) if is_chosen)


def _on_its_way(flags: Tensor) -> tuple[Callable[[], bool], Tensor]:
    """Whether the flags have arrived on the host, and where they arrive."""
    if not flags.is_cuda:
        return lambda: True, flags
    on_host = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
    on_host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flags.device))
    return event.query, on_host


def _is_chosen(basis: Tensor) -> Tensor:
    return torch.stack([matrix.any() for matrix in split(basis)]).all()
