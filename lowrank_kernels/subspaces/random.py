"""Random bases, which need no gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import philox
from ..ops import parts
from .spectrum import Spectrum


def random(spectrum: Spectrum, rank: int, seeds: Sequence[int]) -> Tensor:
    """Orthonormal bases (batch, m, r), each a function of its matrix's seed alone. The orthonormalised
    Gaussian is uniform over subspaces."""
    return parts.orthonormalise_each(_normal(spectrum, rank, seeds), 0)


def gaussian(spectrum: Spectrum, rank: int, seeds: Sequence[int]) -> Tensor:
    """P (batch, m, r) of independent N(0, 1/r), so that E[P·Pᵀ] = I (APOLLO, arXiv 2412.05270). It is not
    orthonormal."""
    return _normal(spectrum, rank, seeds) * rank**-0.5


def _normal(spectrum: Spectrum, rank: int, seeds: Sequence[int]) -> Tensor:
    m, _ = spectrum.shape
    return parts.normal(spectrum.grads[0], (m, rank), seeds, philox.BASIS)
