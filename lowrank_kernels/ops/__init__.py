"""torch.library operators: the seam between the optimizers and whatever computes for them on a device.

    default = plain PyTorch (reference.py, range_finder.py)      cpu = kernels/cpu.py      cuda = kernels/*.py in Triton

`LOWRANK_KERNELS_REFERENCE=1` in the environment forces the default everywhere, for debugging.
"""

from .refresh import orthonormalise, range_finder, sample_importance
from .step import adamw_step_, back_project_, project, update_moments_

__all__ = [
    "adamw_step_",
    "back_project_",
    "orthonormalise",
    "project",
    "range_finder",
    "sample_importance",
    "update_moments_",
]
