"""What a program makes of the pointer table (table.py): one row of addresses a list of the bucket, one address a matrix."""

import triton
import triton.language as tl


@triton.jit
def matrix_at(addresses, matrix, DTYPE: tl.constexpr):
    """A pointer to the first element, of DTYPE, of the matrix with this number. addresses: a row of the table, (B,) int64."""
    return tl.load(addresses + matrix).to(tl.pointer_type(DTYPE))
