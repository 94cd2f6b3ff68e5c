"""The refresh's torch.library operators. They run in plain PyTorch (range_finder.py, subspaces/), or in C++
and CUDA (csrc/) where that is built (extension.py).

`LOWRANK_KERNELS_REFERENCE=1` in the environment forces plain PyTorch everywhere, for debugging.
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
