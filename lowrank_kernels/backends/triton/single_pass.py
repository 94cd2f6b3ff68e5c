"""A step in one launch: R = PᵀG', the moments, N, W' = (1 − lr·wd)·W' − lr·α·P·N. R and N are never in
memory.

A program owns BLOCK_N columns of one matrix. It reads its columns of G once and sums R over m in fp32. It
updates its part of the moments and keeps N on the chip, in the dtype of the bases. Then it reads and writes
its columns of W once. It reads P twice; only the first program that needs P reads it from memory, the others
from L2.

G', W' are G, W of shape (m, n) on the left side. On the right side the stored ones are (n, m), and G', W' are
their transposes. The two sides differ in strides, and in the direction in which the random bits of a
stochastic rounding run.

The choice of the row of configs.SINGLE_PASS for a bucket is an estimate so far: nothing was measured on a GPU
yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adam, configs, eight_bit, pointers, rounding, table
from .dots import TRITON_DTYPES, dot_of, round_operand


@triton.jit
def _halves(x):
    """(A, 2B) → its left and right half, (A, B) each."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _stack(upper, lower):
    """Two (A, B) → (2A, B)."""
    return tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 1)), (2 * upper.shape[0], upper.shape[1]))


@triton.jit
def _advance(
    r, first_r,
    exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
    beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE: tl.constexpr,
):  # fmt: skip
    """Rᵀ (BLOCK_N, ROWS) of rows from first_r and columns from first_n → N (ROWS, BLOCK_N). Updates M and V
    in memory. t: the number of this update, for 8-bit moments."""
    r = r.T
    offs_r = first_r + tl.arange(0, r.shape[0])
    offs_n = first_n + tl.arange(0, r.shape[1])
    in_r = (offs_r < rank)[:, None]
    inside = in_r & (offs_n < n)[None, :]
    offs = offs_r[:, None].to(tl.int64) * n + offs_n[None, :]
    if exp_avg_scale is not None:
        blocks = tl.cdiv(n, eight_bit.BLOCK)
        offs_b = first_n // eight_bit.BLOCK + tl.arange(0, r.shape[1] // eight_bit.BLOCK)
        in_blocks = in_r & (offs_b < blocks)[None, :]
        offs_s = offs_r[:, None].to(tl.int64) * blocks + offs_b[None, :]
        # Codes and scales outside the matrix decode to zero.
        m_scales = tl.load(exp_avg_scale + offs_s, mask=in_blocks, other=0.0)
        v_scales = tl.load(exp_avg_sq_scale + offs_s, mask=in_blocks, other=0.0)
        m = eight_bit.decode_m(tl.load(exp_avg + offs, mask=inside, other=128), m_scales)
        v = eight_bit.decode_v(tl.load(exp_avg_sq + offs, mask=inside, other=0), v_scales)
        m, v = adam.update(m, v, r, beta1, one_minus_beta1, beta2, one_minus_beta2)
        m_codes, m_scales = eight_bit.encode_m(m, inside)
        v_codes, v_scales = eight_bit.encode_v(v, inside, first_r, first_n, t)
        # All warps of a block of 64 must have loaded its scale before one of them stores it. The barrier
        # comes from the conversion of the scale's layout; benchmarks/ir checks that it is there.
        tl.store(exp_avg_scale + offs_s, m_scales, mask=in_blocks)
        tl.store(exp_avg_sq_scale + offs_s, v_scales, mask=in_blocks)
        tl.store(exp_avg + offs, m_codes, mask=inside)
        tl.store(exp_avg_sq + offs, v_codes, mask=inside)
    else:
        m = tl.load(exp_avg + offs, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + offs, mask=inside, other=0.0)
        m, v = adam.update(m, v, r, beta1, one_minus_beta1, beta2, one_minus_beta2)
        tl.store(exp_avg + offs, m, mask=inside)
        tl.store(exp_avg_sq + offs, v, mask=inside)
    norm = adam.normalise(m, v, correction1, correction2, eps)
    # Rows past the rank are 0/ε, which is NaN for ε = 0. NaN times the zeros of P would be NaN.
    return tl.where(in_r, norm, 0.0).to(N_DTYPE)


@triton.jit
def _advance_2(
    r, first_r,
    exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
    beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE: tl.constexpr,
):  # fmt: skip
    """_advance in two slices of rows, one after the other, so that only a part of M and V is in registers
    beside R."""
    left, right = _halves(r)
    upper = _advance(
        left, first_r, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE,
    )  # fmt: skip
    lower = _advance(
        right, first_r + left.shape[1], exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE,
    )  # fmt: skip
    return _stack(upper, lower)


@triton.jit
def _advance_4(
    r, first_r,
    exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
    beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE: tl.constexpr,
):  # fmt: skip
    """_advance in four slices. Each depth has a function of its own, because Triton up to 3.4 never finishes
    analysing a function that calls itself."""
    left, right = _halves(r)
    upper = _advance_2(
        left, first_r, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE,
    )  # fmt: skip
    lower = _advance_2(
        right, first_r + left.shape[1], exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE,
    )  # fmt: skip
    return _stack(upper, lower)


