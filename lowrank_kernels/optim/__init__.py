"""torch.optim wrappers: groups, buckets, the schedule of refreshes. They use backends, ops and subspaces.
They never use Triton directly."""

from . import methods
from .in_backward import InBackward, in_backward
from .methods import *  # noqa: F403
from .optimizer import LowRankOptimizer
from .param_groups import param_groups
from .rso import RSOAdamW

__all__ = ["InBackward", "LowRankOptimizer", "RSOAdamW", "in_backward", "param_groups", *methods.__all__]
