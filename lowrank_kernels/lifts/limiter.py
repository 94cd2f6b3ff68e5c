"""The limiter on the growth of an update's norm (Fira, arXiv 2410.01623; APOLLO has the same one)."""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA = 1.01
"""γ, the largest factor by which the norm grows in a step."""


def limit_growth(update: Tensor, last: Tensor) -> Tensor:
    """The update, scaled down to γ·last where its norm would be larger. `last`, one number, becomes the norm
    of the result. There is no limit where it was zero, as before the first step. The device decides this."""
    norm = torch.linalg.vector_norm(update)
    limited = torch.where((last > 0) & (norm > GAMMA * last), GAMMA * last / norm, 1).to(update.dtype)
    last.copy_(norm * limited)
    return limited * update


def ratio_of_norms(normalised: Tensor, projected: Tensor, dim: int | None = 0) -> Tensor:
    """‖N‖ / ‖R‖ of each column, or of the whole matrix (dim=None). It is 0 where R is 0."""
    lengths = torch.linalg.vector_norm(projected, dim=dim)
    return torch.where(lengths > 0, torch.linalg.vector_norm(normalised, dim=dim) / lengths, 0)
