"""Rules for all matrices of a bucket at once, in torch._foreach, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .bucket import Bucket, Hyper
from .reference import kept_where


def sgd(bucket: Bucket, hyper: Hyper, projected: list[Tensor]) -> Tensor:
    """M = momentum·M + R; returns N = M, (B, r, n)."""
    buffers = bucket.states["momentum_buffer"]
    with kept_where(bucket.found_inf, buffers):
        torch._foreach_mul_(buffers, hyper.options["momentum"])
        torch._foreach_add_(buffers, [r.to(buffers[0].dtype) for r in projected])
    return torch.stack(buffers)
