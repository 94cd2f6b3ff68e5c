"""The random projections of RSO: E[P·Pᵀ] = I, the shape of each distribution, and P as a function of the seed
alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kernels.subspaces import DISTRIBUTIONS, distributions, draw_projection

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


def draw(distribution, m, rank, seed=0, dtype=torch.float64):
    return draw_projection(distribution, m, rank, seed=seed, device="cpu", dtype=dtype)


def variance(distribution, m, rank):
    """E‖P·Pᵀ − I‖²_F of one draw: m(m+1)/r for Gaussians (Wishart), m²/r − m for (m/r)·QQᵀ, m(m−1)/r for
    signs (no diagonal)."""
    return {"gaussian": m * (m + 1) / rank, "haar": m * m / rank - m, "rademacher": m * (m - 1) / rank}[distribution]


@every_distribution
@pytest.mark.parametrize("m, rank", [(12, 3), (7, 1), (9, 8), (6, 6), (1, 1), (33, 5)])
def test_the_mean_of_p_p_transposed_is_the_identity(distribution, m, rank):
    """The mean of n independent draws has E‖mean − I‖²_F = variance / n. That is a sum of about m²/2 weakly
    dependent squares, by Markov's inequality above 9 times its expectation with a probability below 1/9, and
    by far below it; the seeds are fixed. The trace, m in the mean, varies by 2m/r where it varies at all."""
    n = 400
    drawn = torch.stack([draw(distribution, m, rank, seed) for seed in range(n)])
    products = drawn @ drawn.mT
    error = (products.mean(0) - torch.eye(m)).norm().item()
    expected = math.sqrt(variance(distribution, m, rank) / n)
    assert error <= 3 * expected + 1e-5
    of_trace = 5 * math.sqrt(2 * m / rank / n) if distribution == "gaussian" else 1e-5 * m
    assert abs(products.mean(0).trace().item() - m) <= of_trace
    if 1 < m and (rank < m or distribution != "haar"):  # what is known of each draw
        assert (products - torch.eye(m)).square().sum((-1, -2)).mean().item() == pytest.approx(variance(distribution, m, rank), rel=0.15)
    # Every element has mean 0 and variance 1/r: its mean over n draws is within 5 of its standard deviations,
    # of which 165 are looked at.
    assert drawn.mean(0).abs().max() <= 5 / math.sqrt(rank * n)


@pytest.mark.parametrize("m, rank", [(40, 8), (40, 40), (257, 64), (1, 1), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_haar_has_equal_singular_values(m, rank, dtype):
    P = draw("haar", m, rank, dtype=dtype).double()
    assert (P.mT @ P * rank / m - torch.eye(rank)).abs().max() <= 1e-5


@pytest.mark.parametrize("m, rank", [(40, 9), (33, 33), (1, 1), (3, 2)])
def test_rademacher_has_two_values_as_often(m, rank):
    drawn = torch.stack([draw("rademacher", m, rank, seed) for seed in range(300)])
    signs = drawn * math.sqrt(rank)
    assert torch.allclose(signs.abs(), torch.ones(()).double(), rtol=1e-12)
    # A sum of n fair signs has the standard deviation √n.
    assert abs(signs.sum().item()) <= 4 * math.sqrt(signs.numel())
    neighbours = signs.flatten(1)[:, 1:] * signs.flatten(1)[:, :-1]
    assert abs(neighbours.sum().item()) <= 4 * math.sqrt(neighbours.numel() + 1)


def test_gaussian_is_gaussian():
    values = draw("gaussian", 500, 100).flatten() * 10
    # Standard errors of n normal values' moments: 1/√n, √(2/n), √(15/n), √(96/n).
    n = values.numel()
    for power, moment, size in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((values**power).mean().item() - moment) <= 4 * math.sqrt(size / n)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    m=st.integers(1, 50),
    rank=st.integers(1, 50),
    seed=st.integers(-(2**63), 2**64 - 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_function_of_the_seed(distribution, m, rank, seed, dtype):
    """Whatever torch's generator does; of the shape and dtype asked for; rounded once."""
    rank = min(m, rank)
    P = draw(distribution, m, rank, seed, dtype)
    torch.rand(3)
    assert torch.equal(P, draw(distribution, m, rank, seed, dtype))
    assert P.shape == (m, rank) and P.dtype == dtype and P.isfinite().all()
    if dtype.itemsize == 2:
        assert torch.equal(P, draw(distribution, m, rank, seed, torch.float32).to(dtype))
    if m * rank > 64:
        assert not torch.equal(P, draw(distribution, m, rank, seed ^ 1, dtype))
        assert not torch.equal(P, draw(distribution, m, rank, seed ^ (1 << 40), dtype))


@every_distribution
@pytest.mark.parametrize("m, rank", [(40, 32), (37, 11), (1, 1)])
def test_pieces_of_any_size_make_the_same_matrix(monkeypatch, distribution, m, rank):
    whole = draw(distribution, m, rank)
    monkeypatch.setattr(distributions, "PIECE", 128)
    assert torch.equal(draw(distribution, m, rank), whole)
