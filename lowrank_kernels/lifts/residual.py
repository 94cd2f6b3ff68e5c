"""Fira's lift (Chen et al., arXiv 2410.01623): what the subspace leaves out of the gradient moves the weight
too."""

from __future__ import annotations

import torch
from torch import Tensor

from .lift import Lift

GAMMA = 1.01
"""The residual's norm grows by this factor a step at most (the paper's limiter)."""


class Residual(Lift):
    """D = P·N + φ·S,  S = G' − P·R,  φⱼ = ‖N₌ⱼ‖ / ‖R₌ⱼ‖ for column j, and 0 where R₌ⱼ is.

    φ·S is scaled down to ‖φ·S‖ = γ·(its norm at the step before) where it would have grown by more than γ =
    1.01, unless that norm was zero, as before the first step. All of it is decided on the device.
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
