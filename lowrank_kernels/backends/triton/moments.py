"""M = β1·M + (1−β1)·R; V = β2·V + (1−β2)·R²; N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε).

Elementwise on (r, n) in fp32. ε stands outside the corrected root, as in torch.optim.AdamW. M and V are
stored in fp32, or as 8-bit codes with a scale for each 64 neighbours along n (eight_bit.py). N is computed
from the new moments before they are encoded again.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adam, configs, eight_bit, pointers, table
from .dots import FLOATS


# `step` is not specialised: specialising it compiles a kernel for 1, one for multiples of 16 and one for the
# rest.
@triton.jit(
    do_not_specialize=["step"],
    do_not_specialize_on_alignment=[
        "exp_avgs_at", "exp_avg_sqs_at", "exp_avg_scales_at", "exp_avg_sq_scales_at", "steps_at", "found_inf",
    ],
)  # fmt: skip
def _update_moments_kernel(
    exp_avgs_at, exp_avg_sqs_at, exp_avg_scales_at, exp_avg_sq_scales_at, steps_at, projected, normalised, found_inf,
    rows, columns, beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, step,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    EIGHT_BIT: tl.constexpr = exp_avg_scales_at is not None
    STATE: tl.constexpr = tl.uint8 if EIGHT_BIT else tl.float32
    matrix = tl.program_id(1).to(tl.int64)
    exp_avg = pointers.matrix_at(exp_avgs_at, matrix, STATE, ALIGNED)
    exp_avg_sq = pointers.matrix_at(exp_avg_sqs_at, matrix, STATE, ALIGNED)
    column_tiles = tl.cdiv(columns, COLUMNS)
    first_row, first_column = tl.program_id(0) // column_tiles * ROWS, tl.program_id(0) % column_tiles * COLUMNS
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    at = row.to(tl.int64) * columns + column
    batch_at = matrix * rows * columns + at
    r = tl.load(projected + batch_at, mask=inside, other=0.0)
    m = tl.load(exp_avg + at, mask=inside, other=128 if EIGHT_BIT else 0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0)
    if EIGHT_BIT:
        blocks = tl.cdiv(columns, eight_bit.BLOCK)
        block = first_column // eight_bit.BLOCK + tl.arange(0, COLUMNS // eight_bit.BLOCK)[None, :]
        block_inside = (row < rows) & (block < blocks)
        m_scales_at = pointers.matrix_at(exp_avg_scales_at, matrix, tl.float32) + (row.to(tl.int64) * blocks + block)
        v_scales_at = pointers.matrix_at(exp_avg_sq_scales_at, matrix, tl.float32) + (row.to(tl.int64) * blocks + block)
        m = eight_bit.decode_m(m, tl.load(m_scales_at, mask=block_inside, other=0.0))
        v = eight_bit.decode_v(v, tl.load(v_scales_at, mask=block_inside, other=0.0))

    m, v = adam.update(m, v, r, beta1, one_minus_beta1, beta2, one_minus_beta2)
    correction1, correction2 = adam.bias_corrections(steps_at, matrix, correction1, correction2)
    if EIGHT_BIT:
        t = adam.step_number(steps_at, matrix, step)
    norm = adam.normalise(m, v, correction1, correction2, eps)
    tl.store(normalised + batch_at, norm.to(normalised.dtype.element_ty), mask=inside)
    if EIGHT_BIT:
        m, m_scales = eight_bit.encode_m(m, inside)
        v, v_scales = eight_bit.encode_v(v, inside, first_row, first_column, t)
        # All warps of a block of 64 must have loaded its scale before one of them overwrites it.
        tl.debug_barrier()
        tl.store(m_scales_at, m_scales, mask=block_inside)
        tl.store(v_scales_at, v_scales, mask=block_inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)


def update_moments_(
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    projected: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    found_inf: Tensor | None = None,
    device_steps: Sequence[Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Updates M and V in place and returns N, for every matrix of a bucket, in one launch.

    exp_avgs, exp_avg_sqs: B row-major (r, n) fp32. projected: (B, r, n) fp32, R on entry. out: where N goes,
    (B, r, n) of fp32, bf16 or fp16. By default N overwrites R in `projected`. `step` is t, counted from 1.
    device_steps, if given, hold t − 1 instead, one fp32 element a matrix. Where found_inf is non-zero nothing
    is written, so M and V keep their bits and N is undefined. Raises ValueError for a list that is not a
    bucket and for shapes that do not fit.
    """
    check(exp_avgs, exp_avg_sqs, projected, step, found_inf, device_steps, out)
    out = projected if out is None else out
    rows = table.pointer_table(exp_avgs, exp_avg_sqs, *([] if device_steps is None else [device_steps]))
    launch = prepare(
        *rows[:2], exp_avgs[0], aligned=table.aligned(exp_avgs, exp_avg_sqs), steps_at=None if device_steps is None else rows[2]
    )
    with table.on_device(projected.device):
        launch(projected, out, beta1=beta1, beta2=beta2, eps=eps, step=step, found_inf=found_inf)
    return out


