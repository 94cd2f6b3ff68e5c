"""How a basis is chosen: one file a selection, each `(Spectrum, rank, seeds) → basis`, and the refresh, made
of the operators of ops/parts.py; and the random projections of RSO, which no gradient chooses."""

from .distributions import DISTRIBUTIONS, draw_projection
from .overlap import subspace_overlap
from .refresh import SELECTIONS, SVDS, choose_bases, own_memory

__all__ = ["DISTRIBUTIONS", "SELECTIONS", "SVDS", "choose_bases", "draw_projection", "own_memory", "subspace_overlap"]
