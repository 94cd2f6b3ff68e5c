"""Singular directions of a batch of gradients, by the method that the group's `svd` key names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import philox
from .. import range_finder as algorithms
from ..ops import parts

WHOLE_FROM = 5
"""On a CPU, from 5·r ≥ min(m, n) on, the eigenproblem of the whole Gram matrix costs less than a sketch of 2r
directions and a block."""
WHOLE_TO = 128
"""On a CPU the whole eigenproblem also costs less where the short side is at most this long."""


@dataclass(frozen=True)
class Spectrum:
    """svd = "randomized" is a range finder with `oversample` and `power_iters`. svd = "exact" is a full SVD,
    for which a GPU waits.

    `grads` are as the operators take them, `peak` (batch,) is what parts.peaks returns for them, and `seed`
    draws the sketch.
    """

    grads: Sequence[Tensor]
    peak: Tensor
    svd: str
    oversample: int
    power_iters: int
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.grads[0].shape[-2:]

    def leading(self, count: int, oversample: int) -> tuple[Tensor, Tensor]:
        """The leading `count` left singular vectors (batch, m, count) and values (batch, count),
        descending. Both are NaN where a GPU's solver reports that it failed."""
        if self.svd == "exact":
            vectors, sigma = self._exact()
            return vectors[..., :count], sigma[..., :count]
        return parts.leading(self.grads, self.peak, count, oversample, self.power_iters, self.seed)

    def whole_is_cheaper(self, rank: int) -> bool:
        """Whether the whole spectrum is cheaper than a sketch of 2r directions and a block of the rest. The r
        directions are sampled from either."""
        short = min(self.shape)
        if self.svd == "exact" or 2 * rank + self.oversample >= short:
            return True
        return algorithms.may_look(self.peak) and (WHOLE_FROM * rank >= short or short <= WHOLE_TO)

    def whole(self, rank: int) -> tuple[Tensor, Tensor]:
        """All k = min(m, n) values (batch, k), in no order, and vectors (batch, m or k, k). `left` turns the
        vectors into left singular vectors."""
        return self._exact() if self.svd == "exact" else parts.short_side_spectrum(self.grads, rank)

    def left(self, vectors: Tensor) -> Tensor:
        """The orthonormal left singular vectors (batch, m, r) that belong to r of the vectors of `whole`."""
        m, n = self.shape
        if self.svd == "exact":
            return vectors
        if m <= n:
            return algorithms.polish(vectors)
        basis = parts.orthonormalise_each(parts.multiply(self.grads, vectors), self.seed)
        # Random directions would hide that an eigenproblem was not solved.
        return torch.where(vectors.isnan().any(dim=-2, keepdim=True).any(dim=-1, keepdim=True), torch.nan, basis)

    def outside(self, directions: Tensor, count: int) -> Tensor:
        """(I − UUᵀ)·G·Ω (batch, m, count). Ω is drawn independently of the sketch's."""
        omega = parts.normal(directions, (count, self.shape[1]), [self.seed], philox.TAIL)[0].mT
        return algorithms.clear(directions, parts.multiply(self.grads, omega))

    def _exact(self) -> tuple[Tensor, Tensor]:
        """Left singular vectors (batch, m, k) and values (batch, k), k = min(m, n), by a full SVD.

        G is divided by its peak first, because cuSOLVER does not scale as LAPACK does. The fp32 vectors of
        either library are orthonormal to only about 2e-5, so they are polished.
        """
        matrix = algorithms.over_peak(self.grads, self.peak)
        vectors, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
        return algorithms.polish(vectors), sigma * self.peak[:, None].to(sigma.dtype)
