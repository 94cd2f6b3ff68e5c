"""Fira's lift (Chen et al., arXiv 2410.01623): the part of the gradient outside the subspace moves the weight
too."""

from __future__ import annotations

from torch import Tensor

from .limiter import Limited


class Residual(Limited):
    """D = P·N + φ·S,  S = G' − P·R,  φⱼ = ‖Nⱼ‖ / ‖Rⱼ‖ for column j, and φⱼ = 0 where Rⱼ = 0.

    ‖φ·S‖ may grow by at most a factor of γ = 1.01 a step. Where it would grow by more, φ·S is scaled down to
    γ times the norm of the step before. There is no limit where that norm was zero, as before the first step.
    The device decides all of this.
    """

    name = "residual"
    needs_orthonormal = True
    limit = "residual_norm"

    def along(self, basis: Tensor, normalised: Tensor) -> Tensor:
        return basis @ normalised

    def outside(self, basis: Tensor, grad: Tensor, projected: Tensor) -> Tensor:
        return grad - basis @ projected
