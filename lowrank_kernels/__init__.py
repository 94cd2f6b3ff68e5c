"""Low-rank optimizers for PyTorch, fast: GaLore, I3S and RSO with fused kernels on a GPU and plain PyTorch on a CPU.

groups = lowrank_kernels.param_groups(model, rank=128)
optimizer = lowrank_kernels.I3SAdamW(groups, lr=1e-2)

lowrank_kernels.to_subspace(model, rank=128)
optimizer = lowrank_kernels.RSOAdamW(model.parameters(), lr=1e-3)
"""

from . import ops
from .nn import SubspaceLinear, to_dense, to_subspace
from .optim import GaLoreAdamW, I3SAdamW, LowRankAdamW, RSOAdamW, param_groups
from .subspaces import subspace_overlap
from .version import __version__

__all__ = [
    "GaLoreAdamW",
    "I3SAdamW",
    "LowRankAdamW",
    "RSOAdamW",
    "SubspaceLinear",
    "__version__",
    "ops",
    "param_groups",
    "subspace_overlap",
    "to_dense",
    "to_subspace",
]
