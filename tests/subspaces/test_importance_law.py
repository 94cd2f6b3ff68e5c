"""Importance sampling draws as often as exact sampling without replacement would, whole spectrum or
sketch."""

import functools

import pytest
import torch

import lowrank_kernels as lrk
from benchmarks import sampling
from lowrank_kernels import subspaces
from lowrank_kernels.subspaces.tail import tail_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORTHONORMAL = 1e-5
NAMES = [case.spectrum.partition(" 10 of")[0] for case in sampling.cases(64, 160)]


@functools.cache
def law_of(m, n, name, share):
    """(G, law) of one of the seven spectra of the bounds."""
    (case,) = (case for case in sampling.cases(m, n) if case.spectrum.startswith(name))
    return case.grad.to(DEVICE), sampling.Law(case, m // share)


def found_by(m, n, name, share, count):
    """In batches with one sketch each, of which there are enough."""
    grad, law = law_of(m, n, name, share)
    return sampling.measure(law, sampling.refreshes(grad, law.rank, count, subspaces.choose_bases, together=max(1, count // 20)))


def representative(*cases):
    """Tail and draws stand in Python once: for each way in which directions are found some of the cases are
    enough; the others are slow."""
    ways = ("operators", "as on a GPU", "PyTorch")
    kept = [pytest.param(way, *rest) for way, *rest in cases]
    every = [(way, *rest) for way in ways for rest in dict.fromkeys(tuple(rest) for _, *rest in cases)]
    return kept + [pytest.param(*case, marks=pytest.mark.slow) for case in every if case not in cases]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "refresh_implementation, name, share",
    representative(
        *(("as on a GPU", name, share) for name in NAMES for share in sampling.SHARES),
        *(("operators", name, 16) for name in ("1/i", "exp(-i/6)", "rank")),
        *(("PyTorch", name, 4) for name in ("i^-1.5", "Gaussian noise")),
    ),
    indirect=["refresh_implementation"],
)
def test_inclusion_is_that_of_exact_sampling(refresh_implementation, name, share):
    """On a CPU all 64 values are known, in a batch the leading ones."""
    found = found_by(64, 160, name, share, sampling.REFRESHES)
    assert sampling.holds(found), found


@pytest.mark.gpu
@pytest.mark.parametrize(
    "refresh_implementation, name",
    representative(
        *(("operators", name) for name in NAMES),
        ("as on a GPU", "exp(-i/6)"),
        *(("PyTorch", name) for name in ("1/i", "Gaussian noise")),
    ),
    indirect=["refresh_implementation"],
)
def test_inclusion_over_a_sketch_is_that_of_exact_sampling(refresh_implementation, name):
    """144 × 360 at r = m/16: 26 directions known, 118 in the tail, on every way."""
    found = found_by(144, 360, name, 16, 300)
    assert sampling.holds(found), found


SLOW = {"1/i", "rank"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ("1/i", "exp(-i/6)", "Gaussian noise", "rank")]
)
def test_inclusion_in_a_wide_matrix_is_that_of_exact_sampling(name):
    found = found_by(512, 1280, name, 16, 150 if name in SLOW else 80)
    assert sampling.holds(found), found


@pytest.mark.parametrize("shape, rank", [((64, 160), 4), pytest.param((144, 360), 9, marks=pytest.mark.slow)])
def test_inclusion_through_the_optimizer(shape, rank):
    """A fixed gradient, a refresh at every step. Without the noise in common that tames chance in the tests
    above."""
    steps = 400
    grad, law = law_of(*shape, "exp(-i/6)", 16)
    weight = torch.nn.Parameter(torch.zeros(shape, device=DEVICE))
    optimizer = lrk.I3SAdamW([{"params": [weight], "rank": rank, "update_proj_gap": 1}], lr=1e-3)
    found = torch.zeros_like(law.sigma)
    for _ in range(steps):
        weight.grad = grad.clone()
        optimizer.step()
        found += law.of_basis(optimizer.state[weight]["basis"])
    found /= steps
    top = law.top(law.exact)
    assert abs(law.top(found) - top) <= sampling.LIMIT + 4 * (top * (1 - top) / steps) ** 0.5
    assert abs(law.mass(found) - law.mass(law.exact)) <= sampling.LIMIT + 0.5 * (rank * steps) ** -0.5 * 4
    assert law.null(found) <= sampling.NULL_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("beyond", [1, 2, 5])
def test_a_cliff_just_behind_what_is_known(refresh_implementation, beyond):
    """rank(G) = 24 + 1, 2 or 5 of 144, 24 directions known: no more are drawn from the tail than it has."""
    generator = torch.Generator().manual_seed(beyond)
    left, right = (torch.linalg.qr(torch.randn(side, 24 + beyond, dtype=torch.float64, generator=generator))[0] for side in (144, 360))
    case = sampling.Case("cliff", (left @ right.mT).float(), 24 + beyond)
    law = sampling.Law(case, 8)
    found = sampling.measure(law, sampling.refreshes(case.grad.to(DEVICE), 8, 100, subspaces.choose_bases, together=10))
    assert sampling.holds(found), found


def values(name, count):
    index = torch.arange(1, count + 1, dtype=torch.float64)
    return {
        "1/i": 1 / index,
        "i^-0.25": index**-0.25,
        "i^-2": index**-2,
        "exp(-i/6)": torch.exp(-index / 6),
        "exp(-i/40)": torch.exp(-index / 40),
        "flat": torch.ones(count, dtype=torch.float64),
        "cliff": torch.where(index <= 21, 1, 1e-9).double(),
        "step": torch.where(index <= 16, 1, 0.1).double(),
        "linear": 1 - (index - 1) / count,
    }[name]


@pytest.mark.parametrize(
    "name, scale",
    [
        *((name, 1.0) for name in ("1/i", "i^-0.25", "i^-2", "exp(-i/6)", "exp(-i/40)", "flat", "cliff", "step", "linear")),
        *((name, scale) for name in ("1/i", "cliff") for scale in (1e-30, 1e30)),
    ],
)
def test_the_tail_has_the_sum_and_the_energy_of_what_was_left_out(name, scale):
    """From a block of so many columns that its moments are near to those that it estimates."""
    torch.manual_seed(0)
    count, known = 112, 16
    sigma = values(name, known + count) * scale
    tail = sigma[known:]
    block = (torch.diag(tail) @ torch.randn(count, 2000, dtype=torch.float64))[None]
    weights = tail_weights(block, sigma[None, :known], count, 12)[0]
    assert weights.sum() == pytest.approx(tail.sum().item(), rel=0.06)
    assert (weights / scale).square().sum() == pytest.approx((tail / scale).square().sum().item(), rel=0.06)
    if name == "cliff":
        assert (weights[6:] == 0).all()


def test_no_tail_where_nothing_is_left_out():
    for block in (torch.zeros(1, 50, 8), torch.full((1, 50, 8), torch.nan)):
        assert torch.equal(tail_weights(block, torch.ones(1, 16), 34, 12), torch.zeros(1, 34))
    one = tail_weights(torch.ones(1, 50, 1), torch.ones(1, 49), 1, 12)
    assert one.shape == (1, 1) and one > 0


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 700), (700, 256), (256, 256)], ids=str)
@pytest.mark.parametrize("share", [4, 16])
def test_what_is_sampled_is_orthonormal_whatever_the_gradient(refresh_implementation, shape, share):
    torch.manual_seed(0)
    rank, (m, n) = 256 // share, shape
    steep = torch.linalg.qr(torch.randn(m, 256))[0] * torch.logspace(0, -9, 256) @ torch.linalg.qr(torch.randn(n, 256))[0].mT
    thin = torch.randn(m, 3) @ torch.randn(3, n)
    rows = torch.ones(m, 1) @ torch.randn(1, n)
    grads = [torch.ones(shape), steep, thin, rows, rows * 1e-30, steep * 1e30, torch.randn(shape) * 1e-40]
    for grad in grads:
        settings = (rank, False, "importance", "randomized", 8, 1, 3, [5], torch.float32, None)
        (basis,) = subspaces.choose_bases([grad.to(DEVICE)], [], *settings)
        basis = basis.double()
        assert torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(rank).to(basis), ord=2) <= ORTHONORMAL
