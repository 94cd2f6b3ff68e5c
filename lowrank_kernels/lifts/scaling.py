"""APOLLO's lifts (Zhu et al., arXiv 2412.05270): the subspace says by how much each channel of the gradient
is scaled, and the gradient itself moves the weight."""

from __future__ import annotations

from torch import Tensor

from .lift import Lift
from .limiter import limit_growth, ratio_of_norms


class ChannelScaling(Lift):
    """D = s·G',  sⱼ = ‖Nⱼ‖ / ‖Rⱼ‖ for column j, and sⱼ = 0 where Rⱼ = 0. The basis need not be orthonormal.

    ‖D‖ may grow by at most a factor of γ = 1.01 a step, as ‖φ·S‖ in residual.py.
    """

    name = "channel_scaling"
    takes_gradient = True
    dim: int | None = 0

    def state(self) -> dict[str, tuple[int, ...]]:
        return {"scaled_norm": ()}

    def direction(self, basis: Tensor, normalised: Tensor, *, grad: Tensor, projected: Tensor, state: dict[str, Tensor]) -> Tensor:
        return limit_growth(ratio_of_norms(normalised, projected, self.dim) * grad, state["scaled_norm"])


class TensorScaling(ChannelScaling):
    """D = s·G',  s = ‖N‖ / ‖R‖ of the whole matrix, which APOLLO-Mini uses at rank 1."""

    name = "tensor_scaling"
    dim = None
