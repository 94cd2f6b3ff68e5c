"""The norm of an optimizer's gradients, of which some are projected already."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..sharded import is_sharded, local

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
    norm = _total_norm(grads, error_if_nonfinite)
    if math.isinf(max_norm):
        return norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for grad in map(local, grads):
        alike[grad.device, grad.dtype].append(grad)
    for (device, _), tensors in alike.items():
        torch._foreach_mul_(tensors, factor.to(device, non_blocking=device.type == "cuda"))
    return norm


def _total_norm(grads: list[Tensor], error_if_nonfinite: bool) -> Tensor:
    """The norm of all gradients. The parts of DTensors count once each, wherever they are."""
    of_mesh: dict[Any, list[Tensor]] = defaultdict(list)
    for grad in grads:
        of_mesh[getattr(grad, "device_mesh", None)].append(grad)
    norms = [torch.nn.utils.get_total_norm(each, error_if_nonfinite=error_if_nonfinite) for each in of_mesh.values()]
    norms = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
