"""How a basis is chosen. Each selection has a file of its own, `(Spectrum, rank, seeds) → basis`. refresh.py
runs them, on the operators of ops/parts.py. distributions.py draws RSO's random projections, which depend on
no gradient."""

from .distributions import DISTRIBUTIONS, PRINCIPAL, draw_principal, draw_projection
from .overlap import subspace_overlap
from .refresh import BLIND, SELECTIONS, SVDS, choose_bases, own_memory

__all__ = [
    "BLIND",
    "DISTRIBUTIONS",
    "PRINCIPAL",
    "SELECTIONS",
    "SVDS",
    "choose_bases",
    "draw_principal",
    "draw_projection",
    "own_memory",
    "subspace_overlap",
]
