"""Tracks parameters whose gradients have been all zero so far. They get no basis yet, because an arbitrary
one would last a whole period.

The basis of such a matrix is zero, and so is its update. A checkpoint needs to hold nothing else about it. On
a GPU the host learns only later that a parameter has its basis. Until then it still has bases chosen for that
parameter, and the device discards them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sharded import is_sharded, local
from ..sharded.refresh import anywhere_in
from .arriving import Arriving


class Waiting:
    """What the host knows about the parameters that wait for a basis."""

    def __init__(self) -> None:
        self.params: set[Tensor] = set()
        """All parameters that may still be waiting."""
        self._examined = False
        self._unknown: list[tuple[Arriving, list[Tensor]]] = []

    def note(self, params: list[Tensor], chosen: list[Tensor]) -> None:
        """Records parameters that a basis was just chosen for. chosen: whether all matrices of a parameter
        have one; the basis is zero where the gradient was zero."""
        if not params:
            return
        chosen = torch.stack(chosen)
        self.params.update(params)
        self._unknown.append((Arriving(chosen), params))
        self._take_in()

    def settle(self, states: dict[Tensor, dict[str, Any]], wait: bool = False) -> None:
        """Updates `params` from the flags that have arrived by now, or from all of them. The first call looks
        at all bases, since they may come from a checkpoint, and waits for a GPU."""
        if not self._examined:
            self._examined = True
            bases = {param: state["basis"] for param, state in states.items() if "basis" in state}
            self.params.update(param for param, basis in bases.items() if not is_chosen(basis))
        self._take_in(wait)

    def _take_in(self, wait: bool = False) -> None:
        while self._unknown and (wait or self._unknown[0][0].has_arrived()):
            chosen, params = self._unknown.pop(0)
            self.params.difference_update(param for param, is_chosen in zip(params, chosen.values().tolist(), strict=True) if is_chosen)


def is_chosen(basis: Tensor) -> Tensor:
    """Whether all matrices of a parameter have a basis. Of experts that are spread over processes, those of
    this process count."""
    return is_chosen_each(basis).all()


def is_chosen_each(basis: Tensor) -> Tensor:
    """Whether each matrix of a parameter has a basis, () or (experts,)."""
    flags = local(basis).flatten(-2).any(-1)
    return anywhere_in(basis, flags) if is_sharded(basis) else flags
