"""Fira's lift (Chen et al., arXiv 2410.01623): the part of the gradient outside the subspace moves the weight
too."""

from __future__ import annotations

import torch
from torch import Tensor

from .lift import Lift

GAMMA = 1.01
"""γ, the largest factor by which the residual's norm grows in a step (the paper's limiter)."""


class Residual(Lift):
    """D = P·N + φ·S,  S = G' − P·R,  φⱼ = ‖Nⱼ‖ / ‖Rⱼ‖ for column j, and φⱼ = 0 where Rⱼ = 0.

    ‖φ·S‖ may grow by at most a factor of γ = 1.01 a step. Where it would grow by more, φ·S is scaled down to
    γ times the norm of the step before. There is no limit where that norm was zero, as before the first step.
    The device decides all of this.
    """

    name = "residual"
    takes_gradient = True

    def state(self) -> dict[str, tuple[int, ...]]:
        return {"residual_norm": ()}

    def direction(self, basis: Tensor, normalised: Tensor, *, grad: Tensor, projected: Tensor, state: dict[str, Tensor]) -> Tensor:
        lengths = torch.linalg.vector_norm(projected, dim=0)
        phi = torch.where(lengths > 0, torch.linalg.vector_norm(normalised, dim=0) / lengths, 0)
        residual = phi * (grad - basis @ projected)
        last, norm = state["residual_norm"], torch.linalg.vector_norm(residual)
        limited = torch.where((last > 0) & (norm > GAMMA * last), GAMMA * last / norm, 1).to(residual.dtype)
        last.copy_(norm * limited)
        return basis @ normalised + limited * residual
