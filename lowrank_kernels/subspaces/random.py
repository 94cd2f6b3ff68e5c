"""A random orthonormal basis, which needs no gradient: the orthonormalised Gaussian is uniform over subspaces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import philox
from ..range_finder import orthonormalise
from .spectrum import Spectrum


def random(grad: Tensor, rank: int, spectrum: Spectrum, seeds: Sequence[int]) -> Tensor:
    """(batch, m, n) → (batch, m, r), a function of each matrix's seed alone."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    gaussian = philox.normal(philox.seed_tensor(seeds, grad.device), (grad.shape[-2], rank), philox.BASIS, dtype)
    return orthonormalise(gaussian)
