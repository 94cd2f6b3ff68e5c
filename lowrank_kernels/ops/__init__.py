"""The refresh's torch.library operators: plain PyTorch (range_finder.py, subspaces/), or csrc/ in C++ and
CUDA where it is built (extension.py).

`LOWRANK_KERNELS_REFERENCE=1` in the environment forces the default everywhere, for debugging.
"""

from .. import extension
from . import dispatch
from .refresh import choose_bases, orthonormalise, range_finder, sample_importance

__all__ = [
    "choose_bases",
    "orthonormalise",
    "range_finder",
    "sample_importance",
]

extension.load(reference_forced=dispatch.REFERENCE_FORCED)
