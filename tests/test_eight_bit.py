"""The format of 8-bit moments: what a code may lose, and what it must not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import drift
from lowrank_kernels.storage import eight_bit

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
UNIT = 2.0**-24


def coded(m, v, step=1):
    shape = eight_bit.scales_shape(m.shape)
    tensors = [torch.full(m.shape, 77, dtype=torch.uint8) for _ in range(2)] + [torch.full(shape, float("nan")) for _ in range(2)]
    eight_bit.encode_(m, v, *tensors, step)
    return tensors


def moments(*shape, dtype=torch.float32, scale=1.0):
    """Values that span eight orders of magnitude."""
    generator = torch.Generator().manual_seed(sum(shape))
    m, v = (scale * 10.0 ** (-8 * torch.rand(shape, generator=generator, dtype=torch.float64)) for _ in range(2))
    return (m * torch.where(torch.rand(shape, generator=generator) < 0.5, 1, -1)).to(dtype), v.to(dtype)


def spread(scales, n):
    return scales.double().repeat_interleave(64, -1)[..., :n]


def assert_close(m, v):
    """Half a code of M is all that is lost, and of V less than one. With y the real code, |c − y| ≤ ½ for M
    and < 1 for V, and so

        s/127²·|c² − y²| ≤ s/127²·(y + ¼)
        s/255⁴·|c⁴ − y⁴| ≤ s/255⁴·4(y + 1)³

    fp32 adds at most 8u of y where a code is chosen, SLACK/4 of y where it is the next one anyway, and an s
    rounded to fp32 moves what is decoded by 2u.
    """
    tensors = coded(m, v)
    m_found, v_found = eight_bit.decode(*tensors, torch.float64)
    m, v, n = m.double(), v.double(), m.shape[-1]
    m_scale, v_scale = (spread(scales, n) for scales in tensors[2:])
    half = 0.5 + 8 * 255 * UNIT
    y = 127 * (m.abs() / m_scale).sqrt()
    assert ((m_found - m).abs() <= m_scale / 127**2 * half * (2 * y + half) + 2 * UNIT * m.abs()).all()
    y = 255 * (v / v_scale) ** 0.25
    one = 1 + 255 * eight_bit.SLACK / 4
    bound = 4 * one * (y + one) ** 3
    assert ((v_found - v).abs() <= v_scale / 255**4 * bound + 2 * UNIT * v).all()
    assert (v_found[v > 0] > 0).all()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (3, 64), (2, 65), (7, 300), (2, 3, 130)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3e37, 1e-29])
def test_codes_are_neighbours(shape, scale, dtype):
    assert_close(*moments(*shape, dtype=dtype, scale=scale))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-(2.0**100), 2.0**100, width=32), st.floats(0, 2.0**100, width=32)), min_size=1, max_size=150))
def test_any_values(pairs):
    m, v = torch.tensor(pairs, dtype=torch.float32).T
    largest = m.new_tensor([2.0**100])  # no block without a scale
    padded = [torch.cat([torch.cat([largest, part]) for part in values.split(63)])[None] for values in (m, v)]
    assert_close(*padded)


def test_scales_are_the_peaks_of_64_neighbours():
    m, v = moments(3, 130)
    _, _, m_scale, v_scale = coded(m, v)
    for block in range(3):
        part = slice(64 * block, 64 * block + 64)
        assert torch.equal(m_scale[:, block], m[:, part].abs().amax(1)) and torch.equal(v_scale[:, block], v[:, part].amax(1))
    assert eight_bit.scales_shape((2, 3, 64)) == (2, 3, 1) and eight_bit.scales_shape((5, 65)) == (5, 2)


def test_known_codes():
    """m/s = ±(k/127)² and v/s = (k/255)⁴ have the codes 128 ± k and k."""
    k = torch.arange(128, dtype=torch.float64)
    m, v = torch.cat([-((k / 127) ** 2), (k / 127) ** 2]).view(4, 64), ((torch.arange(256, dtype=torch.float64) / 255) ** 4).view(4, 64)
    m[:, 0] = v[:, 0] = 1.0
    m_codes, v_codes = torch.cat([128 - k, 128 + k]).view(4, 64), torch.arange(256.0).view(4, 64)
    m_codes[:, 0] = v_codes[:, 0] = 255
    exp_avg, exp_avg_sq, m_scale, v_scale = coded(3 * m, 5 * v)
    assert torch.equal(exp_avg.double(), m_codes) and torch.equal(exp_avg_sq.float(), v_codes)
    assert (m_scale == 3).all() and (v_scale == 5).all()


@DTYPES
def test_coding_again_changes_nothing(dtype):
    """At another step as well: what was decoded is a code, and needs no rounding."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(100, 1)
    codes[:, ::64] = 255
    scales = 10.0 ** (60 * torch.rand(100, 4) - 30)
    for step in (1, 2, 1000):
        tensors = codes, codes, scales, scales
        again = coded(*eight_bit.decode(*tensors, dtype), step)
        assert all(torch.equal(a, b) for a, b in zip(tensors[1::2], again[1::2], strict=True))
        tensors = coded(*moments(5, 200, dtype=dtype), step)
        again = coded(*eight_bit.decode(*tensors, dtype), step + 1)
        assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))


