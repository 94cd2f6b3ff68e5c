"""torch.optim wrappers: parameter groups, buckets of equal shapes, the refresh schedule. They know ops and subspaces, never Triton."""

from .methods import GaLoreAdamW, I3SAdamW, LowRankAdamW
from .optimizer import LowRankOptimizer
from .param_groups import param_groups
from .rso import RSOAdamW

__all__ = ["GaLoreAdamW", "I3SAdamW", "LowRankAdamW", "LowRankOptimizer", "RSOAdamW", "param_groups"]
