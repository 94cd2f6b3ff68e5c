"""Stochastic rounding to bf16: the two neighbours only, the mean exact, and a function of (seed, step,
element)."""

import math

import pytest
import torch

from lowrank_kernels import philox
from lowrank_kernels.rounding import round_stochastically

SEED = philox.seed_tensor([philox.derive_seed(17, 3)], "cpu")


def neighbours(values):
    """The bf16 next to each fp32 towards zero and away from it, both the value itself where bf16 holds it."""
    bits = values.view(torch.int32)
    lower = (bits & -0x10000).view(torch.float32)
    return lower, torch.where(lower == values, values, ((bits & -0x10000) + 0x10000).view(torch.float32))


def deviation(draws):
    """What a mean of so many numbers from an interval of length 1 exceeds with probability 1e-12 at most
    (Hoeffding)."""
    return math.sqrt(math.log(2 / 1e-12) / (2 * draws))


def test_one_of_the_two_neighbours():
    values = torch.randn(70, 130, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-40, 30).view(-1, 1)
    lower, upper = neighbours(values)
    rounded = round_stochastically(values, SEED, 1).float()
    assert ((rounded == lower) | (rounded == upper)).all()
    assert (rounded == lower).any() and (rounded == upper).any()


def test_what_bf16_holds_is_kept():
    """A million draws: each of the 65536 is among them, the largest included."""
    values = torch.randn(512, 512).bfloat16().float()
    values[0, :4] = torch.tensor([0.0, -0.0, 2.0**-133, -3.3895313892515355e38])  # the least and the largest bf16 besides
    for step in range(1, 5):
        assert torch.equal(round_stochastically(values, SEED, step).view(torch.int16), values.bfloat16().view(torch.int16))


@pytest.mark.parametrize("fraction", [1, 0x100, 0x4000, 0x8000, 0xC123, 0xFFFF])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_probability_is_the_distance(fraction, sign):
    """P(away from zero) = the lower 16 bits / 2¹⁶, so that the mean is the value."""
    value = torch.tensor([0x3FC00000 + fraction], dtype=torch.int32).view(torch.float32) * sign
    values = value.expand(256, 512)
    rounded = torch.stack([round_stochastically(values, SEED, step) for step in range(1, 5)]).double()
    lower, upper = (float(neighbour) for neighbour in neighbours(value))
    assert abs(float(rounded.mean()) - float(value)) <= abs(upper - lower) * deviation(rounded.numel())


def test_the_mean_of_each_element():
    """Over steps every element has its own mean, as over elements every step has."""
    values = torch.randn(6, 19, generator=torch.Generator().manual_seed(2))
    lower, upper = neighbours(values)
    steps = 1500
    mean = sum(round_stochastically(values, SEED, step).double() for step in range(1, steps + 1)) / steps
    assert ((mean - values.double()).abs() <= (upper - lower).abs().double() * deviation(steps)).all()


def test_bits_are_uniform_and_apart():
    """Each of the 16 bits is fair, and those of neighbours in a row, in a column and from step to step agree
    half of the time."""
    bits = torch.stack([philox.rounding_bits(SEED, 64, 104, step) for step in (1, 2)])
    assert bits.min() >= 0 and bits.max() < 2**16
    planes = (bits[..., None] >> torch.arange(16)) & 1
    pairs = [planes[0], planes[0] ^ planes[1], planes[:, 1:] ^ planes[:, :-1], planes[:, :, 1:] ^ planes[:, :, :-1]]
    for plane in pairs:
        draws = plane.reshape(-1, 16).double()
        assert ((draws.mean(0) - 0.5).abs() <= deviation(len(draws))).all()


def test_a_function_of_seed_step_and_element():
    values = torch.randn(40, 50)
    first = round_stochastically(values, SEED, 7)
    assert torch.equal(first, round_stochastically(values, SEED, 7))
    assert torch.equal(first, round_stochastically(values, SEED, torch.tensor(7.0, dtype=torch.float64)))
    assert not torch.equal(first, round_stochastically(values, SEED, 8))
    assert not torch.equal(first, round_stochastically(values, SEED + 1, 7))
    high = philox.seed_tensor([int(SEED) ^ (1 << 63)], "cpu")
    assert not torch.equal(first, round_stochastically(values, high, 7))


def test_independent_of_layout_and_size():
    """An element's bits depend on its row and column alone: not on strides, nor on how large the matrix
    is."""
    values = torch.randn(40, 50)
    rounded = round_stochastically(values, SEED, 3)
    by_columns, every_other = values.T.contiguous().T, torch.zeros(40, 100)[:, ::2].copy_(values)
    assert torch.equal(rounded, round_stochastically(by_columns, SEED, 3))
    assert torch.equal(rounded, round_stochastically(every_other, SEED, 3))
    for rows, columns in ((1, 1), (7, 50), (40, 13)):
        assert torch.equal(rounded[:rows, :columns], round_stochastically(values[:rows, :columns], SEED, 3))
        assert torch.equal(philox.rounding_bits(SEED, 40, 50, 3)[:rows, :columns], philox.rounding_bits(SEED, rows, columns, 3))


def test_wider_values_are_first_rounded_to_fp32():
    values = torch.randn(9, 30, dtype=torch.float64)
    assert torch.equal(round_stochastically(values, SEED, 1), round_stochastically(values.float(), SEED, 1))


def test_what_is_not_finite():
    """Adding to the bits of a NaN could carry it over into a number."""
    patterns = torch.tensor([[0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, 0x7F7FFFFF, -0x800001]], dtype=torch.int32)
    for step in range(1, 50):
        rounded = round_stochastically(patterns.view(torch.float32), SEED, step)[0].float()
        assert rounded[0] == float("inf") and rounded[1] == -float("inf") and rounded[2:6].isnan().all()
        assert rounded[6] >= 3.3895e38 and rounded[7] <= -3.3895e38  # up is infinity, as it is to nearest
