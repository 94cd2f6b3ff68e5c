"""torch.optim wrappers: groups, buckets, the schedule of refreshes. They use backends, ops and subspaces.
They never use Triton directly."""

from . import methods
from .methods import *  # noqa: F403
from .optimizer import LowRankOptimizer
from .param_groups import param_groups
from .rso import RSOAdamW

__all__ = ["LowRankOptimizer", "RSOAdamW", "param_groups", *methods.__all__]
