"""How a basis is chosen, in plain PyTorch: one file a selection, each `(grad, rank, Spectrum, seeds) → basis`, and the refresh; and
the random projections of RSO, which no gradient chooses.

The default behind ops.choose_bases; csrc/selection.cpp is the same in C++.
"""

from .distributions import DISTRIBUTIONS, draw_projection
from .overlap import subspace_overlap
from .refresh import SELECTIONS, SVDS, choose_bases, own_memory

__all__ = ["DISTRIBUTIONS", "SELECTIONS", "SVDS", "choose_bases", "draw_projection", "own_memory", "subspace_overlap"]
