"""The step that only makes states.

torch.distributed.checkpoint's get_optimizer_state_dict and set_optimizer_state_dict take a step with
gradients of zeros and lr = 0 where an optimizer has no state yet. Such a step makes the states, and counts
nothing: the training after it is the same as without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sharded import is_sharded, local
from ..sharded.refresh import anywhere_on

if TYPE_CHECKING:
    from .optimizer import LowRankOptimizer


def counts(optimizer: LowRankOptimizer) -> list[int | None] | None:
    """The `calls` of each group, where the step that follows only makes states; else None. It waits for a
    GPU, in the first step of an optimizer with lr = 0."""
    if any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return None
    grads = [param.grad for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    if not grads or _any(grads):
        return None
    return [group.get("calls") for group in optimizer.param_groups]


def forget(optimizer: LowRankOptimizer, before: list[int | None]) -> None:
    """Sets all counts back."""
    for group, calls in zip(optimizer.param_groups, before, strict=True):
        if calls is not None:
            group["calls"] = calls
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


def _any(grads: list[Tensor]) -> bool:
    """Whether an element is not zero, in any process that has a part of these gradients."""
    found = torch.stack([local(grad).any().cpu() for grad in grads]).any()
    return bool(anywhere_on(found, [grad.device_mesh for grad in grads if is_sharded(grad)]))
