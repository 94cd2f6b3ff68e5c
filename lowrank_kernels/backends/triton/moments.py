"""M = β1·M + (1−β1)·R; V = β2·V + (1−β2)·R²; N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε).

Elementwise on (r, n) in fp32. ε stands outside the corrected root, as in torch.optim.AdamW. M and V are
stored in fp32, or as 8-bit codes with a scale for each 64 neighbours along n (eight_bit.py). N is computed
from the new moments before they are encoded again.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..bucket import Bucket, Hyper
from . import adam, choose, eight_bit, pointers, table
from .dots import TRITON_DTYPES


@triton.jit(
    do_not_specialize_on_alignment=[
        "exp_avgs_at", "exp_avg_sqs_at", "exp_avg_scales_at", "exp_avg_sq_scales_at", "steps_at", "projected_at", "found_inf",
    ]
)  # fmt: skip
def _update_moments_kernel(
    exp_avgs_at, exp_avg_sqs_at, exp_avg_scales_at, exp_avg_sq_scales_at, steps_at, projected_at, normalised, found_inf,
    rows, columns, beta1, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps,
    R_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
    r = tl.load(pointers.matrix_at(projected_at, matrix, R_DTYPE, ALIGNED) + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=inside, other=128 if EIGHT_BIT else 0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0)
    if EIGHT_BIT:
        blocks = tl.cdiv(columns, eight_bit.BLOCK)
        block = tl.program_id(0) % column_tiles * (COLUMNS // eight_bit.BLOCK) + tl.arange(0, COLUMNS // eight_bit.BLOCK)[None, :]
        block_inside = (row < rows) & (block < blocks)
        m_scales_at = pointers.matrix_at(exp_avg_scales_at, matrix, tl.float32) + (row.to(tl.int64) * blocks + block)
        v_scales_at = pointers.matrix_at(exp_avg_sq_scales_at, matrix, tl.float32) + (row.to(tl.int64) * blocks + block)
        m = eight_bit.decode_m(m, tl.load(m_scales_at, mask=block_inside, other=0.0))
        v = eight_bit.decode_v(v, tl.load(v_scales_at, mask=block_inside, other=0.0))

    m, v = adam.update(m, v, r, beta1, one_minus_beta1, beta2, one_minus_beta2)
    correction1, correction2 = adam.bias_corrections(steps_at, matrix, log_beta1, log_beta2)
    if EIGHT_BIT:
        t = adam.step_number(steps_at, matrix)
    norm = adam.normalise(m, v, correction1, correction2, eps)
    tl.store(normalised + matrix * rows * columns + at, norm.to(normalised.dtype.element_ty), mask=inside)
    if EIGHT_BIT:
        m, m_scales = eight_bit.encode_m(m, inside)
        v, v_scales = eight_bit.encode_v(v, inside, first_row, first_column, t)
        # All warps of a block of 64 must have loaded its scale before one of them overwrites it.
        tl.debug_barrier()
        tl.store(m_scales_at, m_scales, mask=block_inside)
        tl.store(v_scales_at, v_scales, mask=block_inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)


def launch(bucket: Bucket, hyper: Hyper, rows: table.Rows, normalised: Tensor) -> None:
    """Updates M and V of a bucket in place, and writes N, in one launch.

    bucket.projected: R. normalised: (B, r, n) or more, row-major, of fp32 or 16 bits. Where found_inf is
    non-zero nothing is written, so M and V keep their bits and N is undefined.
    """
    _, n, rank = bucket.extents
    config = choose.moments(rows.exp_avg_scales is not None)
    # fp32 moments have no blocks of neighbours: one row.
    height, width = (1, rank * n) if rows.exp_avg_scales is None else (rank, n)
    tiles = triton.cdiv(height, config.ROWS) * triton.cdiv(width, config.COLUMNS)
    if tiles:
        _update_moments_kernel[(tiles, len(bucket))](
            rows.exp_avgs, rows.exp_avg_sqs, rows.exp_avg_scales, rows.exp_avg_sq_scales, rows.steps, rows.projected, normalised,
            bucket.found_inf, height, width, *adam.moment_scalars(hyper),
            TRITON_DTYPES[bucket.projected[0].dtype], rows.aligned, **config.launch_options(),
        )  # fmt: skip
