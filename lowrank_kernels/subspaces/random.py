"""A random orthonormal basis, which needs no gradient. The orthonormalised Gaussian is uniform over
subspaces."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import philox
from ..ops import parts
from .spectrum import Spectrum


def random(spectrum: Spectrum, rank: int, seeds: Sequence[int]) -> Tensor:
    """The bases (batch, m, r). Each is a function of its matrix's seed alone."""
    m, _ = spectrum.shape
    return parts.orthonormalise_each(parts.normal(spectrum.grads[0], (m, rank), seeds, philox.BASIS), 0)
