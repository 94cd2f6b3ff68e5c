"""R = PᵀG', accumulated in fp32.

G' is G of shape (m, n) on the left side. On the right side the stored G is (n, m), and G' is Gᵀ. The two
sides differ only in strides.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, pointers, table
from .dots import FLOATS, TRITON_DTYPES, dot_of, round_operand


@triton.jit(do_not_specialize_on_alignment=["bases_at", "grads_at"])
def _project_kernel(
    bases_at, grads_at, projected,
    m, n, rank, stride_pm, stride_pr, stride_gm, stride_gn,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ROUNDING: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs on the same strip of G are neighbours, so that they read it again from L2.
    matrix = tl.program_id(1).to(tl.int64)
    rank_tiles = tl.cdiv(rank, BLOCK_R)
    offs_r = tl.program_id(0) % rank_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tl.program_id(0) // rank_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_r = offs_r < rank
    in_n = offs_n < n
    basis = pointers.matrix_at(bases_at, matrix, P_DTYPE, ALIGNED)
    grad = pointers.matrix_at(grads_at, matrix, G_DTYPE, ALIGNED)
    p_at = basis + offs_k[:, None].to(tl.int64) * stride_pm + offs_r[None, :].to(tl.int64) * stride_pr
    g_at = grad + offs_k[:, None].to(tl.int64) * stride_gm + offs_n[None, :].to(tl.int64) * stride_gn
    block_k = tl.full((), BLOCK_K, tl.int64)

    # The tile is accumulated as Rᵀ, so that n is the long side of the dot. wgmma wants that side to be at
    # least 64, whatever the rank.
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for k in range(0, m, BLOCK_K):
        in_k = offs_k < m - k
        p = tl.load(p_at, mask=in_k[:, None] & in_r[None, :], other=0.0).to(DOT_DTYPE)
        g = tl.load(g_at, mask=in_k[:, None] & in_n[None, :], other=0.0).to(DOT_DTYPE)
        acc = tl.dot(round_operand(g, ROUNDING).T, round_operand(p, ROUNDING), acc, input_precision=PRECISION)
        p_at += block_k * stride_pm
        g_at += block_k * stride_gm

    r_at = projected + matrix * rank * n + offs_r[:, None].to(tl.int64) * n + offs_n[None, :]
    tl.store(r_at, acc.T, mask=in_r[:, None] & in_n[None, :])


def project(bases: list[Tensor], grads: list[Tensor], right: bool) -> Tensor:
    """R = PᵀG' for every matrix of a bucket, in one launch: B bases (m, r), B gradients as stored → (B, r, n)
    fp32.

    Gradients are (m, n), or (n, m) on the right side, with any strides. A gradient and a basis of the same
    16-bit dtype are multiplied in it. All others are multiplied in fp32 (tf32 where torch allows it). The sum
    over m is fp32. Raises ValueError for a list that is not a bucket and for shapes that do not fit.
    """
    check(bases, grads, right)
    rank, n = bases[0].shape[1], grads[0].shape[0 if right else 1]
    projected = torch.empty((len(bases), rank, n), dtype=torch.float32, device=bases[0].device)
    launch = prepare(*table.pointer_table(bases, grads), bases[0], grads[0], right=right, aligned=table.aligned(bases, grads))
    with table.on_device(projected.device):
        launch(projected)
    return projected


def check(bases: list[Tensor], grads: list[Tensor], right: bool) -> None:
    table.check_bucket("bases", bases, FLOATS)
    table.check_bucket("grads", grads, FLOATS)
    table.check_same_length(bases=bases, grads=grads)
    table.check_same_device(bases=bases, grads=grads)
    table.check_basis_fits("gradient", grads[0], bases[0], right)


def prepare(bases_at: Tensor, grads_at: Tensor, basis: Tensor, grad: Tensor, *, right: bool, aligned: bool) -> Callable[[Tensor], None]:
    """The launch for one bucket, given its table: launch(projected) on the current device.

    basis and grad stand for the shapes, strides and dtypes of all; only numbers are kept from them.
    """
    grad = grad.mT if right else grad
    (m, rank), n = basis.shape, grad.shape[1]
    arch = configs.architecture(basis.device)
    dot = dot_of(basis.dtype, grad.dtype, arch)
    config = configs.project_config(arch, dot.kind, rank, aligned and table.wide(basis, grad))
    tiles = triton.cdiv(rank, config.BLOCK_R) * triton.cdiv(n, config.BLOCK_N)
    if not tiles:
        return lambda projected: None
    kernel, options = _project_kernel[(tiles, bases_at.numel())], vars(config)
    numbers = m, n, rank, *basis.stride(), *grad.stride()
    constexprs = TRITON_DTYPES[basis.dtype], TRITON_DTYPES[grad.dtype], dot.DOT_DTYPE, dot.PRECISION, dot.ROUNDING, aligned

    def launch(projected: Tensor) -> None:
        kernel(bases_at, grads_at, projected, *numbers, *constexprs, **options)

    return launch
