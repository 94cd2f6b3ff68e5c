"""How a program reads the pointer table (table.py). The table has one row of addresses for each list of the
bucket, and one address for each matrix."""

import triton
import triton.language as tl


@triton.jit
def matrix_at(addresses, matrix, DTYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """A pointer to the first element, of DTYPE, of the matrix with this number. addresses: a row of the
    table, (B,) int64.

    ALIGNED: every address is a multiple of 16 bytes. The hint is attached here, to the operation that makes
    the pointer, because Triton 3.6 forgets a hint on a function's result when it inlines the function.
    """
    at = tl.load(addresses + matrix).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def as_stored(along_m, along_n, RIGHT: tl.constexpr):
    """Values along m and along n, which broadcast to a tile of W as it is stored: (m, n), or (n, m) on the
    right side."""
    if RIGHT:
        return along_m[None, :], along_n[:, None]
    else:
        return along_m[:, None], along_n[None, :]
