"""What a GradScaler asks of a step: gradients divided by its scale, and a step that is skipped on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .buckets import Bucket, join


@contextlib.contextmanager
def unscaled(bucket: Bucket, grad_scale: Tensor | None) -> Iterator[None]:
    """The bucket's gradients divided by the scale inside, and left so after a step that was made, as torch's fused AdamW does.

    16-bit gradients are divided in fp32 copies: their own quotients would underflow. A failed step leaves all as they were,
    exactly so for scales that are powers of two, as a scaler's are.
    """
    if grad_scale is None:
        yield
        return
    grad_scale = bucket.to_device(grad_scale)
    if bucket.grads[0].dtype.itemsize < 4:
        bucket.grads = [grad.float() / grad_scale for grad in bucket.grads]
        yield
    else:
        grads = bucket.grads
        torch._foreach_div_(grads, grad_scale)
        try:
            yield
        except BaseException:
            torch._foreach_mul_(grads, grad_scale)
            raise
    remaining = iter(bucket.grads)
    for member in bucket.members:
        divided = [next(remaining) for _ in range(member.matrices)]
        if divided[0].data_ptr() != member.param.grad.data_ptr():
            member.param.grad.copy_(join(divided, member.param).reshape(member.param.shape))


class SkippedSteps:
    """Steps that a scaler may have skipped, until the host knows whether it did. On a GPU it does not wait for that by itself."""

    def __init__(self) -> None:
        self._unknown: list[tuple[torch.cuda.Event, Tensor, list[Tensor]]] = []

    def __len__(self) -> int:
        """How many steps may turn out to be skipped."""
        return len(self._unknown)

    def note(self, found_inf: Tensor, params: list[Tensor]) -> list[Tensor]:
        """A step of `params` was made unless found_inf is set. Returns those of a step that is known to be skipped."""
        if not found_inf.is_cuda:
            return params if found_inf.item() else []
        flag = torch.empty(found_inf.shape, dtype=found_inf.dtype, device="cpu", pin_memory=True)
        flag.copy_(found_inf, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(found_inf.device))
        self._unknown.append((event, flag, params))
        return []

    def known(self, wait: bool) -> list[Tensor]:
        """The parameters of steps that turned out to be skipped, once for each such step: of all steps, or of those known by now."""
        skipped: list[Tensor] = []
        while self._unknown:
            event, flag, params = self._unknown[0]
            if wait:
                event.synchronize()
            elif not event.query():
                break
            del self._unknown[0]
            if flag.item():
                skipped += params
        return skipped
