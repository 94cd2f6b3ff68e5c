"""R = PᵀG', accumulated in fp32.

G' is G of shape (m, n) on the left side. On the right side the stored G is (n, m), and G' is Gᵀ. The two
sides differ only in strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bucket import Bucket
from . import choose, pointers, table
from .dots import TRITON_DTYPES, dot_of, round_operand


@triton.jit
def sum_over_m(
    grad, basis, offs_n, offs_r, m, n, rank, stride_gm, stride_gn, stride_pm, stride_pr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ROUNDING: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    P_POLICY: tl.constexpr, G_POLICY: tl.constexpr, OF_GRAD: tl.constexpr,
):  # fmt: skip
    """Rᵀ of a tile, (BLOCK_N, BLOCK_R) in fp32, and with OF_GRAD the squares of its columns of G', Σ G'².

    The tile is accumulated as Rᵀ, so that n is the long side of the dot. wgmma wants that side to be at least
    64, whatever the rank. P_POLICY, G_POLICY: what the caches should do with P and G.
    """
    offs_k = tl.arange(0, BLOCK_K)
    in_r = (offs_r < rank)[None, :]
    in_n = (offs_n < n)[None, :]
    p_at = basis + offs_k[:, None].to(tl.int64) * stride_pm + offs_r[None, :].to(tl.int64) * stride_pr
    g_at = grad + offs_k[:, None].to(tl.int64) * stride_gm + offs_n[None, :].to(tl.int64) * stride_gn
    block_k = tl.full((), BLOCK_K, tl.int64)
    r = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    of_grad = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in range(0, m, BLOCK_K):
        in_k = (offs_k < m - k)[:, None]
        p = tl.load(p_at, mask=in_k & in_r, other=0.0, eviction_policy=P_POLICY).to(DOT_DTYPE)
        g = tl.load(g_at, mask=in_k & in_n, other=0.0, eviction_policy=G_POLICY).to(DOT_DTYPE)
        if OF_GRAD:
            of_grad += tl.sum(g.to(tl.float32) * g.to(tl.float32), axis=0)
        r = tl.dot(round_operand(g, ROUNDING).T, round_operand(p, ROUNDING), r, input_precision=PRECISION)
        p_at += block_k * stride_pm
        g_at += block_k * stride_gm
    return r, of_grad


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
    basis = pointers.matrix_at(bases_at, matrix, P_DTYPE, ALIGNED)
    grad = pointers.matrix_at(grads_at, matrix, G_DTYPE, ALIGNED)
    r, _ = sum_over_m(
        grad, basis, offs_n, offs_r, m, n, rank, stride_gm, stride_gn, stride_pm, stride_pr,
        DOT_DTYPE, PRECISION, ROUNDING, BLOCK_R, BLOCK_N, BLOCK_K, "", "", False,
    )  # fmt: skip
    r_at = projected + matrix * rank * n + offs_r[:, None].to(tl.int64) * n + offs_n[None, :]
    tl.store(r_at, r.T, mask=(offs_r < rank)[:, None] & (offs_n < n)[None, :])


def launch(bucket: Bucket, rows: table.Rows) -> Tensor:
    """R = PᵀG' for every matrix of a bucket, in one launch: (B, r, n) fp32.

    Gradients have any strides. A gradient and a basis of the same 16-bit dtype are multiplied in it. All
    others are multiplied in fp32 (tf32 where torch allows it). The sum over m is fp32.
    """
    m, n, rank = bucket.extents
    basis = bucket.bases[0]
    grad = bucket.grads[0].mT if bucket.right else bucket.grads[0]
    projected = torch.empty((len(bucket), rank, n), dtype=torch.float32, device=basis.device)
    arch = choose.architecture(basis.device)
    dot = dot_of(basis.dtype, grad.dtype, arch)
    config = choose.project(arch, dot.kind, rank, rows.aligned and table.wide(basis, grad) and n % 16 == 0)
    tiles = triton.cdiv(rank, config.BLOCK_R) * triton.cdiv(n, config.BLOCK_N)
    if tiles:
        _project_kernel[(tiles, len(bucket))](
            rows.bases, rows.grads, projected, m, n, rank, *basis.stride(), *grad.stride(),
            TRITON_DTYPES[basis.dtype], TRITON_DTYPES[grad.dtype], dot.DOT_DTYPE, dot.PRECISION, dot.ROUNDING, rows.aligned,
            **config.launch_options(),
        )  # fmt: skip
    return projected
