"""APOLLO's step: W' = (1 − lr·wd)·W' − lr·α·s·G', where s has the ratio of norms and the limiter in it
(limiter.py). R and N are never in memory. G is read twice."""

from __future__ import annotations

import triton
import triton.language as tl

from ..bucket import Bucket, Hyper
from . import adam, choose, limiter, pointers, project_moments, rounding, table
from .dots import TRITON_DTYPES


@triton.jit(
    do_not_specialize_on_alignment=["weights_at", "grads_at", "steps_at", "found_inf", "device_lr", "rounding_seeds"],
)
def _scale_kernel(
    weights_at, grads_at, steps_at, factors, found_inf, device_lr, rounding_seeds,
    m, n, stride_wm, stride_wn, stride_gm, stride_gn, decay, step_size,
    W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, RIGHT: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of W as it is stored, ROWS x COLUMNS."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    matrix = tl.program_id(1).to(tl.int64)
    BLOCK_M: tl.constexpr = COLUMNS if RIGHT else ROWS
    BLOCK_N: tl.constexpr = ROWS if RIGHT else COLUMNS
    row_tiles = tl.cdiv(m, BLOCK_M)
    first_m = tl.program_id(0) % row_tiles * BLOCK_M
    first_n = tl.program_id(0) // row_tiles * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    at_m, at_n = pointers.as_stored(first_m + tl.arange(0, BLOCK_M), offs_n, RIGHT)
    inside = (at_m < m) & (at_n < n)
    weight = pointers.matrix_at(weights_at, matrix, W_DTYPE, ALIGNED)
    grad = pointers.matrix_at(grads_at, matrix, G_DTYPE, ALIGNED)
    w_at = weight + at_m.to(tl.int64) * stride_wm + at_n.to(tl.int64) * stride_wn
    w = tl.load(w_at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    g_at = grad + at_m.to(tl.int64) * stride_gm + at_n.to(tl.int64) * stride_gn
    g = tl.load(g_at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    scale = tl.load(factors + matrix * n + offs_n, mask=offs_n < n, other=0.0)
    _, scale = pointers.as_stored(offs_n, scale, RIGHT)
    decay, step_size = adam.coefficients(device_lr, decay, step_size)
    new = decay * w - step_size * (scale * g)
    new = rounding.round_weights(new, rounding_seeds, steps_at, matrix, first_m, first_n, RIGHT)
    tl.store(w_at, new.to(W_DTYPE), mask=inside, eviction_policy="evict_first")


def step(bucket: Bucket, hyper: Hyper) -> None:
    """One step of APOLLO on AdamW, in place on the weights and states of a bucket, in three launches. No step
    synchronises with the device."""
    for part in table.launchable(bucket):
        with table.on_device(part.device):
            rows = table.rows_of(part)
            sums = project_moments.launch(part, hyper, rows, None, sums=True, of_grad=True)
            # Every tile of directions has summed the same squares of G.
            factors = limiter.launch(sums, sums[:, 0, 2], rows.norms, part.found_inf, whole=hyper.lift.name == "tensor_scaling")
            launch(part, hyper, rows, factors)


def launch(bucket: Bucket, hyper: Hyper, rows: table.Rows, factors) -> None:
    right = bucket.right
    weight, grad = (matrix.mT if right else matrix for matrix in (bucket.weights[0], bucket.grads[0]))
    m, n, _ = bucket.extents
    config = choose.scaling()
    tiles = triton.cdiv(bucket.weights[0].shape[0], config.ROWS) * triton.cdiv(bucket.weights[0].shape[1], config.COLUMNS)
    if tiles:
        device_lr, decay, step_size = adam.rates(hyper)
        _scale_kernel[(tiles, len(bucket))](
            rows.weights, rows.grads, None if bucket.rounding_seeds is None else rows.steps, factors,
            bucket.found_inf, device_lr, bucket.rounding_seeds,
            m, n, *weight.stride(), *grad.stride(), decay, step_size,
            TRITON_DTYPES[weight.dtype], TRITON_DTYPES[grad.dtype], right, rows.aligned, **config.launch_options(),
        )  # fmt: skip