@triton.jit
def _advance_8(
    r, first_r,
    exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
    beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE: tl.constexpr,
):  # fmt: skip
    left, right = _halves(r)
    upper = _advance_4(
        left, first_r, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE,
    )  # fmt: skip
    lower = _advance_4(
        right, first_r + left.shape[1], exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE,
    )  # fmt: skip
    return _stack(upper, lower)


@triton.jit
def _advance_16(
    r, first_r,
    exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
    beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE: tl.constexpr,
):  # fmt: skip
    left, right = _halves(r)
    upper = _advance_8(
        left, first_r, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE,
    )  # fmt: skip
    lower = _advance_8(
        right, first_r + left.shape[1], exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
        beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE,
    )  # fmt: skip
    return _stack(upper, lower)


# `step` is not specialised: specialising it compiles a kernel for 1, one for multiples of 16 and one for the
# rest.
@triton.jit(
    do_not_specialize=["step"],
    do_not_specialize_on_alignment=[
        "weights_at", "grads_at", "bases_at", "exp_avgs_at", "exp_avg_sqs_at", "exp_avg_scales_at", "exp_avg_sq_scales_at", "steps_at",
        "found_inf", "device_lr", "rounding_seeds",
    ],
)  # fmt: skip
def _adamw_step_kernel(
    weights_at, grads_at, bases_at, exp_avgs_at, exp_avg_sqs_at, exp_avg_scales_at, exp_avg_sq_scales_at, steps_at,
    m, n, rank, stride_wm, stride_wn, stride_gm, stride_gn, stride_pm, stride_pr,
    found_inf, device_lr, rounding_seeds,
    beta1, one_minus_beta1, beta2, one_minus_beta2, first_correction, second_correction, eps, decay, step_size, step,
    W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, P_DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ROUNDING: tl.constexpr, ALIGNED: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr, SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    M_DTYPE: tl.constexpr = tl.float32 if exp_avg_scales_at is None else tl.uint8
    # Programs of one matrix are neighbours, so that they read P again from L2.
    matrix = tl.program_id(1).to(tl.int64)
    weight = pointers.matrix_at(weights_at, matrix, W_DTYPE, ALIGNED)
    grad = pointers.matrix_at(grads_at, matrix, G_DTYPE, ALIGNED)
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
    in_n = (offs_n < n)[None, :]
    in_r = (offs_r < rank)[None, :]

    offs_k = tl.arange(0, BLOCK_K)
    p_at = basis + offs_k[:, None].to(tl.int64) * stride_pm + offs_r[None, :].to(tl.int64) * stride_pr
    g_at = grad + offs_k[:, None].to(tl.int64) * stride_gm + offs_n[None, :].to(tl.int64) * stride_gn
    block_k = tl.full((), BLOCK_K, tl.int64)
    # The tile is accumulated as Rᵀ. Cutting it into slices of rows then moves nothing between threads of
    # wgmma's layout. n is also the long side of the dot then, which wgmma wants to be at least 64, whatever
    # the rank.
    r = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for k in range(0, m, BLOCK_K):
        in_k = (offs_k < m - k)[:, None]
        p = tl.load(p_at, mask=in_k & in_r, other=0.0).to(DOT_DTYPE)
        g = tl.load(g_at, mask=in_k & in_n, other=0.0).to(DOT_DTYPE)
        r = tl.dot(round_operand(g, ROUNDING).T, round_operand(p, ROUNDING), r, input_precision=PRECISION)
        p_at += block_k * stride_pm
        g_at += block_k * stride_gm

    correction1, correction2 = adam.bias_corrections(steps_at, matrix, first_correction, second_correction)
    t = None
    if exp_avg_scales_at is not None or rounding_seeds is not None:
        t = adam.step_number(steps_at, matrix, step)
    if SLICES == 1:
        norm = _advance(
            r, 0, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, P_DTYPE,
        )  # fmt: skip
    elif SLICES == 2:
        norm = _advance_2(
            r, 0, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, P_DTYPE,
        )  # fmt: skip
    elif SLICES == 4:
        norm = _advance_4(
            r, 0, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, P_DTYPE,
        )  # fmt: skip
    elif SLICES == 8:
        norm = _advance_8(
            r, 0, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, P_DTYPE,
        )  # fmt: skip
    else:
        tl.static_assert(SLICES == 16)
        norm = _advance_16(
            r, 0, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n, first_n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, P_DTYPE,
        )  # fmt: skip
    norm = round_operand(norm.to(DOT_DTYPE), ROUNDING)

    decay, step_size = adam.coefficients(device_lr, decay, step_size)
    if rounding_seeds is not None:
        seed = tl.load(rounding_seeds + matrix)
    offs_m = tl.arange(0, BLOCK_M)
    p_at = basis + offs_m[:, None].to(tl.int64) * stride_pm + offs_r[None, :].to(tl.int64) * stride_pr
    w_at = weight + offs_m[:, None].to(tl.int64) * stride_wm + offs_n[None, :].to(tl.int64) * stride_wn
    block_m = tl.full((), BLOCK_M, tl.int64)
    # Triton does not pipeline loads of W, because W is not an operand of the dot. Each round therefore loads
    # the tile of the next round.
    w_next = tl.load(w_at, mask=(offs_m < m)[:, None] & in_n, other=0.0)
    for i in range(0, m, BLOCK_M):
        in_m = (offs_m < m - i)[:, None]
        w = w_next.to(tl.float32)
        w_next = tl.load(w_at + block_m * stride_wm, mask=(offs_m < m - i - BLOCK_M)[:, None] & in_n, other=0.0)
        p = tl.load(p_at, mask=in_m & in_r, other=0.0).to(DOT_DTYPE)
        moved = tl.dot(round_operand(p, ROUNDING), norm, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), input_precision=PRECISION)
        w = decay * w - step_size * moved
        if rounding_seeds is not None:
            w = rounding.round_stochastically(w, i, first_n, seed, t, RIGHT)
        tl.store(w_at, w.to(W_DTYPE), mask=in_m & in_n)
        p_at += block_m * stride_pm
        w_at += block_m * stride_wm


