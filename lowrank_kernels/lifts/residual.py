"""Fira's lift (Chen et al., arXiv 2410.01623): the part of the gradient outside the subspace moves the weight
too."""

from __future__ import annotations

from torch import Tensor

from .lift import Lift
from .limiter import limit_growth, ratio_of_norms


class Residual(Lift):
    """D = P·N + φ·S,  S = G' − P·R,  φⱼ = ‖Nⱼ‖ / ‖Rⱼ‖ for column j, and φⱼ = 0 where Rⱼ = 0.

    ‖φ·S‖ may grow by at most a factor of γ = 1.01 a step. Where it would grow by more, φ·S is scaled down to
    γ times the norm of the step before. There is no limit where that norm was zero, as before the first step.
    The device decides all of this.
    """

    name = "residual"
    takes_gradient = True
    needs_orthonormal = True

    def state(self) -> dict[str, tuple[int, ...]]:
        return {"residual_norm": ()}

    def direction(self, basis: Tensor, normalised: Tensor, *, grad: Tensor, projected: Tensor, state: dict[str, Tensor]) -> Tensor:
        residual = ratio_of_norms(normalised, projected) * (grad - basis @ projected)
        return basis @ normalised + limit_growth(residual, state["residual_norm"])
