"""Low-rank optimizers for PyTorch, fast: GaLore and I3S with fused kernels on a GPU and plain PyTorch on a CPU.

groups = lowrank_kernels.param_groups(model, rank=128)
optimizer = lowrank_kernels.I3SAdamW(groups, lr=1e-2)
"""

from . import ops
from .optim import GaLoreAdamW, I3SAdamW, LowRankAdamW, param_groups
from .subspaces import subspace_overlap
from .version import __version__

__all__ = ["GaLoreAdamW", "I3SAdamW", "LowRankAdamW", "__version__", "ops", "param_groups", "subspace_overlap"]
