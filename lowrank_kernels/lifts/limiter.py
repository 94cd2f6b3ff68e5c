"""The limiter on the growth of an update's norm (Fira, arXiv 2410.01623; APOLLO has the same one)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rules.rule import WHOLE, Across
from .lift import Lift

GAMMA = 1.01
"""γ, the largest factor by which the norm grows in a step."""


def limit_(norm: Tensor, last: Tensor) -> Tensor:
    """The factor, at most 1, that brings an update of this norm down to γ·last. `last`, one number, becomes
    the norm of the result. There is no limit where it was zero, as before the first step. The device decides
    this."""
    factor = torch.where((last > 0) & (norm > GAMMA * last), GAMMA * last / norm, 1)
    last.copy_(norm * factor.to(norm.dtype))
    return factor


class Limited(Lift):
    """D = along + factor·outside, where the norm of the second part is limited."""

    takes_gradient = True
    limit: str
    """The name of the limiter's state."""

    by: tuple[int, ...] = (-2,)
    """The dimensions that `factor` takes norms over: (-2,) for each column, (-2, -1) for the whole matrix."""

    def state(self) -> dict[str, tuple[int, ...]]:
        return {self.limit: ()}

    def factor(self, normalised: Tensor, projected: Tensor, across: Across = WHOLE) -> Tensor:
        """‖N‖ / ‖R‖, (…, 1, n) or (…, 1, 1). It is 0 where R is 0."""
        norm = across.norm if -1 in self.by else WHOLE.norm
        lengths = norm(projected, self.by)
        return torch.where(lengths > 0, norm(normalised, self.by) / lengths, 0)

    def along(self, basis: Tensor, normalised: Tensor) -> Tensor | None:
        """The part of D that is not limited, (m, n), or None where there is none."""
        raise NotImplementedError

    def outside(self, basis: Tensor, grad: Tensor, projected: Tensor) -> Tensor:
        """What is scaled by the factor, and limited, (m, n)."""
        raise NotImplementedError

    def direction(self, basis: Tensor, normalised: Tensor, *, grad: Tensor, projected: Tensor, state: dict[str, Tensor]) -> Tensor:
        beyond = self.factor(normalised, projected) * self.outside(basis, grad, projected)
        limited = limit_(torch.linalg.vector_norm(beyond), state[self.limit]).to(beyond.dtype) * beyond
        along = self.along(basis, normalised)
        return limited if along is None else along + limited