def check(
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    projected: Tensor,
    step: int,
    found_inf: Tensor | None,
    device_steps: Sequence[Tensor] | None,
    out: Tensor | None,
) -> None:
    table.check_bucket("exp_avgs", exp_avgs, (torch.float32,), row_major=True)
    table.check_bucket("exp_avg_sqs", exp_avg_sqs, (torch.float32,), row_major=True)
    table.check_same_length(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    table.check_same_device(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    table.check_one_float("found_inf", found_inf, exp_avgs[0].device)
    if exp_avgs[0].shape != exp_avg_sqs[0].shape:
        raise ValueError(f"exp_avgs and exp_avg_sqs must share a shape, got {tuple(exp_avgs[0].shape)} and {tuple(exp_avg_sqs[0].shape)}")
    table.check_counts(device_steps, exp_avgs)
    if device_steps is None and step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    table.check_batch("projected", projected, exp_avgs, (torch.float32,))
    if out is not None:
        table.check_batch("out", out, exp_avgs, FLOATS)


def prepare(
    exp_avgs_at: Tensor,
    exp_avg_sqs_at: Tensor,
    exp_avg: Tensor,
    *,
    aligned: bool,
    exp_avg_scales_at: Tensor | None = None,
    exp_avg_sq_scales_at: Tensor | None = None,
    steps_at: Tensor | None = None,
) -> Callable:
    """The launch for one bucket: launch(projected, normalised, *, beta1, beta2, eps, step, found_inf), on the
    current device.

    exp_avg stands for the shape of all; only numbers are kept from it. With scales, the moments are 8-bit
    codes. steps_at: addresses of fp32 counters, used instead of `step`.
    """
    rows, columns = exp_avg.shape
    config = configs.MOMENTS if exp_avg_scales_at is None else configs.MOMENTS_8BIT
    if exp_avg_scales_at is None:  # fp32 moments have no blocks of neighbours: one row
        rows, columns = 1, rows * columns
    tiles = triton.cdiv(rows, config.ROWS) * triton.cdiv(columns, config.COLUMNS)
    if not tiles:
        return lambda *_, **__: None
    kernel, options = _update_moments_kernel[(tiles, exp_avgs_at.numel())], vars(config)

    def launch(projected, normalised, *, beta1, beta2, eps, step, found_inf):
        # Subtract in double: fp32(0.999) subtracted from 1 in fp32 has a relative error of 2e-5.
        if steps_at is None:
            corrections = 1.0 - beta1**step, 1.0 - beta2**step
        else:
            corrections = adam.log(beta1), adam.log(beta2)
        # Pass None for what this launch does not read: a change of its value would compile the kernel anew.
        counted = step if exp_avg_scales_at is not None and steps_at is None else None
        kernel(
            exp_avgs_at, exp_avg_sqs_at, exp_avg_scales_at, exp_avg_sq_scales_at, steps_at, projected, normalised, found_inf,
            rows, columns, float(beta1), 1.0 - beta1, float(beta2), 1.0 - beta2, *corrections, float(eps), counted,
            aligned, **options,
        )  # fmt: skip

    return launch
