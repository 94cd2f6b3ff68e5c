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
from . import adam

ROUNDING = tl.constexpr(philox.ROUNDING)


@triton.jit
def round_stochastically(w, first_row, first_column, seed, t):
    """A tile of the stored matrix in fp32, with its first element at (first_row, first_column) → bf16.

    The tile and its start are multiples of 8 along the row, so that one Philox call serves 8 neighbours.
    seed: int64; t: the number of this update, int32. Values that are not finite are rounded to nearest.
    """
    ROWS: tl.constexpr = w.shape[0]
    COLUMNS: tl.constexpr = w.shape[1]
    octet = (first_column // 8 + tl.arange(0, COLUMNS // 8))[None, :]
    row = (first_row + tl.arange(0, ROWS))[:, None]
    word0, word1, word2, word3 = tl.philox(seed, octet, row, ROUNDING, t)
    # tl.join's new index varies fastest. The order is (…, high bit of the word's number, low bit, half).
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    bits = w.to(tl.uint32, bitcast=True)
    rounded = ((bits + tl.reshape(halves, (ROWS, COLUMNS))) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where((bits & 0x7F800000) != 0x7F800000, rounded, w.to(tl.bfloat16))


@triton.jit
def round_weights(w, seeds, steps_at, matrix, first_m, first_n, RIGHT: tl.constexpr):
    """A tile of W as it is stored, in fp32, with its first element at (first_m, first_n) of W'. It is rounded
    stochastically where there are seeds, (B,) int64; else it stays, and the store rounds to nearest."""
    if seeds is not None:
        first_row = first_n if RIGHT else first_m
        first_column = first_m if RIGHT else first_n
        w = round_stochastically(w, first_row, first_column, tl.load(seeds + matrix), adam.step_number(steps_at, matrix))
    return w
