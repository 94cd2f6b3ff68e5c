"""Divisions by one number through its reciprocal and a Newton step: the bits of a correctly rounded
division."""

import math

import pytest
import torch
import triton
import triton.language as tl
from buckets import DEVICE
from launchers import update_moments_

from lowrank_kernels.backends.triton import adam
from lowrank_kernels.backends.triton.dots import INTERPRETED

pytestmark = pytest.mark.gpu
BLOCK = 2**20 if INTERPRETED else 1024


def fma(a, b, c):
    """a·b + c of fp32 in one rounding. The product is exact in fp64. Its sum with c is rounded to an odd last
    bit where it is not exact, which makes the second rounding the only one that counts."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    virtual = total - product
    error = (product - (total - virtual)) + (c - virtual)
    even = (total.view(torch.int64) & 1) == 0
    towards = torch.where(error > 0, math.inf, -math.inf).to(total.dtype)
    total = torch.where((error != 0) & even & total.isfinite(), torch.nextafter(total, towards), total)
    return total.float()


@pytest.fixture(autouse=True)
def one_rounding(monkeypatch):
    """The interpreter multiplies and adds with two roundings."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def create_fma(self, x, y, z):
            a, b, c = (torch.from_numpy(operand.data.copy()) for operand in (x, y, z))
            return TensorHandle(fma(*torch.broadcast_tensors(a, b, c)).numpy(), z.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


@triton.jit
def _divide_kernel(values, divisor, quotients, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(divisor)
    tl.store(quotients + offs, adam.divide_by_scalar(tl.load(values + offs), by, tl.div_rn(1.0, by)))


def divided(values, divisor):
    quotients = torch.full_like(values, float("nan"))
    _divide_kernel[(values.numel() // BLOCK,)](values, torch.tensor(divisor, device=DEVICE), quotients, BLOCK)
    return quotients


def ulps_away(values, divisor):
    """From the correctly rounded quotients, in units of the last place."""
    right = values.cpu() / torch.tensor(divisor)
    found = divided(values, divisor).cpu()
    return (found.view(torch.int32).long() - right.view(torch.int32).long()).abs(), right


CORRECTIONS = [0.1, 0.001, 1 - 0.9**7, 1 - 0.999**7, 1 - 0.999**1000, 1 - 2.0**-24, 1.0, 0.5 + 2.0**-24, 2 / 3, 1e-6]


@pytest.mark.parametrize("divisor", CORRECTIONS, ids=lambda value: f"{value:.9g}")
def test_the_same_bits(divisor):
    """A million values, over all sizes whose quotient and remainder are normal numbers: 10⁷ in all."""
    size = 2.0 ** torch.empty(2**20, dtype=torch.float64).uniform_(-100, 100)
    values = (size * torch.randn(2**20).sign()).float().to(DEVICE)
    away, _ = ulps_away(values, divisor)
    assert not away.any(), f"{int((away > 0).sum())} of {away.numel()} differ"


@pytest.mark.parametrize("divisor", CORRECTIONS, ids=lambda value: f"{value:.9g}")
def test_tiny_values_are_an_ulp_off_at_most(divisor):
    size = 2.0 ** torch.empty(2**20, dtype=torch.float64).uniform_(-149, -100)
    away, _ = ulps_away(size.float().to(DEVICE), divisor)
    assert away.max() <= 1


def test_zeros_stay_zero_of_their_sign():
    values = torch.zeros(BLOCK, device=DEVICE)
    assert not divided(values, 0.1).any() and not divided(-values, 0.1).any()


def test_an_infinite_v_gives_a_step_of_zero():
    """R² overflows, and the reference divides by infinity. A NaN there would spread over the row of W."""
    exp_avgs, exp_avg_sqs = ([torch.zeros(4, 64, device=DEVICE)] for _ in range(2))
    projected = torch.full((1, 4, 64), 1e20, device=DEVICE)
    normalised = update_moments_(exp_avgs, exp_avg_sqs, projected=projected, step=3)
    assert exp_avg_sqs[0].isinf().all() and not normalised.any()
