"""8-bit moments on tiles. The format is that of lowrank_kernels/storage/eight_bit.py: 64 neighbours along n
share an fp32 scale.

    M:  c = 128 + ⌊127·sign(m)·√(|m|/s) + ½⌋             m = s·sign(c − 128)·((c − 128)/127)²
    V:  c = ⌊255·(v/s)^¼ + ½⌋, 1 at least if v > 0       v = s·(c/255)⁴

A tile is (ROWS, COLS). COLS is a multiple of 64, and the tile's first column is at a multiple of 64 of the
matrix. The tile's scales are (ROWS, COLS // 64). In memory codes are row-major (r, n), scales row-major (r,
⌈n / 64⌉).
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)


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
def encode_v(v, inside):
    """V in fp32 → codes and scales; as encode_m."""
    v = tl.where(inside, v, 0.0)
    scales, share = _scales_and_shares(v)
    codes = (255.0 * tl.sqrt(tl.sqrt(share)) + 0.5).to(tl.int32)
    # A block that is not finite gets codes of 0, whatever its elements are.
    smallest = tl.where((v > 0) & (_spread(scales, v) >= 0), 1, 0)
    return tl.maximum(codes, smallest).to(tl.uint8), scales


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
