"""W' = (1 − lr·wd)·W' − lr·α·P·N: decay first, one rounding on the store, to nearest or stochastically.

W' is W of shape (m, n) on the left side. On the right side the stored W is (n, m), and W' is Wᵀ. The two
sides differ in strides, and in the direction in which the random bits of a stochastic rounding run.
"""

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import adam, configs, pointers, rounding, table
from .dots import FLOATS, TRITON_DTYPES, dot_of, round_operand


@triton.jit(
    do_not_specialize=["step"],
    do_not_specialize_on_alignment=["weights_at", "bases_at", "steps_at", "found_inf", "device_lr", "seeds"],
)
def _back_project_kernel(
    weights_at, bases_at, steps_at, normalised, found_inf, device_lr, seeds,
    m, n, rank, stride_wm, stride_wn, stride_pm, stride_pr, decay, step_size, step,
    W_DTYPE: tl.constexpr, P_DTYPE: tl.constexpr, RIGHT: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ROUNDING: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    # Programs on the same strip of N are neighbours, so that they read it again from L2.
    matrix = tl.program_id(1).to(tl.int64)
    row_tiles = tl.cdiv(m, BLOCK_M)
    first_m = tl.program_id(0) % row_tiles * BLOCK_M
    first_n = tl.program_id(0) // row_tiles * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_m = offs_m < m
    in_n = offs_n < n
    weight = pointers.matrix_at(weights_at, matrix, W_DTYPE, ALIGNED)
    basis = pointers.matrix_at(bases_at, matrix, P_DTYPE, ALIGNED)
    p_at = basis + offs_m[:, None].to(tl.int64) * stride_pm + offs_k[None, :].to(tl.int64) * stride_pr
    n_at = normalised + matrix * rank * n + offs_k[:, None].to(tl.int64) * n + offs_n[None, :]
    block_k = tl.full((), BLOCK_K, tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, rank, BLOCK_K):
        in_k = offs_k < rank - k
        p = tl.load(p_at, mask=in_m[:, None] & in_k[None, :], other=0.0).to(DOT_DTYPE)
        norm = tl.load(n_at, mask=in_k[:, None] & in_n[None, :], other=0.0).to(P_DTYPE).to(DOT_DTYPE)
        acc = tl.dot(round_operand(p, ROUNDING), round_operand(norm, ROUNDING), acc, input_precision=PRECISION)
        p_at += block_k * stride_pr
        n_at += block_k * n

    w_at = weight + offs_m[:, None].to(tl.int64) * stride_wm + offs_n[None, :].to(tl.int64) * stride_wn
    inside = in_m[:, None] & in_n[None, :]
    w = tl.load(w_at, mask=inside, other=0.0).to(tl.float32)
    decay, step_size = adam.coefficients(device_lr, decay, step_size)
    w = decay * w - step_size * acc
    if seeds is not None:
        t = adam.step_number(steps_at, matrix, step)
        w = rounding.round_stochastically(w, first_m, first_n, tl.load(seeds + matrix), t, RIGHT)
    tl.store(w_at, w.to(W_DTYPE), mask=inside)


def back_project_(
    weights: list[Tensor],
    bases: list[Tensor],
    normalised: Tensor,
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    right: bool,
    found_inf: Tensor | None = None,
    rounding_seeds: Tensor | None = None,
    device_steps: Sequence[Tensor] | None = None,
    device_lr: Tensor | None = None,
) -> None:
    """W' = (1 − lr·wd)·W' − lr·α·P·N in place, for every matrix of a bucket, in one launch.

    weights: B as stored, (m, n), or (n, m) on the right side, with any strides. bases: B of (m, r).
    normalised: (B, r, n) of fp32 or 16 bits, rounded to the bases' dtype for the dot. The dot accumulates in
    fp32; for fp32 bases it runs in tf32 where torch allows it. Where found_inf is non-zero the weights keep
    their bits.

    rounding_seeds: (B,) int64, only for bf16 weights, which are then rounded stochastically. The random bits
    also depend on the number of the update. device_steps, one fp32 element a matrix, are the updates that
    each matrix has had; without them this is the first update.

    Raises ValueError for a list that is not a bucket and for shapes that do not fit.
    """
    check(weights, bases, right, found_inf)
    m, rank = bases[0].shape
    table.check_batch("normalised", normalised, bases, FLOATS, shape=(rank, weights[0].shape[0 if right else 1]))
    table.check_rounding_seeds(rounding_seeds, weights)
    table.check_counts(device_steps, weights)
    table.check_one_float("device_lr", device_lr, weights[0].device)
    rows = table.pointer_table(weights, bases, *([] if device_steps is None else [device_steps]))
    steps_at = None if device_steps is None else rows[2]
    launch = prepare(*rows[:2], weights[0], bases[0], right=right, aligned=table.aligned(weights, bases), steps_at=steps_at)
    options = dict(lr=lr, scale=scale, weight_decay=weight_decay, found_inf=found_inf)
    with table.on_device(normalised.device):
        launch(normalised, **options, device_lr=device_lr, rounding_seeds=rounding_seeds, step=1)


def check(weights: list[Tensor], bases: list[Tensor], right: bool, found_inf: Tensor | None) -> None:
    table.check_bucket("weights", weights, FLOATS)
    table.check_bucket("bases", bases, FLOATS)
    table.check_same_length(weights=weights, bases=bases)
    table.check_same_device(weights=weights, bases=bases)
    table.check_one_float("found_inf", found_inf, weights[0].device)
    table.check_basis_fits("weight", weights[0], bases[0], right)


def prepare(
    weights_at: Tensor, bases_at: Tensor, weight: Tensor, basis: Tensor, *, right: bool, aligned: bool, steps_at: Tensor | None = None
) -> Callable:
    """The launch for one bucket, given its table: launch(normalised, *, lr, scale, weight_decay, found_inf,
    …) on the current device.

    weight and basis stand for the shapes, strides and dtypes of all; only numbers are kept from them. The
    launch takes device_lr, one fp32 on the device, instead of lr. For bf16 weights it also takes
    rounding_seeds, (B,) int64, and then rounds stochastically. The random bits depend on the number of this
    update, which is `step`, or follows from the fp32 counters at steps_at.
    """
    weight = weight.mT if right else weight
    (m, rank), n = basis.shape, weight.shape[1]
    arch = configs.architecture(basis.device)
    dot = dot_of(basis.dtype, basis.dtype, arch)
    config = configs.back_project_config(arch, dot.kind, rank, aligned and table.wide(weight, basis))
    tiles = triton.cdiv(m, config.BLOCK_M) * triton.cdiv(n, config.BLOCK_N)
    if not tiles:
        return lambda *_, **__: None
    kernel, options = _back_project_kernel[(tiles, weights_at.numel())], vars(config)
    numbers = m, n, rank, *weight.stride(), *basis.stride()
    constexprs = (
        TRITON_DTYPES[weight.dtype], TRITON_DTYPES[basis.dtype], right, dot.DOT_DTYPE, dot.PRECISION, dot.ROUNDING, aligned,
    )  # fmt: skip

    def launch(normalised, *, lr, scale, weight_decay, found_inf, device_lr=None, rounding_seeds=None, step=None):
        if device_lr is None:
            coefficients = 1.0 - lr * weight_decay, float(lr * scale)
        else:
            coefficients = float(weight_decay), float(scale)
        # Pass None for what this launch does not read: a change of its value would compile the kernel anew.
        if rounding_seeds is None:
            counters = count = None
        else:
            counters, count = steps_at, None if steps_at is not None else step
        kernel(
            weights_at, bases_at, counters, normalised, found_inf, device_lr, rounding_seeds,
            *numbers, *coefficients, count, *constexprs, **options,
        )  # fmt: skip

    return launch
