"""Rule: the base class of update rules."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Rule:
    """Computes N from R for one matrix. A subclass has a name, its keys of a group, its state and its
    formula."""

    name: str
    keys: tuple[str, ...] = ()
    """Keys of the group that `update` takes."""

    def state(self, rank: int, n: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of the tensors that are kept between steps. They start as zeros."""
        raise NotImplementedError

    def update(self, projected: Tensor, state: dict[str, Tensor], step: float | Tensor, **options: Any) -> Tensor:
        """N (…, r, n) from R (…, r, n), both in fp32 (fp64 for fp64). Updates `state` in place. step: the
        number of this update, from 1: one for all, or (…, 1, 1) in fp64, where N may come out in fp64."""
        raise NotImplementedError

    def rotate(self, state: dict[str, Tensor], turn: Tensor) -> None:
        """Turns the state into the coordinates of a new basis, in place. turn: P_newᵀ·P_old, (…, r, r)."""
        raise NotImplementedError(
            f"the rule {self.name} does not say what becomes of its state in a new basis; use moments='keep' or 'reset'"
        )
