"""Stochastic rounding on tiles: the draws are the reference's, bit for bit, whatever the tile."""

import pytest
import torch
import triton
import triton.language as tl
from buckets import DEVICE, bits, same_bits

from lowrank_kernels import philox
from lowrank_kernels.backends import reference
from lowrank_kernels.backends.triton import rounding

pytestmark = pytest.mark.gpu


@triton.jit(do_not_specialize=["t"])
def _round_kernel(values, rounded, seed, t, rows, columns, stride_r, stride_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first_row, first_column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    row, column = first_row + tl.arange(0, ROWS)[:, None], first_column + tl.arange(0, COLUMNS)[None, :]
    at, inside = row * stride_r + column * stride_c, (row < rows) & (column < columns)
    w = tl.load(values + at, mask=inside, other=0.0)
    tl.store(rounded + at, rounding.round_stochastically(w, first_row, first_column, tl.load(seed), t), mask=inside)


def rounded(values, seed, t, tile):
    result = torch.full(values.shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)
    grid = triton.cdiv(values.shape[0], tile[0]), triton.cdiv(values.shape[1], tile[1])
    _round_kernel[grid](values, result, seed, t, *values.shape, *values.stride(), *tile)
    return result


@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (128, 128)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 130), (130, 7), (64, 64)], ids=str)
def test_the_draws_of_the_reference(shape, tile):
    values = torch.randn(shape, device=DEVICE) * 10.0 ** torch.randint(-44, 38, shape, device=DEVICE)
    for seed, t in ((philox.derive_seed(3, 1), 1), (-1, 16), (0, 2**24 + 2), (1 << 63, 2**31 - 1)):
        seed = philox.seed_tensor([seed], DEVICE)
        expected = reference.round_stochastically(values, seed, t)
        assert same_bits(bits([rounded(values, seed, t, tile)]), bits([expected]))


def test_what_is_not_finite():
    """Adding to the bits of a NaN could carry it over into a number."""
    patterns = torch.tensor([[0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1, 0x7F7FFFFF, -0x800001]], dtype=torch.int32)
    values = torch.cat([patterns.view(torch.float32), torch.tensor([[0.0, -0.0, 1.5]])], 1).to(DEVICE)
    found = rounded(values, philox.seed_tensor([5], DEVICE), 1, (16, 16))[0]
    assert found[0] == float("inf") and found[1] == -float("inf") and found[2:5].isnan().all()
    assert found[5] >= 3.38e38 and found[6] <= -3.38e38  # up is infinity, as it is to nearest
    assert same_bits(bits([found[7:]]), bits([values[0, 7:].bfloat16()]))
