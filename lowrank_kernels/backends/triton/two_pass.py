"""A step in three launches: R = PᵀG'; the moments and N; W' = (1 − lr·wd)·W' − lr·α·P·N.

The big matrices are passed over twice: one launch reads G, another reads and writes W. R and N go through
memory between the launches, in at most 4·r·n bytes for each matrix of the bucket. R is fp32.

N overwrites R if the bases are fp32, or if the bucket's R fits the L2 cache. In a larger bucket N has the 16
bits of the bases, which halves its traffic; the last dot rounds N to them anyway. R and N then take 6·r·n
bytes a matrix, and the bucket is processed in parts.
"""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from . import back_project, moments, project, table

TEMPORARY_BYTES = 2**28
"""Bytes of R and N of one part. Parts run one after another in the same memory. A part of this size has
enough programs to fill a large GPU five times over at r = 128 and more. It takes hundreds of microseconds, so
neither a last wave nor launches matter."""
CACHED_BYTES = 2**25
"""R of a bucket up to this size, in bytes, is still in the L2 cache (40 MB on sm_80, 50 MB on sm_90) when it
is read again."""


def prepare(
    rows: table.Rows,
    weight: Tensor,
    grad: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    *,
    count: int,
    right: bool,
    aligned: bool,
    stochastic: bool,
) -> Callable[..., None]:
    """The step of one bucket of `count` matrices, given its table.

    The tensors stand for the shapes, strides and dtypes of all; only numbers are kept from them. Moments are
    8-bit codes if the table has their scales. Steps are counted on the device if the table has counters.
    aligned: all addresses are multiples of 16.
    """
    (rank, n), device, dtype = exp_avg.shape, basis.device, basis.dtype
    in_place = dtype == torch.float32 or count == 1 or 4 * rank * n * count <= CACHED_BYTES
    at_once = matrices_at_once(count, rank * n * (4 if in_place else 6), count if in_place else 2 * count // 3)
    parts = []
    for start in range(0, count, at_once):
        stop = min(start + at_once, count)
        part = rows if at_once >= count else _part_of(rows, start, stop)
        launches = (
            project.prepare(part.bases, part.grads, basis, grad, right=right, aligned=aligned),
            moments.prepare(
                part.exp_avgs, part.exp_avg_sqs, exp_avg, aligned=aligned,
                exp_avg_scales_at=part.exp_avg_scales, exp_avg_sq_scales_at=part.exp_avg_sq_scales, steps_at=part.steps,
            ),
            back_project.prepare(part.weights, part.bases, weight, basis, right=right, aligned=aligned, steps_at=part.steps),
        )  # fmt: skip
        parts.append((start, stop, launches))
    shape = at_once, rank, n

    def run(*, lr, beta1, beta2, eps, weight_decay, scale, step, found_inf, device_lr, rounding_seeds) -> None:
        with table.on_device(device):
            projected = torch.empty(shape, dtype=torch.float32, device=device)
            normalised = projected if in_place else torch.empty(shape, dtype=dtype, device=device)
            for start, stop, (project_, update_moments_, back_project_) in parts:
                seeds = rounding_seeds if not stochastic or len(parts) == 1 else rounding_seeds[start:stop]
                project_(projected)
                update_moments_(projected, normalised, beta1=beta1, beta2=beta2, eps=eps, step=step, found_inf=found_inf)
                back_project_(
                    normalised, lr=lr, scale=scale, weight_decay=weight_decay, found_inf=found_inf,
                    device_lr=device_lr, rounding_seeds=seeds, step=step,
                )  # fmt: skip

    return run


def matrices_at_once(count: int, bytes_each: int, most: int) -> int:
    """The number of matrices in a part, at most `most`. All parts have this many but the last one, which has
    hardly fewer."""
    most = max(1, min(most, TEMPORARY_BYTES // max(1, bytes_each)))
    return -(-count // -(-count // most))


def _part_of(rows: table.Rows, start: int, stop: int) -> table.Rows:
    """The rows of some matrices, as views."""
    parts = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return table.Rows(**{name: None if row is None else row[start:stop] for name, row in parts.items()})
