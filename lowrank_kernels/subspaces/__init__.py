"""How a basis is chosen, in plain PyTorch: one file a selection, each `(grad, rank, Spectrum, seeds) → basis`, and the refresh.

The default behind ops.choose_bases; csrc/selection.cpp is the same in C++.
"""

from .overlap import subspace_overlap
from .refresh import SELECTIONS, SVDS, choose_bases, own_memory

__all__ = ["SELECTIONS", "SVDS", "choose_bases", "own_memory", "subspace_overlap"]
