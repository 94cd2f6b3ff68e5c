"""Singular directions of a batch of gradients, by the method that the group's `svd` key names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..range_finder import left_vectors, peak_of, polish, range_finder, short_side_spectrum

WHOLE_FROM = 5
"""On a CPU the eigenproblem of the whole Gram matrix costs less than a sketch of 2r and a block beside it where 5·r ≥ min(m, n)."""
WHOLE_TO = 128
"""… or where the short side is no longer than this."""


@dataclass(frozen=True)
class Spectrum:
    """svd = "randomized" (range finder with `oversample` and `power_iters`) or "exact" (full SVD). `seed` draws the sketch."""

    svd: str
    oversample: int
    power_iters: int
    seed: int

    def leading(self, grad: Tensor, count: int, oversample: int | None = None) -> tuple[Tensor, Tensor]:
        """(batch, m, n) → the leading `count` left singular vectors (batch, m, count) and values (batch, count), descending."""
        if self.svd == "exact":
            vectors, sigma = _exact(grad)
            return vectors[..., :count], sigma[..., :count]
        oversample = self.oversample if oversample is None else oversample
        return range_finder(grad, count, oversample, self.power_iters, self.seed)

    def whole_is_cheaper(self, grad: Tensor, rank: int) -> bool:
        """Whether to know the whole spectrum, of which r directions are sampled, rather than 2r directions and a block beside them."""
        short = min(grad.shape[-2:])
        if self.svd == "exact" or 2 * rank + self.oversample >= short:
            return True
        return grad.device.type == "cpu" and (WHOLE_FROM * rank >= short or short <= WHOLE_TO)

    def whole(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """All k = min(m, n) values (batch, k), in no order, and what `left` makes left singular vectors of: (batch, m or k, k)."""
        if self.svd == "exact":
            return _exact(grad)
        return short_side_spectrum(_over_peak(grad)[0])

    def left(self, grad: Tensor, vectors: Tensor) -> Tensor:
        """The left singular vectors (batch, m, r), orthonormal, of some of the vectors of `whole`."""
        return vectors if self.svd == "exact" else left_vectors(_over_peak(grad)[0], vectors, self.seed)


def _over_peak(grad: Tensor) -> tuple[Tensor, Tensor]:
    """G over its largest element, zero where that is not finite; and that element, or 1: (batch,)."""
    matrix = grad.to(torch.promote_types(grad.dtype, torch.float32))
    peak = peak_of(matrix)
    unit = torch.where(torch.isfinite(peak) & (peak > 0), peak, 1.0).to(matrix.dtype)[..., None]
    return torch.nan_to_num(matrix / unit[..., None], posinf=0.0, neginf=0.0), unit


def _exact(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (batch, m, k) and values (batch, k) of (batch, m, n), k = min(m, n), by a full SVD.

    Of G over its peak, for cuSOLVER does not scale as LAPACK does. fp32 vectors of either are orthonormal to some 2e-5 only, and where
    many elements are equal the rounding errors of a polish in fp32 add up to as much.
    """
    matrix, unit = _over_peak(grad)
    vectors, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    return polish(vectors.double()).to(matrix.dtype), sigma * unit
