"""Estimates the sum of the singular values that a sketch leaves out, from two of their moments and the values
that are known.

E = Σσ² and F = Σσ⁴ run over the k − l unknown values. Both are estimated from a block of the rest, B = (I −
UUᵀ)·G·Ω. The diagonal of BᵀB is E on average, and the squares beside the diagonal are F on average. S = Σσ
lies between E·sqrt(E / F) and sqrt(E·(k − l)), which are far apart. Three families narrow it down. Each
starts at a known value σ_a and is made to have the energy of all values after σ_a:

    t values σ_a, then nothing            S = E / σ_a
    σ_a·exp(−c·j),   j = 1 … k − a
    σ_a·(1 + j/a)^−p

log(E·σ_a² / F) of the spectrum lies between those of two families. The logarithm of S is interpolated between
theirs at the same point. So the estimate is right for a cliff, an exponential, a power law and a flat tail.
If the block does not have full rank, its rank is the rank of all unknown directions, and S is at most
sqrt(E·rank). The anchor is a = 3/2·r, because the last values of a sketch come out too low.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..range_finder import peaks

RATES = 32
"""Number of members tabulated of each family. The member with the energy E is interpolated between two of
them."""
DEPENDENT = 2.0**-24
"""A column of the block, scaled to length 1, with a pivot up to this adds nothing but rounding to the columns
before it."""
TINY = torch.finfo(torch.float64).tiny


def tail_weights(block: Tensor, sigma: Tensor, count: int, anchor: int) -> Tensor:
    """Weights (batch, count) of the values left out, from B (batch, m, s) and the known σ (batch, l),
    descending.

    The first t = S² / E weights are E / S, the last of them in part, and the others are zero. Their sum is S,
    and the sum of their squares is E. After a cliff there are then as many weights as directions, so no
    direction is drawn that does not exist.
    """
    known = sigma.shape[-1]
    unit = peaks([block]).clamp_min(TINY)
    scaled = block.double() / unit[..., None, None]
    gram = scaled.mT @ scaled
    at_most = _count(gram, count)
    energy, fourth = _moments(gram, at_most)
    relative = sigma.double() / unit[..., None]
    after = relative[..., anchor:]
    moments = energy + after.square().sum(-1), fourth + after.square().square().sum(-1)
    total = _sum_after(*moments, relative[..., anchor - 1], count + known - anchor, anchor) - after.sum(-1)
    least, most = energy * (energy / fourth.clamp_min(TINY)).sqrt(), (energy * at_most).sqrt()
    total = torch.minimum(torch.maximum(total, least), most)
    real = energy > 0  # false where G is zero or not finite
    effective, weight = (torch.where(real, value, 0) for value in (total.square() / energy, energy / total * unit))
    share = (effective[..., None] - torch.arange(count, device=block.device)).clamp(0, 1)
    return (share * weight[..., None]).to(sigma.dtype)


def _count(gram: Tensor, count: int) -> Tensor:
    """The number of values there are at most, (batch,): the rank of BᵀB if that is not full, else `count`."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(TINY)
    columns = gram.shape[-1]
    unit = gram / lengths[..., None] / lengths[..., None, :] + DEPENDENT / 16 * torch.eye(columns, dtype=gram.dtype, device=gram.device)
    pivots = torch.linalg.cholesky_ex(unit).L.diagonal(dim1=-2, dim2=-1).square()
    rank = (pivots > DEPENDENT).sum(dim=-1)
    return torch.where(rank < columns, rank.clamp_min(1), count).double()


def _moments(gram: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates of E and F, (batch,). They are no further apart than `count` values allow."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    columns = gram.shape[-1]
    energy = diagonal.mean(-1)
    square = energy.square()
    if columns == 1:
        return energy, square
    beside = (gram.square().sum(dim=(-2, -1)) - diagonal.square().sum(-1)) / (columns * (columns - 1))
    return energy, torch.minimum(torch.maximum(beside, square / count), square)


def _sum_after(energy: Tensor, fourth: Tensor, least: Tensor, count: int, known: int) -> Tensor:
    """Σσ, (batch,), over the `count` values after value number `known`. `energy` and `fourth` are the sums of
    their squares and fourth powers; `least` is value number `known`."""
    square = least.square()
    relative = (energy / square.clamp_min(TINY)).clamp_min(TINY).log()
    spread = (energy * square / fourth.clamp_min(TINY)).clamp_min(TINY).log()
    energies, sums, spreads = _families(count, known, energy.device)
    above = torch.searchsorted(energies, relative.expand(2, -1).contiguous()).clamp(1, RATES - 1)
    low, high = energies.gather(-1, above - 1), energies.gather(-1, above)
    share = ((relative - low) / (high - low)).clamp(0, 1)
    sums, spreads = (torch.lerp(table.gather(-1, above - 1), table.gather(-1, above), share) for table in (sums, spreads))
    total = relative  # log S / σ_a of a cliff, whose spread is 0
    for sum_from, sum_to, from_spread, to_spread in ((relative, sums[0], 0, spreads[0]), (*sums, *spreads)):
        part = ((spread - from_spread) / (to_spread - from_spread).clamp_min(1e-9)).clamp(0, 1)
        total = total + part * (sum_to - sum_from)
    return least * total.exp()


@functools.cache
def _families(count: int, known: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tables (2, RATES) of log Σx², log Σx and log(Σx² / Σx⁴), sorted by the first. Their rows are x =
    exp(−c·j) and x = (1 + j/known)^−p, j = 1 … count.

    The tables are cached: making them takes 0.3 ms on a CPU, where the rest of a tail takes 0.4 ms, and some
    forty launches on a GPU.
    """
    index = torch.arange(1, count + 1, dtype=torch.float64, device=device)
    tables = []
    for steps, first, last in (
        (index, 1, count),
        (known * torch.log1p(index / known), known * math.log1p(1 / known), known * math.log1p(count / known)),
    ):
        rates = torch.linspace(math.log(30 / first), math.log(0.01 / last), RATES - 1, dtype=torch.float64, device=device).exp()
        x = torch.outer(torch.cat([rates, rates.new_zeros(1)]), steps).neg().exp()
        squares = x.square()
        energies = squares.sum(-1).log()
        tables.append((energies, x.sum(-1).log(), energies - squares.square().sum(-1).log()))
    return tuple(map(torch.stack, zip(*tables, strict=True)))
