"""What a program makes of the pointer table (table.py): one row of addresses a list of the bucket, one
address a matrix."""

import triton
import triton.language as tl


@triton.jit
def matrix_at(addresses, matrix, DTYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """A pointer to the first element, of DTYPE, of the matrix with this number. addresses: a row of the
    table, (B,) int64.

    ALIGNED: every address is a multiple of 16 bytes, which is said here, of the pointer's own operation:
    Triton 3.6 forgets what is said of a function's result when it inlines the function.
    """
    at = tl.load(addresses + matrix).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at
