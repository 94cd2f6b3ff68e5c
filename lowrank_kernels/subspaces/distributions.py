"""Random projections for RSO: P (m, r) with E[P·Pᵀ] = I, as a function of a seed, not of any gradient.

    gaussian     N(0, 1/r)
    haar         sqrt(m/r)·Q, Q uniform among the m × r matrices with orthonormal columns
    rademacher   ±1/√r

Source: RSO, arXiv 2502.07222, which asks for this expectation and names these three.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import philox
from ..range_finder import orthonormalise


def _gaussian(seeds: Tensor, m: int, rank: int, dtype: torch.dtype) -> Tensor:
    return philox.normal(seeds, (m, rank), philox.PROJECTION, dtype)[0] * rank**-0.5


def _haar(seeds: Tensor, m: int, rank: int, dtype: torch.dtype) -> Tensor:
    # The R of CholeskyQR has a positive diagonal, which makes Q unique and so as rotation-invariant as the Gaussian.
    return orthonormalise(philox.normal(seeds, (m, rank), philox.PROJECTION, dtype))[0] * math.sqrt(m / rank)


def _rademacher(seeds: Tensor, m: int, rank: int, dtype: torch.dtype) -> Tensor:
    words = philox.words(seeds, -(-m * rank // 32), philox.PROJECTION)[0]
    bits = (words[:, None] >> torch.arange(32, device=words.device)) & 1
    return (2 * bits.flatten()[: m * rank].view(m, rank) - 1).to(dtype) * rank**-0.5


DISTRIBUTIONS: dict[str, Callable[[Tensor, int, int, torch.dtype], Tensor]] = {
    "gaussian": _gaussian,
    "haar": _haar,
    "rademacher": _rademacher,
}


def draw_projection(distribution: str, m: int, rank: int, *, seed: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """P (m, r), r ≤ m: computed in fp32 (fp64 for fp64) and rounded once to `dtype`. Equal on CPU and GPU to rounding."""
    wide = torch.promote_types(dtype, torch.float32)
    return DISTRIBUTIONS[distribution](philox.seed_tensor([seed], device), m, rank, wide).to(dtype)
