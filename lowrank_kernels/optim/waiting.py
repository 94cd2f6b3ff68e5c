"""Tracks parameters whose gradients have been all zero so far. They get no basis yet, because an arbitrary
one would last a whole period.

The basis of such a matrix is zero, and so is its update. A checkpoint needs to hold nothing else about it. On
a GPU the host learns only later that a parameter has its basis. Until then it still has bases chosen for that
parameter, and the device discards them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .buckets import split


class Waiting:
    """What the host knows about the parameters that wait for a basis."""

    def __init__(self) -> None:
        self.params: set[Tensor] = set()
        """All parameters that may still be waiting."""
        self._examined = False
        self._unknown: list[tuple[Callable[[], bool], Tensor, list[Tensor]]] = []

    def note(self, params: list[Tensor], bases: list[Tensor]) -> None:
        """Records parameters that a basis was just chosen for. The basis, or that of some experts, is zero
        where the gradient was zero."""
        if not params:
            return
        chosen = torch.stack([_is_chosen(basis) for basis in bases])
        self.params.update(params)
        self._unknown.append((*_on_its_way(chosen), params))
        self._take_in()

    def settle(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Updates `params` from the flags that have arrived by now. The first call looks at all bases, since
        they may come from a checkpoint, and waits for a GPU."""
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
    """Starts copying the flags to the host. Returns a function that tells whether they have arrived, and the
    tensor that they arrive in."""
    if not flags.is_cuda:
        return lambda: True, flags
    on_host = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
    on_host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flags.device))
    return event.query, on_host


def _is_chosen(basis: Tensor) -> Tensor:
    return torch.stack([matrix.any() for matrix in split(basis)]).all()
