"""W' = (1 − lr·wd)·W' − lr·α·P·N: decay first, one rounding on the store, to nearest or stochastically.

W' is W of shape (m, n) on the left side. On the right side the stored W is (n, m), and W' is Wᵀ. A program
owns a tile of W as it is stored, and asks for it before it sums over the directions, so that memory is busy
meanwhile.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..bucket import Bucket, Hyper
from . import adam, choose, configs, pointers, rounding, table
from .dots import TRITON_DTYPES, dot_of, round_operand


@triton.jit(
    do_not_specialize_on_alignment=["weights_at", "bases_at", "steps_at", "found_inf", "device_lr", "rounding_seeds"],
)
def _back_project_kernel(
    weights_at, bases_at, steps_at, normalised, found_inf, device_lr, rounding_seeds,
    m, n, rank, stride_wm, stride_wn, stride_pm, stride_pr, decay, step_size,
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
    weight = pointers.matrix_at(weights_at, matrix, W_DTYPE, ALIGNED)
    basis = pointers.matrix_at(bases_at, matrix, P_DTYPE, ALIGNED)
    at_m, at_n = pointers.as_stored(offs_m, offs_n, RIGHT)
    w_at = weight + at_m.to(tl.int64) * stride_wm + at_n.to(tl.int64) * stride_wn
    inside = (at_m < m) & (at_n < n)
    w = tl.load(w_at, mask=inside, other=0.0, eviction_policy="evict_first")

    in_m = (offs_m < m)[:, None]
    in_n = (offs_n < n)[None, :]
    p_at = basis + offs_m[:, None].to(tl.int64) * stride_pm + offs_k[None, :].to(tl.int64) * stride_pr
    n_at = normalised + matrix * rank * n + offs_k[:, None].to(tl.int64) * n + offs_n[None, :]
    block_k = tl.full((), BLOCK_K, tl.int64)
    moved = tl.zeros((BLOCK_N, BLOCK_M) if RIGHT else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, rank, BLOCK_K):
        in_k = offs_k < rank - k
        p = tl.load(p_at, mask=in_m & in_k[None, :], other=0.0).to(DOT_DTYPE)
        norm = tl.load(n_at, mask=in_k[:, None] & in_n, other=0.0).to(DOT_DTYPE)
        p = round_operand(p, ROUNDING)
        norm = round_operand(norm, ROUNDING)
        if RIGHT:
            moved = tl.dot(norm.T, p.T, moved, input_precision=PRECISION)
        else:
            moved = tl.dot(p, norm, moved, input_precision=PRECISION)
        p_at += block_k * stride_pr
        n_at += block_k * n

    decay, step_size = adam.coefficients(device_lr, decay, step_size)
    new = decay * w.to(tl.float32) - step_size * moved
    new = rounding.round_weights(new, rounding_seeds, steps_at, matrix, first_m, first_n, RIGHT)
    tl.store(w_at, new.to(W_DTYPE), mask=inside, eviction_policy="evict_first")


def launch(bucket: Bucket, hyper: Hyper, rows: table.Rows, normalised: Tensor, config: configs.BackProjectConfig | None = None) -> None:
    """Moves the weights of a bucket by N, in one launch. normalised: (B, r, n) or more, row-major, in the
    dtype of the bases. config: None takes the built-in row."""
    basis = bucket.bases[0]
    weight = bucket.weights[0].mT if bucket.right else bucket.weights[0]
    m, n, rank = bucket.extents
    arch = choose.architecture(basis.device)
    dot = dot_of(basis.dtype, basis.dtype, arch)
    wide = rows.aligned and table.wide(weight, basis) and n % 16 == 0
    config = config or choose.back_project(arch, dot.kind, rank, wide)
    tiles = triton.cdiv(m, config.BLOCK_M) * triton.cdiv(n, config.BLOCK_N)
    if tiles:
        device_lr, decay, step_size = adam.rates(hyper)
        _back_project_kernel[(tiles, len(bucket))](
            rows.weights, rows.bases, None if bucket.rounding_seeds is None else rows.steps, normalised,
            bucket.found_inf, device_lr, bucket.rounding_seeds,
            m, n, rank, *weight.stride(), *basis.stride(), decay, step_size,
            TRITON_DTYPES[weight.dtype], TRITON_DTYPES[basis.dtype], bucket.right, dot.DOT_DTYPE, dot.PRECISION, dot.ROUNDING,
            rows.aligned, **config.launch_options(),
        )  # fmt: skip
