"""Random projections for RSO: P (m, r) with E[P·Pᵀ] = I. P is a function of a seed, not of any gradient.

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

PIECE = 2**20
"""Elements drawn at a time, a multiple of 128. Random words temporarily take some hundred bytes an
element."""


def _gaussian(seeds: Tensor, m: int, rank: int, dtype: torch.dtype) -> Tensor:
    return _in_pieces(_normals, seeds, m, rank, dtype) * rank**-0.5


def _haar(seeds: Tensor, m: int, rank: int, dtype: torch.dtype) -> Tensor:
    # The R of CholeskyQR has a positive diagonal, so Q is unique and as rotation-invariant as the Gaussian.
    return orthonormalise(_in_pieces(_normals, seeds, m, rank, dtype)[None])[0] * math.sqrt(m / rank)


def _rademacher(seeds: Tensor, m: int, rank: int, dtype: torch.dtype) -> Tensor:
    return _in_pieces(_signs, seeds, m, rank, dtype) * rank**-0.5


def _normals(seeds: Tensor, first: int, count: int) -> Tensor:
    return philox.normal(seeds, (count,), philox.PROJECTION, torch.float32, first)[0]


def _signs(seeds: Tensor, first: int, count: int) -> Tensor:
    """±1 from the bits of each word, lowest bit first."""
    words = philox.words(seeds, -(-count // 32), philox.PROJECTION, first // 32)[0]
    bits = (words[:, None] >> torch.arange(32, device=words.device)) & 1
    return (2 * bits - 1).flatten()[:count]


def _in_pieces(draw: Callable[[Tensor, int, int], Tensor], seeds: Tensor, m: int, rank: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.empty(m * rank, dtype=dtype, device=seeds.device)
    for first in range(0, m * rank, PIECE):
        piece = drawn[first : first + PIECE]
        piece.copy_(draw(seeds, first, piece.numel()))
    return drawn.view(m, rank)


DISTRIBUTIONS: dict[str, Callable[[Tensor, int, int, torch.dtype], Tensor]] = {
    "gaussian": _gaussian,
    "haar": _haar,
    "rademacher": _rademacher,
}


PRINCIPAL = "principal"


def draw_principal(principal: Tensor | None, m: int, rank: int, *, seed: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """P (m, r) = [Q, sqrt((m − r₁)/r₂)·U]: computed in fp32 (fp64 for fp64) and rounded once to `dtype`.

    Q (m, r₁) has the principal directions of a layer's inputs, and U (m, r₂) is uniform among the matrices
    with orthonormal columns in the complement of Q. So E[P·Pᵀ] = I, and P·Pᵀ = I on the span of Q (PRAC,
    arXiv 2602.23111). principal: Q, or None for r₁ = 0.
    """
    wide = torch.promote_types(dtype, torch.float32)
    taken = 0 if principal is None else principal.shape[1]
    others = _in_pieces(_normals, philox.seed_tensor([seed], device), m, rank - taken, wide)
    columns = others if principal is None else torch.cat((principal.to(device, wide), others), dim=1)
    columns = orthonormalise(columns[None])[0]
    columns[:, taken:] *= math.sqrt((m - taken) / (rank - taken))
    if principal is not None:
        columns[:, :taken] = principal
    return columns.to(dtype)


def draw_projection(distribution: str, m: int, rank: int, *, seed: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """P (m, r), r ≤ m: computed in fp32 (fp64 for fp64) and rounded once to `dtype`. CPU and GPU agree up to
    rounding."""
    wide = torch.promote_types(dtype, torch.float32)
    return DISTRIBUTIONS[distribution](philox.seed_tensor([seed], device), m, rank, wide).to(dtype)
