"""APOLLO's lifts (Zhu et al., arXiv 2412.05270): the subspace says by how much each channel of the gradient
is scaled, and the gradient itself moves the weight."""

from __future__ import annotations

from torch import Tensor

from .limiter import Limited


class ChannelScaling(Limited):
    """D = s·G',  sⱼ = ‖Nⱼ‖ / ‖Rⱼ‖ for column j, and sⱼ = 0 where Rⱼ = 0. The basis need not be orthonormal.

    ‖D‖ may grow by at most a factor of γ = 1.01 a step, as ‖φ·S‖ in residual.py.
    """

    name = "channel_scaling"
    limit = "scaled_norm"

    def along(self, basis: Tensor, normalised: Tensor) -> None:
        return None

    def outside(self, basis: Tensor, grad: Tensor, projected: Tensor) -> Tensor:
        return grad


class TensorScaling(ChannelScaling):
    """D = s·G',  s = ‖N‖ / ‖R‖ of the whole matrix, which APOLLO-Mini uses at rank 1."""

    name = "tensor_scaling"
    by = (-2, -1)
