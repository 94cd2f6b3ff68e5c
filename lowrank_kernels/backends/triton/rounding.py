"""Stochastic rounding to bf16 on tiles: E[result] = value. It equals reference.round_stochastically bit for
bit.

A bf16 is the upper half of an fp32. Rounding element (i, j) of the stored matrix adds 16 random bits to the
lower half, then drops that half:

    word(i, j) = philox(key = seed, counter = (j // 8, i, ROUNDING, t))[j % 8 // 2]
    the 16 bits are the lower half of the word where j is even, else its upper half
"""

import triton
import triton.language as tl

from ... import philox

ROUNDING = tl.constexpr(philox.ROUNDING)


@triton.jit
def round_stochastically(w, first_m, first_n, seed, t, RIGHT: tl.constexpr):
    """A tile of W' in fp32, (BLOCK_M, BLOCK_N) with its first element at (first_m, first_n) of (m, n) → bf16.

    RIGHT: the stored matrix is the transpose of W'. The tile and its start are multiples of 8 along the
    stored row, so that one Philox call serves 8 neighbours. seed: int64; t: the number of this update, int32.
    Values that are not finite are rounded to nearest.
    """
    BLOCK_M: tl.constexpr = w.shape[0]
    BLOCK_N: tl.constexpr = w.shape[1]
    if RIGHT:
        octet = (first_m // 8 + tl.arange(0, BLOCK_M // 8))[:, None]
        row = (first_n + tl.arange(0, BLOCK_N))[None, :]
    else:
        octet = (first_n // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
        row = (first_m + tl.arange(0, BLOCK_M))[:, None]
    word0, word1, word2, word3 = tl.philox(seed, octet, row, ROUNDING, t)
    # tl.join's new index varies fastest. The order is (…, high bit of the word's number, low bit, half).
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    if RIGHT:
        halves = tl.permute(halves, (0, 2, 3, 4, 1))
    bits = w.to(tl.uint32, bitcast=True)
    rounded = ((bits + tl.reshape(halves, (BLOCK_M, BLOCK_N))) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where((bits & 0x7F800000) != 0x7F800000, rounded, w.to(tl.bfloat16))