def discrepancy(count):
    """How many of `count` multiples of STEP / UNITS in a row may be in an interval [0, p) beyond count·p: 3 +
    (1/ln ξ + K/ln(K + 1))·ln count, where ξ is the golden section and K = 3 the largest partial quotient of
    the continued fraction (Kuipers and Niederreiter, Uniform distribution of sequences, theorem 2.3.4)."""
    return 3 + (1 / math.log((1 + 5**0.5) / 2) + 3 / math.log(4)) * math.log(count)


def test_partial_quotients_are_small():
    a, b, quotients = eight_bit.STEP, eight_bit.UNITS, []
    while b:
        quotients.append(a // b)
        a, b = b, a % b
    assert max(quotients) == 3 and abs(eight_bit.STEP / eight_bit.UNITS - 0.6180339887) < 1e-5
    assert all(number % 2 for number in (eight_bit.ROW, eight_bit.COLUMN, eight_bit.STEP)), "has a smaller period"


def test_fractions_are_equal_in_fp32_and_fp64_and_move_with_row_column_and_step():
    one = eight_bit.fractions((40, 200), 1, torch.float64, "cpu")
    assert torch.equal(one, eight_bit.fractions((40, 200), torch.tensor(1.0), torch.float32, "cpu").double())
    assert one.unique().numel() == one.numel() and 0 <= one.min() and one.max() < 1
    assert torch.equal(eight_bit.fractions((1, 2**20), 7, torch.float32, "cpu").double().mul(2**23) % 1, torch.zeros(1, 2**20))
    next_one = eight_bit.fractions((40, 200), 2, torch.float64, "cpu")
    assert torch.equal(next_one, (one + eight_bit.STEP / eight_bit.UNITS).frac())


@DTYPES
@pytest.mark.parametrize("axis", ["steps", "elements"])
def test_v_is_right_in_the_mean(axis, dtype):
    """Over 1000 steps for each of 63 values, and over 63,000 elements of one value at one step, where 1 % is
    allowed. A draw that is wrong moves the mean by distance / count. fp32 moves a threshold by 2⁻¹⁹."""
    generator = torch.Generator().manual_seed(0)
    values = 10.0 ** (-6 * torch.rand(63, generator=generator, dtype=torch.float64))
    if axis == "steps":
        v, count = torch.cat([torch.ones(1, dtype=torch.float64), values])[None].to(dtype), 1000
        found = [eight_bit.decode(*coded(v, v, step), torch.float64)[1] for step in range(500, 500 + count)]
        mean, v, off = torch.stack(found).mean(0)[:, 1:], v[:, 1:].double(), discrepancy(count)
    else:
        v = values[:, None, None].repeat(1, 200, 320).to(dtype)
        v[..., ::64] = 1
        decoded = eight_bit.decode(*coded(v, v, 17), torch.float64)[1].unflatten(-1, (-1, 64))[..., 1:]
        count = decoded[0].numel()
        mean, v, off = decoded.mean((1, 2, 3)), v[:, 0, 1].double(), 0.01 * count
    below = (255 * v**0.25).floor()
    distance = ((below + 1) ** 4 - below**4) / 255**4
    assert (below >= 1).all()
    assert ((mean - v).abs() <= distance * off / count + eight_bit.SLACK * v).all()
    if axis == "steps":  # a code to nearest is off by up to half the distance
        assert ((mean - v).abs() / distance).max() < 0.05


def test_the_largest_of_a_block_keeps_its_code():
    for step in range(1, 200):
        v = 0.1 + torch.rand(4, 128)
        tensors = coded(v, v, step)
        at = v.unflatten(-1, (-1, 64)).argmax(-1, keepdim=True)
        assert (tensors[1].unflatten(-1, (-1, 64)).gather(-1, at) == 255).all()


@pytest.mark.parametrize("factor", [1, 10, 1 / 10, *(pytest.param(factor, marks=pytest.mark.slow) for factor in (2, 4, 1 / 2, 1 / 4))])
def test_v_follows_gradients_that_change(factor):
    """V keeps the exact mean, with a noise. A step changes V by about (1 − β2)·V, so rounding between codes
    d·V apart adds a variance of (1 − β2)·d·V². These sum to d/2 over the memory of V, so σ = √(d/2). At code
    c d is 4/c; c = 230, near the top, gives σ = 0.09. Gradients f times smaller have codes √f times smaller,
    and so f^-¼ times the noise. The bound is 2.2σ. A normal distribution has its 5th and 95th percentile at
    1.65σ, but elements differ in c, and V is skew."""
    of_v, of_m = drift.ratios(factor, blocks=20, steps=6000)
    low, middle, high = drift.percentiles(of_v)
    wider = max(1.0, factor**-0.25)
    assert abs(middle - 1) < 0.04 and abs(of_v.mean() - 1) < 0.03
    assert 1 - 0.2 * wider < low and high < 1 + 0.2 * wider
    assert (of_m < 0.03).all()


@pytest.mark.parametrize("factor, least", [(1, 1.2), (1 / 10, 30)])
def test_nearest_codes_would_not_follow(factor, least):
    of_v, _ = drift.ratios(factor, blocks=5, steps=6000, nearest=True)
    assert drift.percentiles(of_v)[1] > least


def test_positive_v_stays_positive():
    """A code of 1 is s/255⁴ = 2.4e-10·s: without it, N would be M̂/ε."""
    v = torch.tensor([[1.0, 1e-9, 1e-12, 1e-30, 2.0**-149, 0.0]])
    tensors = coded(torch.ones_like(v), v)
    assert tensors[1].tolist() == [[255, 1, 1, 1, 1, 0]]
    found = eight_bit.decode(*tensors)[1]
    assert (found[0, :5] > 0).all() and found[0, 5] == 0


@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 63, 64, 129])
def test_what_is_not_finite_makes_its_block_nan(at, bad, dtype):
    m, v = moments(2, 130, dtype=dtype)
    clean = eight_bit.decode(*coded(m, v))
    m[0, at], v[1, at] = bad, abs(bad)
    found = eight_bit.decode(*coded(m, v))
    block = torch.arange(130) // 64 == at // 64
    for values, before, row in zip(found, clean, (0, 1), strict=True):
        assert values[row, block].isnan().all()
        values[row, block] = before[row, block]
        assert torch.equal(values, before)


