"""Low-rank optimizers for PyTorch, fast: GaLore, I3S, Fira, APOLLO, RSO and more, with fused kernels on a GPU
and plain PyTorch on a CPU.

groups = lowrank_kernels.param_groups(model, rank=128)
optimizer = lowrank_kernels.I3SAdamW(groups, lr=1e-2)

lowrank_kernels.to_subspace(model, rank=128)
optimizer = lowrank_kernels.RSOAdamW(model.parameters(), lr=1e-3)
"""

from . import distributed, ops
from .estimate import Memory, estimate_memory
from .nn import SubspaceLinear, to_dense, to_subspace
from .optim import InBackward, RSOAdamW, in_backward, methods, param_groups
from .optim.methods import *  # noqa: F403
from .reports import Report, report
from .subspaces import subspace_overlap
from .version import __version__

__all__ = [
    "InBackward",
    "Memory",
    "RSOAdamW",
    "Report",
    "SubspaceLinear",
    "__version__",
    "distributed",
    "estimate_memory",
    "in_backward",
    "ops",
    "param_groups",
    "report",
    "subspace_overlap",
    "to_dense",
    "to_subspace",
    *methods.__all__,
]
