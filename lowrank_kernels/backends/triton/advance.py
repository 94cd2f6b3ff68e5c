"""The moments of a tile, for the kernels that have R on the chip: M and V are brought up to date in memory,
and N comes back.

A tile of R is cut into slices of rows, which are done one after the other, so that only a part of M and V is
in registers beside R. The tile comes as Rᵀ (BLOCK_N, BLOCK_R): cutting it then moves nothing between threads
of wgmma's layout. It may also come from memory, slice by slice.
"""

import triton
import triton.language as tl

from . import adam, eight_bit


@triton.jit
def advance(
    r, projected, first_r, ROWS: tl.constexpr, first_n, BLOCK_N: tl.constexpr,
    exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
    beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t,
):  # fmt: skip
    """N and R, (ROWS, BLOCK_N) in fp32, of rows from first_r and columns from first_n. Rows past the rank are
    zero.

    r: Rᵀ (BLOCK_N, ROWS) in fp32, or None where R is read from `projected`, row-major (rank, n). Moments are
    fp32, or 8-bit codes where there are scales. t: the number of the update, int32, which only codes need.
    """
    offs_r = first_r + tl.arange(0, ROWS)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    in_r = (offs_r < rank)[:, None]
    inside = in_r & (offs_n < n)[None, :]
    offs = offs_r[:, None].to(tl.int64) * n + offs_n[None, :]
    if projected is None:
        r = r.T
    else:
        r = tl.load(projected + offs, mask=inside, other=0.0).to(tl.float32)
    if exp_avg_scale is not None:
        blocks = tl.cdiv(n, eight_bit.BLOCK)
        offs_b = first_n // eight_bit.BLOCK + tl.arange(0, BLOCK_N // eight_bit.BLOCK)
        in_blocks = in_r & (offs_b < blocks)[None, :]
        offs_s = offs_r[:, None].to(tl.int64) * blocks + offs_b[None, :]
        # Codes and scales outside the matrix decode to zero.
        m_scales = tl.load(exp_avg_scale + offs_s, mask=in_blocks, other=0.0)
        v_scales = tl.load(exp_avg_sq_scale + offs_s, mask=in_blocks, other=0.0)
        m_codes = tl.load(exp_avg + offs, mask=inside, other=128, eviction_policy="evict_first")
        v_codes = tl.load(exp_avg_sq + offs, mask=inside, other=0, eviction_policy="evict_first")
        m = eight_bit.decode_m(m_codes, m_scales)
        v = eight_bit.decode_v(v_codes, v_scales)
        m, v = adam.update(m, v, r, beta1, one_minus_beta1, beta2, one_minus_beta2)
        m_codes, m_scales = eight_bit.encode_m(m, inside)
        v_codes, v_scales = eight_bit.encode_v(v, inside, first_r, first_n, t)
        # All warps of a block of 64 must have loaded its scale before one of them stores it.
        tl.debug_barrier()
        tl.store(exp_avg_scale + offs_s, m_scales, mask=in_blocks)
        tl.store(exp_avg_sq_scale + offs_s, v_scales, mask=in_blocks)
        tl.store(exp_avg + offs, m_codes, mask=inside, eviction_policy="evict_first")
        tl.store(exp_avg_sq + offs, v_codes, mask=inside, eviction_policy="evict_first")
    else:
        m = tl.load(exp_avg + offs, mask=inside, other=0.0, eviction_policy="evict_first")
        v = tl.load(exp_avg_sq + offs, mask=inside, other=0.0, eviction_policy="evict_first")
        m, v = adam.update(m, v, r, beta1, one_minus_beta1, beta2, one_minus_beta2)
        tl.store(exp_avg + offs, m, mask=inside, eviction_policy="evict_first")
        tl.store(exp_avg_sq + offs, v, mask=inside, eviction_policy="evict_first")
    norm = adam.normalise(m, v, correction1, correction2, eps)
    # Rows past the rank are 0/ε, which is NaN for ε = 0. NaN times the zeros of P would be NaN.
    return tl.where(in_r, norm, 0.0), r


@triton.jit
def advance_and_keep(
    r, projected, first_r, ROWS: tl.constexpr, SLICES: tl.constexpr, first_n, BLOCK_N: tl.constexpr,
    exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
    beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE: tl.constexpr,
):  # fmt: skip
    """As advance, in slices. N (ROWS, BLOCK_N) in N_DTYPE stays on the chip."""
    if SLICES == 1:
        norm, _ = advance(
            r, projected, first_r, ROWS, first_n, BLOCK_N, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t,
        )  # fmt: skip
        return norm.to(N_DTYPE)
    else:
        left = None
        right = None
        if r is not None:
            left, right = _halves(r)
        upper = advance_and_keep(
            left, projected, first_r, ROWS // 2, SLICES // 2, first_n, BLOCK_N,
            exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE,
        )  # fmt: skip
        lower = advance_and_keep(
            right, projected, first_r + ROWS // 2, ROWS // 2, SLICES // 2, first_n, BLOCK_N,
            exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t, N_DTYPE,
        )  # fmt: skip
        return tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 1)), (ROWS, BLOCK_N))


@triton.jit
def advance_and_store(
    r, normalised, projected, first_r, ROWS: tl.constexpr, SLICES: tl.constexpr, first_n, BLOCK_N: tl.constexpr,
    exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
    beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t,
):  # fmt: skip
    """As advance, in slices. N and R go to `normalised` and `projected`, row-major (rank, n), where these are
    not None. Returns Σ N² and Σ R² over the rows of the tile, (BLOCK_N,) each; the compiler leaves out what
    is not used."""
    if SLICES == 1:
        norm, r = advance(
            r, None, first_r, ROWS, first_n, BLOCK_N, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t,
        )  # fmt: skip
        offs_r = first_r + tl.arange(0, ROWS)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        inside = (offs_r < rank)[:, None] & (offs_n < n)[None, :]
        offs = offs_r[:, None].to(tl.int64) * n + offs_n[None, :]
        if normalised is not None:
            tl.store(normalised + offs, norm.to(normalised.dtype.element_ty), mask=inside)
        if projected is not None:
            tl.store(projected + offs, r.to(projected.dtype.element_ty), mask=inside)
        return tl.sum(norm * norm, axis=0), tl.sum(r * r, axis=0)
    else:
        left, right = _halves(r)
        upper_n, upper_r = advance_and_store(
            left, normalised, projected, first_r, ROWS // 2, SLICES // 2, first_n, BLOCK_N,
            exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t,
        )  # fmt: skip
        lower_n, lower_r = advance_and_store(
            right, normalised, projected, first_r + ROWS // 2, ROWS // 2, SLICES // 2, first_n, BLOCK_N,
            exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rank, n,
            beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, t,
        )  # fmt: skip
        return upper_n + lower_n, upper_r + lower_r


@triton.jit
def _halves(r):
    """Rᵀ (A, 2B) → its left and right half, (A, B) each."""
    return tl.split(tl.permute(tl.reshape(r, (r.shape[0], 2, r.shape[1] // 2)), (0, 2, 1)))
