"""I3S (arXiv 2502.05790): r directions sampled from the singular vectors, without replacement, with
probability ∝ σ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import philox
from .. import range_finder as algorithms
from ..ops import parts
from .spectrum import Spectrum
from .tail import tail_weights

LEAST_BLOCK = 8
"""The least number of columns in the block that estimates the tail, even if fewer may be drawn from the
tail."""


def importance(spectrum: Spectrum, rank: int, seeds: Sequence[int]) -> Tensor:
    """(batch, m, r), columns sorted by σ.

    If all k = min(m, n) values are known, the draw follows exactly the paper's law. Otherwise the leading l =
    2r + oversample values are known. The k − l others get weights with an estimate of their sum and their
    energy (tail.py). A direction drawn from the tail becomes a random direction of (I − UUᵀ)·G·ω,
    orthonormalised: within the tail, directions come ∝ σ², not σ. On a GPU nothing depends on how many are
    drawn from the tail, so nothing waits.
    """
    if spectrum.whole_is_cheaper(rank):
        vectors, sigma = spectrum.whole(rank)
        return spectrum.left(_pick(vectors, parts.sample_importance(sigma, rank, seeds)))
    known = 2 * rank + spectrum.oversample
    directions, sigma = spectrum.leading(known, oversample=0)
    unknown = min(spectrum.shape) - known
    block = spectrum.outside(directions, min(max(rank, LEAST_BLOCK), unknown))
    weights = tail_weights(block, sigma, unknown, rank + rank // 2)
    chosen = parts.sample_importance(torch.cat([sigma, weights], dim=-1), rank, seeds)
    tail = chosen >= known
    outside = _drawn(directions, block[..., : min(rank, unknown)], tail, spectrum.seed)
    # Tail directions are interchangeable. The first tail draw therefore takes the first tail direction.
    columns = torch.where(tail, known + tail.cumsum(dim=-1) - 1, chosen)
    return _pick(torch.cat([directions.mT, outside.mT], dim=-2).mT, columns)


def _pick(vectors: Tensor, columns: Tensor) -> Tensor:
    """Columns (batch, r) of vectors (batch, m, k)."""
    return vectors.mT.gather(-2, columns[..., None].expand(-1, -1, vectors.shape[-2])).mT


def _drawn(directions: Tensor, block: Tensor, tail: Tensor, seed: int) -> Tensor:
    """The complement (see `complement`) from the block. On a GPU every column that may be drawn is computed.
    On a CPU each matrix computes only as many columns as are drawn."""
    if not algorithms.may_look(tail):
        return complement(directions, block, seed)
    counts = tail.sum(dim=-1).tolist()
    rows = block.new_zeros(len(block), max(counts), block.shape[-2])
    with algorithms.full_precision():
        for own, candidates, out, count in zip(directions, block, rows, counts, strict=True):
            if count:
                out[:count] = complement(own, candidates[:, :count], seed).mT
    return rows.mT


def complement(directions: Tensor, block: Tensor, seed: int) -> Tensor:
    """Orthonormal columns of the span of Y = (I − UUᵀ)·Z for orthonormal U: (…, m, h) and (…, m, t) with h +
    t ≤ m → (…, m, t).

    Two rounds are enough. The second round also removes the part along U that completion with random
    directions added. Each round has a seed of its own: U may itself be completed, and the same draws again
    would lie in U.
    """
    for again in range(2):
        basis = parts.orthonormalise(block, philox.signed64(philox.derive_seed(seed, again)))
        block = algorithms.clear(directions, basis)
    return block
