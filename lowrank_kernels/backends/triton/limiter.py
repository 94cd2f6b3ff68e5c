"""The factors by which a lift scales columns, with the limiter of lifts/limiter.py in them.

    sⱼ = ‖Nⱼ‖ / ‖Rⱼ‖, or ‖N‖ / ‖R‖;   norm² = Σⱼ sⱼ²·‖Xⱼ‖²;   f = min(1, γ·last / norm) where last > 0
    factors: f·sⱼ;   last = f·norm

X is what the lift scales: the residual G' − P·R, or G'. The squares of columns come from other launches. One
program does a matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...lifts.limiter import GAMMA
from . import choose, pointers


@triton.jit
def _sum_over_tiles(at, tiles, stride, offs, n):
    found = tl.zeros(offs.shape, dtype=tl.float32)
    for _ in range(0, tiles):
        found += tl.load(at + offs, mask=offs < n, other=0.0)
        at += stride
    return found


@triton.jit
def _ratios(of_n, of_r):
    """√(Σ N² / Σ R²), and 0 where R is 0."""
    return tl.where(of_r > 0, tl.sqrt_rn(tl.div_rn(of_n, tl.where(of_r > 0, of_r, 1.0))), 0.0)


@triton.jit
def _ratio_of_columns(sums, rank_tiles, offs, n, of_matrix, WHOLE: tl.constexpr):
    """That of each column, or of the whole matrix for each."""
    if WHOLE:
        return tl.zeros(offs.shape, dtype=tl.float32) + of_matrix
    else:
        of_n = _sum_over_tiles(sums, rank_tiles, 3 * n, offs, n)
        return _ratios(of_n, _sum_over_tiles(sums + n, rank_tiles, 3 * n, offs, n))


@triton.jit(do_not_specialize_on_alignment=["last_at", "found_inf"])
def _limit_kernel(
    column_sums, squares, last_at, factors, found_inf, n, rank_tiles, stride_sb,
    GAMMA: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    matrix = tl.program_id(0).to(tl.int64)
    sums = column_sums + matrix * rank_tiles * 3 * n
    squares += matrix * stride_sb
    offs = tl.arange(0, BLOCK)
    of_matrix = 0.0
    if WHOLE:
        all_n = tl.zeros((BLOCK,), dtype=tl.float32)
        all_r = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, n, BLOCK):
            all_n += _sum_over_tiles(sums, rank_tiles, 3 * n, first + offs, n)
            all_r += _sum_over_tiles(sums + n, rank_tiles, 3 * n, first + offs, n)
        of_matrix = _ratios(tl.sum(all_n), tl.sum(all_r))
    norm = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, n, BLOCK):
        ratio = _ratio_of_columns(sums, rank_tiles, first + offs, n, of_matrix, WHOLE)
        norm += ratio * ratio * tl.load(squares + first + offs, mask=first + offs < n, other=0.0)
    norm = tl.sqrt_rn(tl.sum(norm))
    last = pointers.matrix_at(last_at, matrix, tl.float32)
    most = GAMMA * tl.load(last)
    limited = tl.where((most > 0) & (norm > most), tl.div_rn(most, tl.where(norm > 0, norm, 1.0)), 1.0)
    # All warps must have loaded the norm of before when one of them stores the new one.
    tl.debug_barrier()
    tl.store(last, norm * limited)
    for first in range(0, n, BLOCK):
        ratio = _ratio_of_columns(sums, rank_tiles, first + offs, n, of_matrix, WHOLE)
        tl.store(factors + matrix * n + first + offs, limited * ratio, mask=first + offs < n)


def launch(column_sums: Tensor, squares: Tensor, last_at: Tensor, found_inf: Tensor | None, whole: bool) -> Tensor:
    """f·s of the columns of each matrix, (B, n) in fp32.

    column_sums: (B, tiles, 3, n) of project_moments.launch. squares: (B, n), Σ X² of the columns. last_at:
    addresses of the norms before this step, which the launch brings up to date. whole: one ratio for a
    matrix.
    """
    count, rank_tiles, _, n = column_sums.shape
    factors = torch.empty((count, n), dtype=torch.float32, device=column_sums.device)
    if n:
        _limit_kernel[(count,)](
            column_sums, squares, last_at, factors, found_inf, n, rank_tiles, squares.stride(0),
            GAMMA, whole, **choose.limiter().launch_options(),
        )  # fmt: skip
    return factors
