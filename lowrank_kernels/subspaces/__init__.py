"""How a basis is chosen: one file a selection, each `(grad, rank, Spectrum, seeds) → basis`, and the refresh that calls them."""

from .overlap import subspace_overlap
from .refresh import SELECTIONS, SVDS, choose_bases, own_memory

__all__ = ["SELECTIONS", "SVDS", "choose_bases", "own_memory", "subspace_overlap"]
