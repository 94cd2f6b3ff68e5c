"""W' = (1 − lr·wd)·W' − lr·α·P·N: decay first, one rounding on the store.

W' is W of shape (m, n) on the left side and Wᵀ on the right, where the stored W is (n, m): the two sides differ in strides alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs, table
from .dots import FLOATS, TRITON_DTYPES, dot_of, round_operand


@triton.jit(do_not_specialize_on_alignment=["weights_at", "bases_at"])
def _back_project_kernel(
    weights_at, bases_at, normalised, found_inf,
    m, n, rank, stride_wm, stride_wn, stride_pm, stride_pr, decay, step_size,
    W_DTYPE: tl.constexpr, P_DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ROUNDING: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    # Programs on the same strip of N are neighbours, so that its re-reads hit L2.
    matrix = tl.program_id(1).to(tl.int64)
    row_tiles = tl.cdiv(m, BLOCK_M)
    offs_m = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_m = offs_m < m
    in_n = offs_n < n
    weight = tl.load(weights_at + matrix).to(tl.pointer_type(W_DTYPE))
    basis = tl.load(bases_at + matrix).to(tl.pointer_type(P_DTYPE))
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
        basis = tl.multiple_of(basis, 16)
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
    w = tl.cast(decay, tl.float32) * w - tl.cast(step_size, tl.float32) * acc
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
) -> None:
    """W' = (1 − lr·wd)·W' − lr·α·P·N in place, for every matrix of a bucket, in one launch.

    weights: B as stored, (m, n), or (n, m) on the right side, with any strides. bases: B of (m, r). normalised: (B, r, n) of fp32 or
    16 bits, rounded to the bases' dtype for the dot, which accumulates in fp32 (fp32 bases: in tf32
    where torch allows it). Where found_inf is non-zero the weights keep their bits. Raises ValueError for a list
    that is not a bucket and for shapes that do not fit.
    """
    check(weights, bases, right, found_inf)
    m, rank = bases[0].shape
    table.check_batch("normalised", normalised, bases, FLOATS, shape=(rank, weights[0].shape[0 if right else 1]))
    rows = table.pointer_table(weights, bases)
    launch(*rows, weights, bases, normalised, lr=lr, scale=scale, weight_decay=weight_decay, right=right, found_inf=found_inf)


def check(weights: list[Tensor], bases: list[Tensor], right: bool, found_inf: Tensor | None) -> None:
    table.check_bucket("weights", weights, FLOATS)
    table.check_bucket("bases", bases, FLOATS)
    table.check_same_length(weights=weights, bases=bases)
    table.check_same_device(weights=weights, bases=bases)
    table.check_found_inf(found_inf, weights[0].device)
    if bases[0].shape[0] != weights[0].shape[1 if right else 0]:
        side, shape = ("right", "(n, m)") if right else ("left", "(m, n)")
        raise ValueError(f"a basis (m, r) must fit a {side} weight {shape}, got {tuple(bases[0].shape)} and {tuple(weights[0].shape)}")


def launch(
    weights_at: Tensor,
    bases_at: Tensor,
    weights: list[Tensor],
    bases: list[Tensor],
    normalised: Tensor,
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    right: bool,
    found_inf: Tensor | None,
) -> None:
    """back_project_, given the pointer table and checked buckets."""
    weight, basis = weights[0].mT if right else weights[0], bases[0]
    (m, rank), n = basis.shape, weight.shape[1]
    arch = configs.architecture(basis.device)
    dot = dot_of(basis.dtype, basis.dtype, arch)
    aligned = table.aligned(weights, bases)
    config = configs.back_project_config(arch, dot.kind, rank, aligned and table.wide(weight, basis))
    tiles = triton.cdiv(m, config.BLOCK_M) * triton.cdiv(n, config.BLOCK_N)
    if tiles:
        with table.on_device(basis.device):
            _back_project_kernel[(tiles, len(weights))](
                weights_at, bases_at, normalised, found_inf,
                m, n, rank, *weight.stride(), *basis.stride(), 1.0 - lr * weight_decay, float(lr * scale),
                TRITON_DTYPES[weight.dtype], TRITON_DTYPES[basis.dtype], dot.DOT_DTYPE, dot.PRECISION, dot.ROUNDING, aligned,
                **vars(config),
            )  # fmt: skip