def serves(weight: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, *, count: int, aligned: bool) -> bool:
    """Whether there is a row for these tensors (see row_for) with enough programs to fill the device."""
    row = row_for(weight, grad, basis, exp_avg, aligned=aligned)
    if row is None:
        return False
    return basis.device.type != "cuda" or row.programs(exp_avg.shape[1], count) >= _multiprocessors(basis.device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_for(weight: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, *, aligned: bool) -> configs.SinglePassConfig | None:
    """The row of configs.SINGLE_PASS for a bucket of tensors like these. None if there is no such row or the
    dtypes are mixed."""
    if not weight.dtype == grad.dtype == basis.dtype:
        return None
    arch = configs.architecture(basis.device)
    kind = dot_of(basis.dtype, basis.dtype, arch).kind
    return configs.single_pass_config(arch, kind, basis.shape[1], aligned and table.wide(weight, grad, basis), exp_avg.dtype == torch.uint8)


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
    """The step of one bucket of `count` matrices, given its table. There must be a row for the bucket
    (`row_for`).

    The tensors stand for the shapes, strides and dtypes of all; only numbers are kept from them. Moments are
    8-bit codes if the table has their scales. Steps are counted on the device if the table has counters.
    aligned: all addresses are multiples of 16.
    """
    row = row_for(weight, grad, basis, exp_avg, aligned=aligned)
    if row is None:
        raise ValueError(f"no row of configs.SINGLE_PASS serves a basis {tuple(basis.shape)} of {basis.dtype} on {basis.device}")
    weight, grad = (weight.mT, grad.mT) if right else (weight, grad)
    (m, rank), n, device = basis.shape, weight.shape[1], basis.device
    dot = dot_of(basis.dtype, basis.dtype, configs.architecture(device))
    fixed = (
        rows.weights, rows.grads, rows.bases, rows.exp_avgs, rows.exp_avg_sqs, rows.exp_avg_scales, rows.exp_avg_sq_scales, rows.steps,
        m, n, rank, *weight.stride(), *grad.stride(), *basis.stride(),
    )  # fmt: skip
    constexprs = (
        TRITON_DTYPES[weight.dtype], TRITON_DTYPES[grad.dtype], TRITON_DTYPES[basis.dtype],
        dot.DOT_DTYPE, dot.PRECISION, dot.ROUNDING, aligned, right,
    )  # fmt: skip
    tiles, counted_on_device = triton.cdiv(n, row.BLOCK_N), rows.steps is not None
    if not tiles:
        return lambda **_: None
    launch, options = functools.partial(_adamw_step_kernel[(tiles, count)], *fixed), vars(row)

    def run(*, lr, beta1, beta2, eps, weight_decay, scale, step, found_inf, device_lr, rounding_seeds) -> None:
        # Subtract and multiply in double: fp32(0.999) subtracted from 1 in fp32 has a relative error of 2e-5.
        if counted_on_device:
            first, second = adam.log(beta1), adam.log(beta2)
        else:
            first, second = 1.0 - beta1**step, 1.0 - beta2**step
        if device_lr is None:
            decay, step_size = 1.0 - lr * weight_decay, lr * scale
        else:
            decay, step_size = weight_decay, scale
        # Pass None for what this launch does not read: a change of its value would compile the kernel anew.
        reads_step = rounding_seeds is not None or rows.exp_avg_scales is not None
        counted = step if reads_step and not counted_on_device else None
        with table.on_device(device):
            launch(
                found_inf, device_lr, rounding_seeds,
                float(beta1), 1.0 - beta1, float(beta2), 1.0 - beta2, first, second, float(eps), float(decay), float(step_size), counted,
                *constexprs, **options,
            )  # fmt: skip

    return run