def test_too_large_for_fp32_is_not_finite():
    """A scale is fp32: fp64 moments beyond it count as infinite."""
    tensors = coded(torch.tensor([[1e39, 1.0]], dtype=torch.float64), torch.tensor([[1.0, 1e39]], dtype=torch.float64))
    assert all(values.isnan().all() for values in eight_bit.decode(*tensors))


def test_zero_and_tiny_blocks_decode_to_zero():
    m = torch.zeros(1, 192)
    m[0, 64], m[0, 128] = -(2.0**-126 - 2.0**-149), -(2.0**-126)
    exp_avg, exp_avg_sq, m_scale, v_scale = coded(m, m.abs())
    assert m_scale.tolist() == v_scale.tolist() == [[0.0, 0.0, 2.0**-126]]
    assert exp_avg[0, 128] == 1 and exp_avg_sq[0, 128] == 255
    m_found, v_found = eight_bit.decode(exp_avg, exp_avg_sq, m_scale, v_scale)
    assert not m_found[0, :128].any() and not v_found[0, :128].any()
    assert m_found[0, 128] == -(2.0**-126) and v_found[0, 128] == 2.0**-126


def test_a_batch_is_its_matrices():
    m, v = moments(3, 4, 100)
    together, each = coded(m, v), [coded(*pair) for pair in zip(m, v, strict=True)]
    for index, tensor in enumerate(together):
        assert torch.equal(tensor, torch.stack([tensors[index] for tensors in each]))
