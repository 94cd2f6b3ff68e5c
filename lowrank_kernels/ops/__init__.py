"""torch.library operators: the seam between the optimizers and whatever computes for them on a device.

    default = plain PyTorch (reference.py, range_finder.py, subspaces/)      cpu = kernels/cpu.py      cuda = kernels/*.py in Triton
    the refresh on both: csrc/ in C++ and CUDA, where it is built (extension.py)

`LOWRANK_KERNELS_REFERENCE=1` in the environment forces the default everywhere, for debugging.
"""

from .. import extension
from . import dispatch
from .refresh import choose_bases, orthonormalise, range_finder, sample_importance
from .step import adamw_step_, back_project_, project, run_adamw_step_, update_moments_

__all__ = [
    "adamw_step_",
    "back_project_",
    "choose_bases",
    "orthonormalise",
    "project",
    "range_finder",
    "run_adamw_step_",
    "sample_importance",
    "update_moments_",
]

extension.load(reference_forced=dispatch.REFERENCE_FORCED)
