"""A step in one launch: R = PᵀG', the moments, N, W' = (1 − lr·wd)·W' − lr·α·P·N. R and N are never in
memory.

A program owns BLOCK_N columns of one matrix. It reads its columns of G once and sums R over m in fp32, or it
reads R where the bucket brings that. It updates its part of the moments and keeps N on the chip, in the dtype
of the bases. Then it reads and writes its columns of W once. It reads P twice; only the first program that
needs P reads it from memory, the others from L2.

G', W' are G, W of shape (m, n) on the left side. On the right side the stored ones are (n, m), and G', W' are
their transposes. W moves in tiles of W as it is stored: then its accesses, and the random bits of a
stochastic rounding, run the same way on both sides.

The built-in rows are estimates: nothing was measured on a GPU yet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bucket import Bucket, Hyper
from . import adam, choose, configs, pointers, rounding, table
from .advance import advance_and_keep
from .dots import TRITON_DTYPES, dot_of, round_operand
from .project import sum_over_m


@triton.jit(
    do_not_specialize_on_alignment=[
        "weights_at", "grads_at", "projected_at", "bases_at", "exp_avgs_at", "exp_avg_sqs_at", "exp_avg_scales_at", "exp_avg_sq_scales_at",
        "steps_at", "found_inf", "device_lr", "rounding_seeds",
    ],
)  # fmt: skip
def _adamw_step_kernel(
    weights_at, grads_at, projected_at, bases_at, exp_avgs_at, exp_avg_sqs_at, exp_avg_scales_at, exp_avg_sq_scales_at, steps_at,
    m, n, rank, stride_wm, stride_wn, stride_gm, stride_gn, stride_pm, stride_pr,
    found_inf, device_lr, rounding_seeds,
    beta1, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps, decay, step_size,
    W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, P_DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ROUNDING: tl.constexpr, ALIGNED: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr, SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    W_STAGES: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    M_DTYPE: tl.constexpr = tl.float32 if exp_avg_scales_at is None else tl.uint8
    # Programs of one matrix are neighbours, so that they read P again from L2.
    matrix = tl.program_id(1).to(tl.int64)
    weight = pointers.matrix_at(weights_at, matrix, W_DTYPE, ALIGNED)
    basis = pointers.matrix_at(bases_at, matrix, P_DTYPE, ALIGNED)
    exp_avg = pointers.matrix_at(exp_avgs_at, matrix, M_DTYPE, ALIGNED)
    exp_avg_sq = pointers.matrix_at(exp_avg_sqs_at, matrix, M_DTYPE, ALIGNED)
    exp_avg_scale = None
    exp_avg_sq_scale = None
    if exp_avg_scales_at is not None:
        exp_avg_scale = pointers.matrix_at(exp_avg_scales_at, matrix, tl.float32)
        exp_avg_sq_scale = pointers.matrix_at(exp_avg_sq_scales_at, matrix, tl.float32)
    first_n = tl.program_id(0) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    in_r = (offs_r < rank)[None, :]

    r = None
    projected = None
    if projected_at is not None:
        projected = pointers.matrix_at(projected_at, matrix, G_DTYPE, ALIGNED)
    else:
        grad = pointers.matrix_at(grads_at, matrix, G_DTYPE, ALIGNED)
        r, _ = sum_over_m(
            grad, basis, offs_n, offs_r, m, n, rank, stride_gm, stride_gn, stride_pm, stride_pr,
            DOT_DTYPE, PRECISION, ROUNDING, BLOCK_R, BLOCK_N, BLOCK_K, "evict_last", "evict_first", False,
        )  # fmt: skip

    correction1, correction2 = adam.bias_corrections(steps_at, matrix, log_beta1, log_beta2)
    t = None
    if exp_avg_scales_at is not None or rounding_seeds is not None:
        t = adam.step_number(steps_at, matrix)
    norm = advance_and_keep(
        r, projected, 0, BLOCK_R, SLICES, first_n, BLOCK_N, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, P_DTYPE,
    )  # fmt: skip
    norm = round_operand(norm.to(DOT_DTYPE), ROUNDING)
    if RIGHT:
        norm = norm.T

    decay, step_size = adam.coefficients(device_lr, decay, step_size)
    if rounding_seeds is not None:
        seed = tl.load(rounding_seeds + matrix)
    offs_m = tl.arange(0, BLOCK_M)
    p_at = basis + offs_m[:, None].to(tl.int64) * stride_pm + offs_r[None, :].to(tl.int64) * stride_pr
    at_m, at_n = pointers.as_stored(offs_m, offs_n, RIGHT)
    w_at = weight + at_m.to(tl.int64) * stride_wm + at_n.to(tl.int64) * stride_wn
    block_m = tl.full((), BLOCK_M, tl.int64)
    if W_STAGES is None:
        w_next = tl.load(w_at, mask=(at_m < m) & (at_n < n), other=0.0, eviction_policy="evict_first")
    for i in tl.range(0, m, BLOCK_M, num_stages=W_STAGES):
        inside = (at_m < m - i) & (at_n < n)
        if W_STAGES is None:  # one tile ahead, in registers
            w = w_next
            ahead = (at_m < m - i - BLOCK_M) & (at_n < n)
            w_next = tl.load(w_at + block_m * stride_wm, mask=ahead, other=0.0, eviction_policy="evict_first")
        else:
            w = tl.load(w_at, mask=inside, other=0.0, eviction_policy="evict_first")
        p = tl.load(p_at, mask=(offs_m < m - i)[:, None] & in_r, other=0.0, eviction_policy="evict_last").to(DOT_DTYPE)
        p = round_operand(p, ROUNDING)
        zeros = tl.zeros((BLOCK_N, BLOCK_M) if RIGHT else (BLOCK_M, BLOCK_N), dtype=tl.float32)
        if RIGHT:
            moved = tl.dot(norm, p.T, zeros, input_precision=PRECISION)
        else:
            moved = tl.dot(p, norm, zeros, input_precision=PRECISION)
        new = decay * w.to(tl.float32) - step_size * moved
        if rounding_seeds is not None:
            new = rounding.round_stochastically(new, first_n if RIGHT else i, i if RIGHT else first_n, seed, t)
        tl.store(w_at, new.to(W_DTYPE), mask=inside, eviction_policy="evict_first")
        p_at += block_m * stride_pm
        w_at += block_m * stride_wm


def row_for(bucket: Bucket, aligned: bool) -> configs.SinglePassConfig | configs.SplitConfig | None:
    """The row for a bucket: the measured one, of a single pass or of the split, else a built-in one of the
    single pass. None leaves the bucket to the built-in rows of the split: no row covers the rank, the dtypes
    are mixed, or the bucket has too few programs to fill the device."""
    measured = choose.measured(bucket, aligned)
    if measured is not None:
        return measured
    weight, basis = bucket.weights[0], bucket.bases[0]
    source = bucket.grads[0] if bucket.projected is None else None
    if not weight.dtype == basis.dtype or (source is not None and source.dtype != basis.dtype):
        return None
    arch = choose.architecture(basis.device)
    kind = dot_of(basis.dtype, basis.dtype, arch).kind
    wide = aligned and table.wide(weight, basis, *([] if source is None else [source]))
    row = choose.single_pass(arch, kind, basis.shape[1], wide, "exp_avg_scale" in bucket.states)
    if row is None or basis.device.type != "cuda":
        return row
    return row if row.programs(bucket.extents[1], len(bucket)) >= choose.multiprocessors(basis.device) else None


def step(bucket: Bucket, hyper: Hyper, rows: table.Rows, row: configs.SinglePassConfig) -> None:
    """One launch, for a bucket, its table, and its row."""
    m, n, rank = bucket.extents
    weight, basis, right = bucket.weights[0], bucket.bases[0], bucket.right
    source = bucket.grads[0] if bucket.projected is None else bucket.projected[0]
    dot = dot_of(basis.dtype, basis.dtype, choose.architecture(basis.device))
    tiles = triton.cdiv(n, row.BLOCK_N)
    if not tiles:
        return
    device_lr, decay, step_size = adam.rates(hyper)
    grad_strides = _strides(source, right) if bucket.projected is None else (0, 0)
    _adamw_step_kernel[(tiles, len(bucket))](
        rows.weights, rows.grads, rows.projected, rows.bases, rows.exp_avgs, rows.exp_avg_sqs, rows.exp_avg_scales, rows.exp_avg_sq_scales,
        rows.steps, m, n, rank, *_strides(weight, right), *grad_strides, *basis.stride(),
        bucket.found_inf, device_lr, bucket.rounding_seeds,
        *adam.moment_scalars(hyper), decay, step_size,
        TRITON_DTYPES[weight.dtype], TRITON_DTYPES[source.dtype], TRITON_DTYPES[basis.dtype],
        dot.DOT_DTYPE, dot.PRECISION, dot.ROUNDING, rows.aligned, right, **row.launch_options(),
    )  # fmt: skip


def _strides(matrix: Tensor, right: bool) -> tuple[int, int]:
    """Along m and n."""
    along_rows, along_columns = matrix.stride()
    return (along_columns, along_rows) if right else (along_rows, along_columns)
