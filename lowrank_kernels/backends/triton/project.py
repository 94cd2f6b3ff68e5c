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
