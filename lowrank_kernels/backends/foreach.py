"""Rules for all matrices of a bucket at once, in plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .bucket import Bucket, Hyper
from .reference import compute_dtype, kept_where

CHUNK_ELEMENTS = 2**26
"""Elements of R that are updated together. In fp32 they take 256 MiB, and about six tensors of that size
exist at a time."""


def sgd(bucket: Bucket, hyper: Hyper, projected: list[Tensor]) -> Tensor:
    """M = momentum·M + R; returns N = M, (B, r, n)."""
    buffers = bucket.states["momentum_buffer"]
    with kept_where(bucket.found_inf, buffers):
        torch._foreach_mul_(buffers, hyper.options["momentum"])
        torch._foreach_add_(buffers, [r.to(buffers[0].dtype) for r in projected])
    return torch.stack(buffers)


def batched(bucket: Bucket, hyper: Hyper, projected: list[Tensor], columns: int | None = None) -> Tensor:
    """N (B, r, n) by any rule, on copies of the states as batches. The number of launches does not grow with
    the number of matrices. columns: by how many the batches are measured, where processes that have pieces of
    the rows must make the same ones."""
    dtype = compute_dtype(bucket.weights[0], bucket.bases[0], projected[0])
    rank, n = projected[0].shape
    count = max(1, CHUNK_ELEMENTS // (rank * (n if columns is None else columns)))
    parts = [
        _batch(bucket.part(start, start + count), hyper, torch.stack(projected[start : start + count]).to(dtype)).to(dtype)
        for start in range(0, len(bucket), count)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _batch(bucket: Bucket, hyper: Hyper, projected: Tensor) -> Tensor:
    names = hyper.storage.layout(hyper.rule.state(1, 1), projected.dtype)
    stored = {name: torch.stack(bucket.states[name]) for name in names}
    values = hyper.storage.load(stored, projected.dtype)
    step = torch.stack(bucket.steps).double().view(-1, 1, 1) + 1
    normalised = hyper.rule.update(projected, values, step, **hyper.options)
    hyper.storage.store_(values, stored, step)
    for name, batch in stored.items():
        with kept_where(bucket.found_inf, bucket.states[name]):
            torch._foreach_copy_(bucket.states[name], list(batch.unbind()))
    return normalised
