"""The format of 8-bit moments: what a code may lose, and what it must not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kernels.storage import eight_bit

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
UNIT = 2.0**-24


def coded(m, v):
    shape = eight_bit.scales_shape(m.shape)
    tensors = [torch.full(m.shape, 77, dtype=torch.uint8) for _ in range(2)] + [torch.full(shape, float("nan")) for _ in range(2)]
    eight_bit.encode_(m, v, *tensors)
    return tensors


def moments(*shape, dtype=torch.float32, scale=1.0):
    """Values that span eight orders of magnitude."""
    generator = torch.Generator().manual_seed(sum(shape))
    m, v = (scale * 10.0 ** (-8 * torch.rand(shape, generator=generator, dtype=torch.float64)) for _ in range(2))
    return (m * torch.where(torch.rand(shape, generator=generator) < 0.5, 1, -1)).to(dtype), v.to(dtype)


def spread(scales, n):
    return scales.double().repeat_interleave(64, -1)[..., :n]


def assert_close(m, v):
    """Half a code is all that is lost. With y the real code, |c − y| ≤ ½ and so, for M and V,

        s/127²·|c² − y²| ≤ s/127²·(y + ¼)
        s/255⁴·|c⁴ − y⁴| ≤ s/255⁴·2(y + ½)³, or s/255⁴ where y < ½ gave a code of 1

    fp32 adds at most 8u of y where a code is chosen, and an s rounded to fp32 moves what is decoded by 2u.
    """
    tensors = coded(m, v)
    m_found, v_found = eight_bit.decode(*tensors, torch.float64)
    m, v, n = m.double(), v.double(), m.shape[-1]
    m_scale, v_scale = (spread(scales, n) for scales in tensors[2:])
    half = 0.5 + 8 * 255 * UNIT
    y = 127 * (m.abs() / m_scale).sqrt()
    assert ((m_found - m).abs() <= m_scale / 127**2 * half * (2 * y + half) + 2 * UNIT * m.abs()).all()
    y = 255 * (v / v_scale) ** 0.25
    bound = torch.maximum(4 * half * (y + half) ** 3, torch.ones_like(y))
    assert ((v_found - v).abs() <= v_scale / 255**4 * bound + 2 * UNIT * v).all()
    assert (v_found[v > 0] > 0).all()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (3, 64), (2, 65), (7, 300), (2, 3, 130)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3e37, 1e-29])
def test_half_a_code_is_lost_at_most(shape, scale, dtype):
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
    tensors = coded(*moments(5, 200, dtype=dtype))
    again = coded(*eight_bit.decode(*tensors, dtype))
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))


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
