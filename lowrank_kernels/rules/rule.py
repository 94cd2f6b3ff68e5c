"""Rule: the base class of update rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Across:
    """Means and norms over rows of R. A rule and a lift take them by this class, because each process may
    hold a piece of the rows."""

    def mean(self, values: Tensor, dim: tuple[int, ...]) -> Tensor:
        """The mean over `dim`, which has -1, with the dimensions kept."""
        return values.mean(dim, keepdim=True)

    def norm(self, values: Tensor, dim: tuple[int, ...]) -> Tensor:
        """The norm over `dim`, with the dimensions kept."""
        return torch.linalg.vector_norm(values, dim=dim, keepdim=True)


WHOLE = Across()
"""Where the rows are whole."""


class Rule:
    """Computes N from R for one matrix. A subclass has a name, its keys of a group, its state and its
    formula."""

    name: str
    keys: tuple[str, ...] = ()
    """Keys of the group that `update` takes."""

    elementwise = False
    """Whether each element of N depends on the same element of R and of the state alone. If not, `update`
    takes `across`, by which it adds up what it needs of the other columns of a row."""

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
