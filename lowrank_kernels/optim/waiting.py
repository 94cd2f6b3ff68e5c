"""Parameters whose gradients have been all zero so far. They wait with their first basis: an arbitrary one would last a whole period.

The basis of such a matrix is zero, and so is its update. state["waiting"] is there as long as a matrix of the parameter may be waiting. On
a GPU the host learns later that none does; until then it lets bases be chosen that the device then does not take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .buckets import split


class Waiting:
    """What the host does not know yet of bases on a GPU."""

    def __init__(self) -> None:
        self._unknown: list[tuple[torch.cuda.Event, Tensor, list[dict[str, Any]]]] = []

    def note(self, states: list[dict[str, Any]]) -> None:
        """These states have got a basis, or a part of it, or zeros because there was no gradient to choose it from."""
        if not states:
            return
        chosen = torch.stack([torch.stack([matrix.any() for matrix in split(state["basis"])]).all() for state in states])
        if not chosen.is_cuda:
            _settle(chosen, states)
            return
        for state in states:
            state["waiting"] = 1
        on_host = torch.empty(chosen.shape, dtype=chosen.dtype, device="cpu", pin_memory=True)
        on_host.copy_(chosen, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(chosen.device))
        self._unknown.append((event, on_host, states))

    def settle(self, wait: bool) -> None:
        """Takes the mark off states that turned out to have their basis: of all, or of those known by now."""
        while self._unknown:
            event, chosen, states = self._unknown[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            del self._unknown[0]
            _settle(chosen, states)


def _settle(chosen: Tensor, states: list[dict[str, Any]]) -> None:
    for state, has_basis in zip(states, chosen.tolist(), strict=True):
        if has_basis:
            state.pop("waiting", None)
        else:
            state["waiting"] = 1
