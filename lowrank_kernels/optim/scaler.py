"""Support for GradScaler: dividing gradients by its scale, and counting the steps that it skipped on the
device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..sharded import is_sharded, local
from ..sharded.state import like
from .buckets import Members


@contextlib.contextmanager
def unscaled(members: Members, grad_scale: Tensor | None) -> Iterator[None]:
    """Divides the members' gradients by the scale inside the context. They stay divided after a successful
    step, as with torch's fused AdamW.

    16-bit gradients are divided in fp32 copies, because quotients in 16 bits would underflow. A failed step
    restores the gradients. The restored values are exact for scales that are powers of two, as a scaler's
    are.
    """
    if grad_scale is None or not members.grads:  # a process may have none of the experts
        yield
        return
    grad_scale, grads = members.to_device(grad_scale), members.grads
    if grads[0].dtype.itemsize < 4:
        members.grads = [grad.float() / grad_scale for grad in grads]
        yield
    else:
        torch._foreach_div_(grads, grad_scale)
        try:
            yield
        except BaseException:
            torch._foreach_mul_(grads, grad_scale)
            raise
    remaining = iter(members.grads)
    for param in () if members.is_projected else members.params:
        divided = [next(remaining) for _ in range(members.per_param)]
        grad = local(param.grad)
        if divided and divided[0].data_ptr() != grad.data_ptr():
            whole = torch.stack(divided) if param.dim() == 3 else divided[0]
            if not is_sharded(param) or param.grad.placements == param.placements:
                grad.copy_(whole.reshape(grad.shape))
            else:
                param.grad = like(param, whole.reshape(local(param).shape).to(grad.dtype))
    members.grads = grads  # frees the fp32 copies


class Skips:
    """Counts, on the GPU, the steps of each group that a scaler has skipped since the host last asked."""

    def __init__(self) -> None:
        self._skipped: dict[int, tuple[dict[str, Any], Tensor]] = {}
        """By the id of a group. The group is held with its count, so that no other one gets its id."""

    def note(self, group: dict[str, Any], found_inf: Tensor) -> None:
        _, before = self._skipped.get(id(group), (group, 0))
        self._skipped[id(group)] = group, before + (found_inf != 0).float()

    def ask(self, group: dict[str, Any]) -> int:
        """The number of the group's steps skipped since the last call. Waits for the GPU that counts them."""
        _, skipped = self._skipped.pop(id(group), (group, None))
        return 0 if skipped is None else int(skipped.item())
