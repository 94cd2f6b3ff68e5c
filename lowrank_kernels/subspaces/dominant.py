"""GaLore (arXiv 2403.03507): the r leading left singular vectors of the gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .spectrum import Spectrum


def dominant(spectrum: Spectrum, rank: int, seeds: Sequence[int]) -> Tensor:
    """The leading left singular vectors (batch, m, r)."""
    basis, _ = spectrum.leading(rank, spectrum.oversample)
    return basis
