"""R = PᵀG' with AdamW's moments in the epilogue, for steps of more than one launch. R is in memory only where
it is asked for.

For lifts that scale columns, the launch also sums squares over each column: Σ N², Σ R² and Σ G², in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bucket import Bucket, Hyper
from . import adam, choose, configs, pointers, table
from .advance import advance_and_store
from .dots import TRITON_DTYPES, dot_of
from .project import sum_over_m


@triton.jit(
    do_not_specialize_on_alignment=[
        "grads_at", "bases_at", "exp_avgs_at", "exp_avg_sqs_at", "exp_avg_scales_at", "exp_avg_sq_scales_at", "steps_at", "found_inf",
    ],
)  # fmt: skip
def _project_moments_kernel(
    grads_at, bases_at, exp_avgs_at, exp_avg_sqs_at, exp_avg_scales_at, exp_avg_sq_scales_at, steps_at, normalised, projected, column_sums,
    m, n, rank, stride_gm, stride_gn, stride_pm, stride_pr, found_inf,
    beta1, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps,
    G_DTYPE: tl.constexpr, P_DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ROUNDING: tl.constexpr, ALIGNED: tl.constexpr,
    OF_GRAD: tl.constexpr, BLOCK_R: tl.constexpr, SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    M_DTYPE: tl.constexpr = tl.float32 if exp_avg_scales_at is None else tl.uint8
    # Programs on the same strip of G are neighbours, so that they read it again from L2.
    matrix = tl.program_id(1).to(tl.int64)
    rank_tiles = tl.cdiv(rank, BLOCK_R)
    first_r = tl.program_id(0) % rank_tiles * BLOCK_R
    first_n = tl.program_id(0) // rank_tiles * BLOCK_N
    offs_r = first_r + tl.arange(0, BLOCK_R)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    grad = pointers.matrix_at(grads_at, matrix, G_DTYPE, ALIGNED)
    basis = pointers.matrix_at(bases_at, matrix, P_DTYPE, ALIGNED)
    exp_avg = pointers.matrix_at(exp_avgs_at, matrix, M_DTYPE, ALIGNED)
    exp_avg_sq = pointers.matrix_at(exp_avg_sqs_at, matrix, M_DTYPE, ALIGNED)
    exp_avg_scale = None
    exp_avg_sq_scale = None
    if exp_avg_scales_at is not None:
        exp_avg_scale = pointers.matrix_at(exp_avg_scales_at, matrix, tl.float32)
        exp_avg_sq_scale = pointers.matrix_at(exp_avg_sq_scales_at, matrix, tl.float32)
    r, of_grad = sum_over_m(
        grad, basis, offs_n, offs_r, m, n, rank, stride_gm, stride_gn, stride_pm, stride_pr,
        DOT_DTYPE, PRECISION, ROUNDING, BLOCK_R, BLOCK_N, BLOCK_K, "evict_last", "", OF_GRAD,
    )  # fmt: skip
    correction1, correction2 = adam.bias_corrections(steps_at, matrix, log_beta1, log_beta2)
    t = None
    if exp_avg_scales_at is not None:
        t = adam.step_number(steps_at, matrix)
    start = matrix * rank * n
    of_n, of_r = advance_and_store(
        r, None if normalised is None else normalised + start, None if projected is None else projected + start,
        first_r, BLOCK_R, SLICES, first_n, BLOCK_N, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t,
    )  # fmt: skip
    if column_sums is not None:
        at = column_sums + (matrix * rank_tiles + tl.program_id(0) % rank_tiles) * 3 * n + offs_n
        tl.store(at, of_n, mask=offs_n < n)
        tl.store(at + n, of_r, mask=offs_n < n)
        tl.store(at + 2 * n, of_grad, mask=offs_n < n)


def launch(
    bucket: Bucket,
    hyper: Hyper,
    rows: table.Rows,
    normalised: Tensor | None,
    *,
    projected: Tensor | None = None,
    sums: bool = False,
    of_grad: bool = False,
    config: configs.ProjectMomentsConfig | None = None,
) -> Tensor | None:
    """Updates M and V of a bucket in place.

    normalised, projected: where N and R go, (B, r, n) or more of any float dtype; None: nowhere. sums:
    returns Σ N², Σ R² and, with of_grad, Σ G² of the columns, (B, tiles, 3, n) in fp32, to be summed over
    tiles of directions. config: None takes the built-in row. Where found_inf is not zero nothing is written.
    """
    m, n, rank = bucket.extents
    basis = bucket.bases[0]
    grad = bucket.grads[0].mT if bucket.right else bucket.grads[0]
    arch = choose.architecture(basis.device)
    dot = dot_of(basis.dtype, grad.dtype, arch)
    config = config or choose.project_moments(arch, dot.kind, rank, rows.aligned and table.wide(basis, grad))
    rank_tiles, column_tiles = triton.cdiv(rank, config.BLOCK_R), triton.cdiv(n, config.BLOCK_N)
    shape = len(bucket), rank_tiles, 3, n
    column_sums = torch.empty(shape, dtype=torch.float32, device=basis.device) if sums else None
    if rank_tiles * column_tiles:
        _project_moments_kernel[(rank_tiles * column_tiles, len(bucket))](
            rows.grads, rows.bases, rows.exp_avgs, rows.exp_avg_sqs, rows.exp_avg_scales, rows.exp_avg_sq_scales, rows.steps,
            normalised, projected, column_sums,
            m, n, rank, *grad.stride(), *basis.stride(), bucket.found_inf, *adam.moment_scalars(hyper),
            TRITON_DTYPES[grad.dtype], TRITON_DTYPES[basis.dtype], dot.DOT_DTYPE, dot.PRECISION, dot.ROUNDING, rows.aligned,
            of_grad, **config.launch_options(),
        )  # fmt: skip
    return column_sums
