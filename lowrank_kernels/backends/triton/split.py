"""A step in two launches, for ranks that do not fit a single pass: R = PᵀG' with the moments in the epilogue,
then W' = (1 − lr·wd)·W' − lr·α·P·N (back_project.py).

R is never in memory. N passes through it in the dtype of the bases, to which the last dot rounds it anyway:
4·r·n bytes a matrix in 16 bits, written and read. Where a bucket brings R itself, the first launch is that of
moments.py.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bucket import Bucket, Hyper
from . import adam, back_project, choose, configs, moments, pointers, table
from .advance import advance_and_store
from .dots import TRITON_DTYPES, dot_of, round_operand

TEMPORARY_BYTES = 2**28
"""Bytes of N of one part. Parts run one after another in the same memory. A part of this size has enough
programs to fill a large GPU five times over at r = 128 and more. It takes hundreds of microseconds, so
neither a last wave nor launches matter."""


@triton.jit(
    do_not_specialize_on_alignment=[
        "grads_at", "bases_at", "exp_avgs_at", "exp_avg_sqs_at", "exp_avg_scales_at", "exp_avg_sq_scales_at", "steps_at", "found_inf",
    ],
)  # fmt: skip
def _project_moments_kernel(
    grads_at, bases_at, exp_avgs_at, exp_avg_sqs_at, exp_avg_scales_at, exp_avg_sq_scales_at, steps_at, normalised,
    m, n, rank, stride_gm, stride_gn, stride_pm, stride_pr, found_inf,
    beta1, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps,
    G_DTYPE: tl.constexpr, P_DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ROUNDING: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
    offs_k = tl.arange(0, BLOCK_K)
    in_r = (offs_r < rank)[None, :]
    in_n = (offs_n < n)[None, :]
    grad = pointers.matrix_at(grads_at, matrix, G_DTYPE, ALIGNED)
    basis = pointers.matrix_at(bases_at, matrix, P_DTYPE, ALIGNED)
    exp_avg = pointers.matrix_at(exp_avgs_at, matrix, M_DTYPE, ALIGNED)
    exp_avg_sq = pointers.matrix_at(exp_avg_sqs_at, matrix, M_DTYPE, ALIGNED)
    exp_avg_scale = None
    exp_avg_sq_scale = None
    if exp_avg_scales_at is not None:
        exp_avg_scale = pointers.matrix_at(exp_avg_scales_at, matrix, tl.float32)
        exp_avg_sq_scale = pointers.matrix_at(exp_avg_sq_scales_at, matrix, tl.float32)
    p_at = basis + offs_k[:, None].to(tl.int64) * stride_pm + offs_r[None, :].to(tl.int64) * stride_pr
    g_at = grad + offs_k[:, None].to(tl.int64) * stride_gm + offs_n[None, :].to(tl.int64) * stride_gn
    block_k = tl.full((), BLOCK_K, tl.int64)
    r = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for k in range(0, m, BLOCK_K):
        in_k = (offs_k < m - k)[:, None]
        p = tl.load(p_at, mask=in_k & in_r, other=0.0, eviction_policy="evict_last").to(DOT_DTYPE)
        g = tl.load(g_at, mask=in_k & in_n, other=0.0).to(DOT_DTYPE)
        r = tl.dot(round_operand(g, ROUNDING).T, round_operand(p, ROUNDING), r, input_precision=PRECISION)
        p_at += block_k * stride_pm
        g_at += block_k * stride_gm

    correction1, correction2 = adam.bias_corrections(steps_at, matrix, log_beta1, log_beta2)
    advance_and_store(
        r, normalised + matrix * rank * n, first_r, BLOCK_R, SLICES, first_n, BLOCK_N,
        exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, P_DTYPE,
    )  # fmt: skip


def step(bucket: Bucket, hyper: Hyper, rows: table.Rows, row: configs.SplitConfig | None = None) -> None:
    """Two launches for each part of a bucket, given its table. row: None takes the measured row, or the
    built-in row of each launch."""
    row = row or choose.measured_split(bucket, rows.aligned)
    m, n, rank = bucket.extents
    basis, count = bucket.bases[0], len(bucket)
    at_once = matrices_at_once(count, rank * n * basis.itemsize)
    normalised = torch.empty((at_once, rank, n), dtype=basis.dtype, device=basis.device)
    for start in range(0, count, at_once):
        part, part_rows = (bucket, rows) if at_once == count else _part(bucket, rows, start, min(start + at_once, count))
        if bucket.projected is None:
            project_moments(part, hyper, part_rows, normalised, row and row.project_moments)
        else:
            moments.launch(part, hyper, part_rows, normalised)
        back_project.launch(part, hyper, part_rows, normalised, row and row.back_project)


def project_moments(
    bucket: Bucket, hyper: Hyper, rows: table.Rows, normalised: Tensor, config: configs.ProjectMomentsConfig | None = None
) -> None:
    """The first launch: N of every matrix into `normalised`, (B, r, n) or more of the bases' dtype. config:
    None takes the built-in row."""
    m, n, rank = bucket.extents
    basis = bucket.bases[0]
    grad = bucket.grads[0].mT if bucket.right else bucket.grads[0]
    arch = choose.architecture(basis.device)
    dot = dot_of(basis.dtype, grad.dtype, arch)
    wide = rows.aligned and table.wide(basis, grad)
    config = config or choose.project_moments(arch, dot.kind, rank, wide)
    tiles = triton.cdiv(rank, config.BLOCK_R) * triton.cdiv(n, config.BLOCK_N)
    if tiles:
        _project_moments_kernel[(tiles, len(bucket))](
            rows.grads, rows.bases, rows.exp_avgs, rows.exp_avg_sqs, rows.exp_avg_scales, rows.exp_avg_sq_scales, rows.steps, normalised,
            m, n, rank, *grad.stride(), *basis.stride(), bucket.found_inf, *adam.moment_scalars(hyper),
            TRITON_DTYPES[grad.dtype], TRITON_DTYPES[basis.dtype], dot.DOT_DTYPE, dot.PRECISION, dot.ROUNDING, rows.aligned,
            **config.launch_options(),
        )  # fmt: skip


def matrices_at_once(count: int, bytes_each: int) -> int:
    """The number of matrices in a part. All parts have this many but the last one, which has hardly fewer."""
    most = max(1, min(count, TEMPORARY_BYTES // max(1, bytes_each)))
    return -(-count // -(-count // most))


def _part(bucket: Bucket, rows: table.Rows, start: int, stop: int) -> tuple[Bucket, table.Rows]:
    parts = {field.name: getattr(rows, field.name) for field in fields(rows)}
    parts = {name: row[start:stop] if isinstance(row, Tensor) else row for name, row in parts.items()}
    return bucket.part(start, stop), table.Rows(**parts)
