"""A random orthonormal basis, which needs no gradient: the orthonormalised Gaussian is uniform over
subspaces."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import philox
from ..ops import parts
from .spectrum import Spectrum


def random(spectrum: Spectrum, rank: int, seeds: Sequence[int]) -> Tensor:
    """(batch, m, r), a function of each matrix's seed alone."""
    m, _ = spectrum.shape
    return parts.orthonormalise_each(parts.normal(spectrum.grads[0], (m, rank), seeds, philox.BASIS), 0)
