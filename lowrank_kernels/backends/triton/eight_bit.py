"""8-bit moments on tiles. The format is that of lowrank_kernels/storage/eight_bit.py: 64 neighbours along n
share an fp32 scale.

    M:  c = 128 + ⌊127·sign(m)·√(|m|/s) + ½⌋             m = s·sign(c − 128)·((c − 128)/127)²
    V:  c = b + [255⁴·v/s > b⁴ + u·((b + 1)⁴ − b⁴)],     v = s·(c/255)⁴
        b = ⌊255·(v/s)^¼⌋, and 1 at least if v > 0

u is a function of the row, the column and the number of the update.

A tile is (ROWS, COLS). COLS is a multiple of 64, and the tile's first column is at a multiple of 64 of the
matrix. The tile's scales are (ROWS, COLS // 64). In memory codes are row-major (r, n), scales row-major (r,
⌈n / 64⌉).
"""

import triton
import triton.language as tl

from ...storage import eight_bit

BLOCK = tl.constexpr(64)
UNITS = tl.constexpr(eight_bit.UNITS)
ROW, COLUMN, STEP = tl.constexpr(eight_bit.ROW), tl.constexpr(eight_bit.COLUMN), tl.constexpr(eight_bit.STEP)
SLACK = tl.constexpr(eight_bit.SLACK)


@triton.jit
def decode_m(codes, scales):
    """M in fp32 from uint8 codes (ROWS, COLS) and fp32 scales (ROWS, COLS // 64)."""
    root = (codes.to(tl.float32) - 128.0) * (1.0 / 127)
    return root * tl.abs(root) * _spread(scales, codes)


@triton.jit
def decode_v(codes, scales):
    """V in fp32, as decode_m."""
    square = codes.to(tl.float32) * (1.0 / 255)
    square *= square
    return square * square * _spread(scales, codes)


@triton.jit
def encode_m(m, inside):
    """M in fp32 → uint8 codes (ROWS, COLS) and fp32 scales (ROWS, COLS // 64).

    inside: which elements exist, as (ROWS, COLS) or a shape that broadcasts to it. The scales ignore all
    other elements.
    """
    m = tl.where(inside, m, 0.0)
    scales, share = _scales_and_shares(m)
    root = 127.0 * tl.sqrt(share)
    # A cast to an integer truncates, which is the floor of a positive number.
    return tl.where(m < 0, 128.5 - root, 128.5 + root).to(tl.int32).to(tl.uint8), scales


@triton.jit
def encode_v(v, inside, first_row, first_column, t):
    """V in fp32 → codes and scales; as encode_m.

    first_row, first_column: where the tile lies in the matrix, int32. t: the number of this update, int32.
    """
    v = tl.where(inside, v, 0.0)
    scales, share = _scales_and_shares(v)
    fourth = share * 4228250625.0  # 255⁴
    codes = (tl.sqrt(tl.sqrt(fourth)) * (1.0 + SLACK / 4)).to(tl.int32)
    below = codes.to(tl.float32)
    square = below * below
    exact = square * square
    distance = ((4.0 * below + 6.0) * below + 4.0) * below + 1.0  # (b + 1)⁴ − b⁴
    threshold = tl.maximum(exact + _fractions(v, first_row, first_column, t) * distance, exact * (1.0 + SLACK))
    codes += tl.where(fourth > threshold, 1, 0)
    # A block that is not finite gets codes of 0, whatever its elements are.
    smallest = tl.where((v > 0) & (_spread(scales, v) >= 0), 1, 0)
    return tl.maximum(codes, smallest).to(tl.uint8), scales


@triton.jit
def _fractions(like, first_row, first_column, t):
    """u of each element of a tile. Products and sums wrap at 2³², of which UNITS is a divisor."""
    rows = (tl.arange(0, like.shape[0]) + first_row).to(tl.uint32)
    columns = (tl.arange(0, like.shape[1]) + first_column).to(tl.uint32)
    of_rows = tl.add(
        tl.mul(rows, ROW, sanitize_overflow=False), tl.mul(t.to(tl.uint32), STEP, sanitize_overflow=False), sanitize_overflow=False
    )
    of_columns = tl.mul(columns, COLUMN, sanitize_overflow=False)
    units = tl.add(of_rows[:, None], of_columns[None, :], sanitize_overflow=False) & (UNITS - 1)
    # With the exponent of 1 these bits are 1 + u. That is cheaper than a conversion.
    return (units | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _scales_and_shares(x):
    """Each block's scale, and |x| / s in [0, 1 + 2u]. The share is 0 where s is 0 or NaN."""
    # Read as integers, the bits of |x| sort like the numbers, with infinity and NaN on top.
    order = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(tl.reshape(order, (x.shape[0], x.shape[1] // BLOCK, BLOCK)), axis=2)
    usable = (peak >= 0x00800000) & (peak < 0x7F800000)
    size = tl.where(usable, peak, 0x3F800000).to(tl.float32, bitcast=True)
    scales = tl.where(usable, size, tl.where(peak < 0x00800000, 0.0, float("nan")))
    share = tl.abs(x) * _spread(tl.where(usable, 1.0 / size, 0.0), x)
    return scales, tl.where(share == share, share, 0.0)


@triton.jit
def _spread(scales, like):
    """Each element's block scale: (ROWS, COLS // 64) → (ROWS, COLS)."""
    wide = tl.broadcast_to(scales[:, :, None], (like.shape[0], like.shape[1] // BLOCK, BLOCK))
    return tl.reshape(wide, (like.shape[0], like.shape[1]))
