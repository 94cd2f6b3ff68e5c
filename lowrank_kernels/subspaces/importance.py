"""I3S (arXiv 2502.05790): r directions sampled from the singular vectors, without replacement, with probability ∝ σ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import philox
from ..range_finder import clear, complement, multiply, sample_importance
from .spectrum import Spectrum
from .tail import tail_weights

LEAST_BLOCK = 8
"""Columns of the block that the tail is measured by, where fewer than that may be drawn from it."""


def importance(grad: Tensor, rank: int, spectrum: Spectrum, seeds: Sequence[int]) -> Tensor:
    """(batch, m, n) → (batch, m, r), columns sorted by σ.

    Where all k = min(m, n) values are known, exactly the paper's law. Else the leading l = 2r + oversample are, and the k − l others get
    weights of their sum and their energy, as far as those can be told: tail.py. One that is drawn becomes a random direction of
    (I − UUᵀ)·G·ω, orthonormalised: among themselves those come ∝ σ², not σ. Nothing depends on how many are drawn, so there is no
    host sync.
    """
    if spectrum.whole_is_cheaper(grad, rank):
        vectors, sigma = spectrum.whole(grad)
        chosen = sample_importance(sigma, rank, seeds)
        return spectrum.left(grad, vectors.gather(-1, chosen[..., None, :].expand(-1, vectors.shape[-2], -1)))
    known = 2 * rank + spectrum.oversample
    directions, sigma = spectrum.leading(grad, known, oversample=0)
    unknown = min(grad.shape[-2:]) - known
    block = _outside(grad, directions, min(max(rank, LEAST_BLOCK), unknown), spectrum.seed)
    chosen = sample_importance(torch.cat([sigma, tail_weights(block, sigma, unknown, rank + rank // 2)], dim=-1), rank, seeds)
    directions = torch.cat([directions, complement(directions, block[..., :rank], spectrum.seed)], dim=-1)
    # Tail directions are interchangeable: the first one drawn takes the first of them.
    tail = chosen >= known
    column = torch.where(tail, known + tail.cumsum(dim=-1) - 1, chosen)
    return directions.gather(-1, column[..., None, :].expand(-1, directions.shape[-2], -1))


def _outside(grad: Tensor, directions: Tensor, count: int, seed: int) -> Tensor:
    """(I − UUᵀ)·G·Ω (batch, m, count), with an Ω of its own."""
    omega = philox.normal(philox.seed_tensor([seed], grad.device), (count, grad.shape[-1]), philox.TAIL, directions.dtype)[0].mT
    return clear(directions, multiply(grad, omega))
