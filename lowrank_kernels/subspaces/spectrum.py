"""Singular directions of a batch of gradients, by the method that the group's `svd` key names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..range_finder import peak_of, polish, range_finder


@dataclass(frozen=True)
class Spectrum:
    """svd = "randomized" (range finder with `oversample` and `power_iters`) or "exact" (full SVD). `seed` draws the sketch."""

    svd: str
    oversample: int
    power_iters: int
    seed: int

    def leading(self, grad: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(batch, m, n) → the leading `count` left singular vectors (batch, m, count) and values (batch, count), descending."""
        if self.svd == "exact":
            vectors, sigma = _exact(grad)
            return vectors[..., :count], sigma[..., :count]
        return range_finder(grad, count, self.oversample, self.power_iters, self.seed)

    def affordable(self, grad: Tensor, rank: int) -> int:
        """How many directions to know before r of them are sampled: all where that is no extra work, else 2r."""
        short = min(grad.shape[-2:])
        return short if self.svd == "exact" or 2 * rank + self.oversample >= short else 2 * rank


def _exact(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (batch, m, k) and values (batch, k) of (batch, m, n), k = min(m, n), by a full SVD.

    Of G over its peak, for cuSOLVER does not scale as LAPACK does. fp32 vectors of either are orthonormal to some 2e-5 only, and where
    many elements are equal the rounding errors of a polish in fp32 add up to as much.
    """
    matrix = grad.to(torch.promote_types(grad.dtype, torch.float32))
    peak = peak_of(matrix)
    unit = torch.where(torch.isfinite(peak) & (peak > 0), peak, 1.0).to(matrix.dtype)[..., None]
    vectors, sigma, _ = torch.linalg.svd(torch.nan_to_num(matrix / unit[..., None], posinf=0.0, neginf=0.0), full_matrices=False)
    return polish(vectors.double()).to(matrix.dtype), sigma * unit
