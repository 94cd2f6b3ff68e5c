"""Fira's step: W' = (1 − lr·wd)·W' − lr·α·(P·N + s·(G' − P·R)), where s has φ and the limiter in it
(limiter.py).

    project_moments.py    R and N through memory in the dtype of the bases (fp32 for fp16); Σ N², Σ R² of the
                          columns
    the residual's norm   Σ (G' − P·R)² of the columns, tile by tile
    limiter.py            s
    the weights           D = P·(N − s·R) + s·G': one product, and G is read once more

G is read three times. The squares could be had without the second one, as ‖G'ⱼ‖² − 2·Rⱼᵀ(PᵀG'ⱼ) +
Rⱼᵀ(PᵀP)Rⱼ, but that difference cancels where the subspace holds nearly all of G.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bucket import Bucket, Hyper
from . import adam, choose, limiter, pointers, project_moments, rounding, table
from .dots import TRITON_DTYPES, dot_of, round_operand


@triton.jit(
    do_not_specialize_on_alignment=["weights_at", "grads_at", "bases_at", "steps_at", "found_inf", "device_lr", "rounding_seeds"],
)
def _residual_kernel(
    weights_at, grads_at, bases_at, steps_at, normalised, projected, factors, squares, found_inf, device_lr, rounding_seeds,
    m, n, rank, stride_wm, stride_wn, stride_gm, stride_gn, stride_pm, stride_pr, decay, step_size,
    W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, P_DTYPE: tl.constexpr, R_DTYPE: tl.constexpr, RIGHT: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ROUNDING: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With `squares`, the squares of the columns of G' − P·R. Else the weights move."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    matrix = tl.program_id(1).to(tl.int64)
    row_tiles = tl.cdiv(m, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    first_m = row_tile * BLOCK_M
    first_n = tl.program_id(0) // row_tiles * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    grad = pointers.matrix_at(grads_at, matrix, G_DTYPE, ALIGNED)
    basis = pointers.matrix_at(bases_at, matrix, P_DTYPE, ALIGNED)
    at_m, at_n = pointers.as_stored(offs_m, offs_n, RIGHT)
    inside = (at_m < m) & (at_n < n)
    g = tl.load(grad + at_m.to(tl.int64) * stride_gm + at_n.to(tl.int64) * stride_gn, mask=inside, other=0.0)
    if squares is None:
        weight = pointers.matrix_at(weights_at, matrix, W_DTYPE, ALIGNED)
        w_at = weight + at_m.to(tl.int64) * stride_wm + at_n.to(tl.int64) * stride_wn
        w = tl.load(w_at, mask=inside, other=0.0, eviction_policy="evict_first")
        scale = tl.load(factors + matrix * n + offs_n, mask=offs_n < n, other=0.0)

    in_m = (offs_m < m)[:, None]
    in_n = (offs_n < n)[None, :]
    p_at = basis + offs_m[:, None].to(tl.int64) * stride_pm + offs_k[None, :].to(tl.int64) * stride_pr
    at = matrix * rank * n + offs_k[:, None].to(tl.int64) * n + offs_n[None, :]
    block_k = tl.full((), BLOCK_K, tl.int64)
    inner = tl.zeros((BLOCK_N, BLOCK_M) if RIGHT else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, rank, BLOCK_K):
        in_k = offs_k < rank - k
        p = tl.load(p_at, mask=in_m & in_k[None, :], other=0.0).to(DOT_DTYPE)
        x = tl.load(projected + at, mask=in_k[:, None] & in_n, other=0.0)
        if squares is None:
            norm = tl.load(normalised + at, mask=in_k[:, None] & in_n, other=0.0).to(tl.float32)
            x = norm - scale[None, :] * x.to(tl.float32)
        x = round_operand(x.to(R_DTYPE).to(DOT_DTYPE), ROUNDING)
        p = round_operand(p, ROUNDING)
        if RIGHT:
            inner = tl.dot(x.T, p.T, inner, input_precision=PRECISION)
        else:
            inner = tl.dot(p, x, inner, input_precision=PRECISION)
        p_at += block_k * stride_pr
        at += block_k * n

    if squares is not None:
        outside = g.to(tl.float32) - inner
        outside = tl.where(inside, outside * outside, 0.0)
        columns = tl.sum(outside, axis=1 if RIGHT else 0)
        tl.store(squares + (matrix * row_tiles + row_tile) * n + offs_n, columns, mask=offs_n < n)
    else:
        _, scale = pointers.as_stored(offs_m, scale, RIGHT)
        decay, step_size = adam.coefficients(device_lr, decay, step_size)
        new = decay * w.to(tl.float32) - step_size * (inner + scale * g.to(tl.float32))
        new = rounding.round_weights(new, rounding_seeds, steps_at, matrix, first_m, first_n, RIGHT)
        tl.store(w_at, new.to(W_DTYPE), mask=inside, eviction_policy="evict_first")


def step(bucket: Bucket, hyper: Hyper) -> None:
    """One step of Fira on AdamW, in place on the weights and states of a bucket, in four launches and a sum.
    R and N take 4·r·n bytes a matrix for bf16 bases. No step synchronises with the device."""
    (m, n, rank), dtype = bucket.extents, bucket.bases[0].dtype
    # Gradients of fp16 weights may be so small that R would be subnormal in fp16.
    of_r = torch.float32 if dtype == torch.float16 else dtype
    bytes_each = rank * n * 2 * of_r.itemsize + 4 * n * triton.cdiv(m, 64) + 12 * n
    for part in table.launchable(bucket, bytes_each):
        with table.on_device(part.device):
            rows = table.rows_of(part)
            normalised, projected = (torch.empty((len(part), rank, n), dtype=of_r, device=part.device) for _ in range(2))
            sums = project_moments.launch(part, hyper, rows, normalised, projected=projected, sums=True)
            squares = launch(part, hyper, rows, None, projected, None).sum(1)
            factors = limiter.launch(sums, squares, rows.norms, part.found_inf, whole=False)
            launch(part, hyper, rows, normalised, projected, factors)
            del normalised, projected, sums, squares, factors  # so that the next part gets their memory


def launch(
    bucket: Bucket, hyper: Hyper, rows: table.Rows, normalised: Tensor | None, projected: Tensor, factors: Tensor | None
) -> Tensor | None:
    """Without factors: Σ (G' − P·R)² of the columns, (B, tiles, n) in fp32. With them: moves the weights."""
    basis, right = bucket.bases[0], bucket.right
    weight, grad = (matrix.mT if right else matrix for matrix in (bucket.weights[0], bucket.grads[0]))
    m, n, rank = bucket.extents
    arch = choose.architecture(basis.device)
    dot = dot_of(basis.dtype, projected.dtype, arch)
    config = choose.residual(arch, dot.kind, rank, rows.aligned and table.wide(weight, grad, basis) and n % 16 == 0)
    row_tiles, column_tiles = triton.cdiv(m, config.BLOCK_M), triton.cdiv(n, config.BLOCK_N)
    squares = None
    if factors is None:
        squares = torch.empty((len(bucket), row_tiles, n), dtype=torch.float32, device=basis.device)
    if row_tiles * column_tiles:
        device_lr, decay, step_size = adam.rates(hyper)
        seeds = bucket.rounding_seeds if factors is not None else None
        _residual_kernel[(row_tiles * column_tiles, len(bucket))](
            rows.weights, rows.grads, rows.bases, None if seeds is None else rows.steps, normalised, projected, factors, squares,
            bucket.found_inf, device_lr if factors is not None else None, seeds,
            m, n, rank, *weight.stride(), *grad.stride(), *basis.stride(), decay, step_size,
            TRITON_DTYPES[weight.dtype], TRITON_DTYPES[grad.dtype], TRITON_DTYPES[basis.dtype], TRITON_DTYPES[projected.dtype], right,
            dot.DOT_DTYPE, dot.PRECISION, dot.ROUNDING, rows.aligned, **config.launch_options(),
        )  # fmt: skip
    return squares
