"""The format of 8-bit moments on tiles, apart from the kernels that use it."""

import pytest
import torch
import triton
import triton.language as tl
from buckets import DEVICE, bits, guarded, same_bits
from coded import assert_codes, code_frames_intact, guarded_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_within, decoded_error

from lowrank_kernels.backends.triton import eight_bit
from lowrank_kernels.storage import eight_bit as reference

pytestmark = pytest.mark.gpu
TILE = (8, 128)
STEP = 1234567


@triton.jit
def _encode_kernel(
    exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, m, v, rows, columns, t, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    block = tl.program_id(1) * (COLUMNS // 64) + tl.arange(0, COLUMNS // 64)[None, :]
    inside, at = (row < rows) & (column < columns), row * columns + column
    block_inside, block_at = (row < rows) & (block * 64 < columns), row * tl.cdiv(columns, 64) + block
    # What stands beyond the edge is the worst there is: NaN.
    codes, scales = eight_bit.encode_m(tl.load(m + at, mask=inside, other=float("nan")), inside)
    tl.store(exp_avg + at, codes, mask=inside)
    tl.store(exp_avg_scale + block_at, scales, mask=block_inside)
    first_row, first_column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    codes, scales = eight_bit.encode_v(
        tl.load(v + at, mask=inside, other=float("nan")), inside, first_row, first_column, tl.cast(t, tl.int32)
    )
    tl.store(exp_avg_sq + at, codes, mask=inside)
    tl.store(exp_avg_sq_scale + block_at, scales, mask=block_inside)


@triton.jit
def _decode_kernel(exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, m, v, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    block = tl.program_id(1) * (COLUMNS // 64) + tl.arange(0, COLUMNS // 64)[None, :]
    inside, at = (row < rows) & (column < columns), row * columns + column
    block_inside, block_at = (row < rows) & (block * 64 < columns), row * tl.cdiv(columns, 64) + block
    scales = tl.load(exp_avg_scale + block_at, mask=block_inside, other=0.0)
    tl.store(m + at, eight_bit.decode_m(tl.load(exp_avg + at, mask=inside, other=0), scales), mask=inside)
    scales = tl.load(exp_avg_sq_scale + block_at, mask=block_inside, other=0.0)
    tl.store(v + at, eight_bit.decode_v(tl.load(exp_avg_sq + at, mask=inside, other=0), scales), mask=inside)


def launch(kernel, *tensors, numbers=()):
    rows, columns = tensors[0].shape
    kernel[(triton.cdiv(rows, TILE[0]), triton.cdiv(columns, TILE[1]))](*tensors, rows, columns, *numbers, *TILE)


def encode(m, v, step=STEP):
    codes = [guarded_codes(torch.zeros(m.shape, dtype=torch.uint8)) for _ in range(2)]
    scales = [guarded(torch.zeros(reference.scales_shape(m.shape))) for _ in range(2)]
    launch(_encode_kernel, *codes, *scales, guarded(m), guarded(v), numbers=(step,))
    assert code_frames_intact(codes)
    return (*codes, *scales)


def moments(rows, columns, scale=1.0):
    """Values of a block that span eight orders of magnitude, and some zeros."""
    sizes = 10.0 ** (-8 * torch.rand(2, rows, columns, device=DEVICE, dtype=torch.float64)) * scale
    m, v = (sizes * (torch.rand(sizes.shape, device=DEVICE) > 0.05)).float()
    return torch.where(torch.rand(m.shape, device=DEVICE) < 0.5, m, -m), v


def nothing(m):
    """Errors of moments that are known exactly."""
    return torch.zeros(m.shape, dtype=torch.float64, device=DEVICE), torch.zeros(m.shape, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (9, 64), (8, 65), (1, 300), (17, 200)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3e37, 1e-29])
def test_codes_are_neighbours(shape, scale):
    m, v = moments(*shape, scale)
    m[0, 0], v[0, 0] = -scale, scale
    m[:, ::64], v[:, ::64] = scale, scale  # no block of nothing but zeros, which has no scale
    assert_codes(encode(m, v), m, v, nothing(m), STEP)


@pytest.mark.parametrize("shape", [(1, 1), (8, 65), (17, 200)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3e37, 1e-29])
def test_every_code_decodes(shape, scale):
    codes = [guarded_codes(torch.randint(0, 256, shape, dtype=torch.uint8)) for _ in range(2)]
    scales = [guarded(scale * torch.rand(reference.scales_shape(shape))) for _ in range(2)]
    found = [torch.full(shape, float("nan"), device=DEVICE) for _ in range(2)]
    launch(_decode_kernel, *codes, *scales, *found)
    exact = reference.decode(*codes, *scales, torch.float64)
    for name, value, expected, bound in zip("MV", found, exact, decoded_error(*exact), strict=True):
        assert_within(value, expected, bound, name)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 150), exponent=st.integers(-30, 37), step=st.integers(1, 2**24))
def test_same_codes_as_the_reference(rows, columns, exponent, step):
    """Both round in fp32, so one code in thousands may be the neighbour: of M where the exact one lies
    midway, of V where it lies at the threshold."""
    m, v = moments(rows, columns, 10.0**exponent)
    found = encode(m, v, step)
    expected = [torch.empty_like(tensor) for tensor in found]
    reference.encode_(m, v, *expected, step)
    assert same_bits(bits(found[2:]), bits(expected[2:]))
    for codes, same in zip(found[:2], expected[:2], strict=True):
        difference = (codes.int() - same.int()).abs()
        assert difference.max() <= 1 and difference.sum() <= 1 + codes.numel() // 500


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # ∞·0 in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 37, 63, 127, 129])
def test_what_is_not_finite_poisons_its_block_alone(bad, at):
    m, v = moments(4, 130)
    m[:, ::64], v[:, ::64] = 1.0, 1.0
    clean = [tensor.clone() for tensor in encode(m, v)]
    m[2, at], v[1, at] = bad, abs(bad)
    found = encode(m, v)
    block = slice(at // 64 * 64, at // 64 * 64 + 64)
    assert found[2][2, at // 64].isnan() and found[3][1, at // 64].isnan()
    assert (found[0][2, block] == 128).all() and (found[1][1, block] == 0).all()
    decoded = reference.decode(*found)
    assert decoded[0][2, block].isnan().all() and decoded[1][1, block].isnan().all()
    clean[2][2, at // 64], clean[3][1, at // 64] = found[2][2, at // 64], found[3][1, at // 64]
    clean[0][2, block], clean[1][1, block] = 128, 0
    assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(found, clean, strict=True))


def test_zero_and_tiny_blocks():
    """A block of zeros, one whose peak is the largest subnormal, one whose peak is the smallest normal
    number."""
    m = torch.zeros(1, 192, device=DEVICE)
    m[0, 64], m[0, 128], m[0, 129] = -(2.0**-126 - 2.0**-149), -(2.0**-126), 2.0**-127
    v = m.abs()
    exp_avg, exp_avg_sq, m_scale, v_scale = encode(m, v)
    assert m_scale.tolist() == v_scale.tolist() == [[0.0, 0.0, 2.0**-126]]
    assert (exp_avg[0, :128] == 128).all() and not exp_avg_sq[0, :64].any()
    assert exp_avg[0, 128:131].tolist() == [1, 128 + 90, 128]  # √½ of 127 is 89.8
    assert exp_avg_sq[0, 64:66].tolist() == [1, 0] and exp_avg_sq[0, 128:131].tolist() == [255, 215, 0]  # (½)^¼ of 255 is 214.4


def test_positive_v_stays_positive():
    v = torch.tensor([[1.0, 1e-12, 1e-30, 2.0**-149, 0.0]], device=DEVICE)
    coded = encode(torch.ones_like(v), v)
    assert coded[1].tolist() == [[255, 1, 1, 1, 0]]
    assert (reference.decode(*coded)[1][0, :4] > 0).all()


@triton.jit
def _fractions_kernel(out, first_row, first_column, t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + at, eight_bit._fractions(tl.zeros((ROWS, COLUMNS), tl.float32), first_row, first_column, tl.cast(t, tl.int32)))


@pytest.mark.parametrize("first", [(0, 0), (8, 128), (1000, 2**20), (2**20, 64)], ids=str)
@pytest.mark.parametrize("step", [1, 2**23 - 1, 2**24, 2**31 - 1])
def test_fractions_are_the_references_bit_for_bit(first, step):
    """Rows and columns are added to those of a small matrix, whose u is known."""
    found = torch.full(TILE, float("nan"), device=DEVICE)
    _fractions_kernel[(1,)](found, *first, step, *TILE)
    shift = (first[0] * reference.ROW + first[1] * reference.COLUMN) / reference.UNITS
    expected = (reference.fractions(TILE, step, torch.float64, found.device) + shift).frac()
    assert torch.equal(found.double(), expected)
