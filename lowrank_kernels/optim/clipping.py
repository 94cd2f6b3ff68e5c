"""The norm of an optimizer's gradients, of which some are projected already."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optimizer import LowRankOptimizer


def clip_grad_norm_(optimizer: LowRankOptimizer, max_norm: float, error_if_nonfinite: bool) -> Tensor:
    """See LowRankOptimizer.clip_grad_norm_."""
    if not (isinstance(max_norm, (int, float)) and max_norm > 0):
        raise ValueError(f"max_norm must be a positive number, got {max_norm!r}")
    projected = [] if optimizer._in_backward is None else optimizer._in_backward.to_clip()
    params = {param: None for group in optimizer.param_groups for param in group["params"]}
    grads = [param.grad for param in params if param.grad is not None] + projected
    if not grads:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(grads, error_if_nonfinite=error_if_nonfinite)
    if math.isinf(max_norm):
        return norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for grad in grads:
        alike[grad.device, grad.dtype].append(grad)
    for (device, _), tensors in alike.items():
        torch._foreach_mul_(tensors, factor.to(device, non_blocking=device.type == "cuda"))
    return norm
