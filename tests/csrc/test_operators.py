"""The compiled operators beside their defaults in PyTorch: the same draws, subspaces as good, whatever
threads there are."""

import pytest
import torch

import lowrank_kernels as lrk
from lowrank_kernels import extension, ops, philox, range_finder, subspaces
from lowrank_kernels.ops import parts
from lowrank_kernels.subspaces import SELECTIONS, SVDS

if not extension.loaded():
    pytest.skip("the extension is not built", allow_module_level=True)

SEEDS = [0, 1, -1, 2**63 - 1, 12345678901234567]


def choose(grads, rank, *, previous=(), seeds=None, found_inf=None, **options):
    settings = (
        dict(right=False, selection="importance", svd="randomized", oversample=8, power_iters=1, seed=7, dtype=torch.float32) | options
    )
    seeds = seeds or list(range(len(grads)))
    return subspaces.choose_bases(list(grads), list(previous), rank, seeds=seeds, found_inf=found_inf, **settings)


def in_pytorch(monkeypatch):
    for name in extension.OPERATORS:
        monkeypatch.setattr(parts, name, getattr(range_finder, name))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 1023])
def test_draws_are_those_of_the_pytorch_version(count):
    """A single column that is a Gaussian vector, normalised: what selection="random" gives at rank 1."""
    for seed in SEEDS:
        (basis,) = choose([torch.zeros(count, 3)], 1, selection="random", seeds=[seed])
        exact = philox.normal(philox.seed_tensor([seed], "cpu"), (count, 1), philox.BASIS, torch.float64)[0]
        assert torch.allclose(basis.double(), exact / exact.norm(), rtol=1e-5, atol=1e-7)


def test_sampling_draws_the_same_indices():
    sigma = torch.rand(200, 64)
    seeds = [philox.signed64(philox.derive_seed(3, row)) for row in range(200)]
    assert torch.equal(torch.ops.lowrank_kernels.sample_importance(sigma, 10, seeds), range_finder.sample_importance(sigma, 10, seeds))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("svd", SVDS)
@pytest.mark.parametrize("right", [False, True])
def test_selections_choose_what_they_choose_in_pytorch(monkeypatch, selection, svd, right):
    """On a spectrum with gaps, where directions are known to rounding and the same ones are drawn."""
    torch.manual_seed(0)
    left, other = torch.linalg.qr(torch.randn(40, 40))[0], torch.linalg.qr(torch.randn(70, 40))[0]
    grad = (left * 0.7 ** torch.arange(40)) @ other.mT
    grads = [grad.mT.contiguous() if right else grad] * 3
    compiled = choose(grads, 6, selection=selection, svd=svd, right=right)
    in_pytorch(monkeypatch)
    for ours, theirs in zip(compiled, choose(grads, 6, selection=selection, svd=svd, right=right), strict=True):
        assert lrk.subspace_overlap(ours, theirs) > 0.999
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("way", ["on a CPU", "as on a GPU"])
@pytest.mark.parametrize("shape", [(144, 320), (320, 144)])
def test_the_tail_is_drawn_as_in_pytorch(monkeypatch, way, shape):
    """On a spectrum with gaps, whose known directions are the same to rounding: so are the tail's, and what
    is drawn."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 144, dtype=torch.float64))[0] for side in shape)
    sigma = torch.cat([0.9 ** torch.arange(24), torch.full((120,), 0.03)]).double()
    grads = [((left * sigma) @ right.mT).float()] * 40
    if way == "as on a GPU":
        monkeypatch.setattr(range_finder, "may_look", lambda tensor: False)
    compiled, drawn = choose(grads, 8, power_iters=4), 0
    in_pytorch(monkeypatch)
    for ours, theirs in zip(compiled, choose(grads, 8, power_iters=4), strict=True):
        assert lrk.subspace_overlap(ours, theirs) > 0.99
        drawn += (1 - (left[:, :24].float().mT @ ours).square().sum(0)).sum().item()
    assert drawn > 40, "nothing to see: the tail was hardly drawn"


def test_bits_hang_on_no_thread_count():
    """Of what is drawn, that is; products of floating-point numbers may be summed in another order."""
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            indices = ops.sample_importance(torch.linspace(1, 2, 50_000)[None], 100, seed=3)
            (basis,) = choose([torch.zeros(100_000, 2)], 1, selection="random")
            found.append((indices, basis))
    finally:
        torch.set_num_threads(before)
    for indices, basis in found[1:]:
        assert torch.equal(indices, found[0][0]) and torch.allclose(basis, found[0][1], rtol=1e-6)


@pytest.mark.parametrize("shape, rank", [((256, 700), 64), ((700, 256), 64), ((256, 700), 16)])
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_memory_beyond_the_gradient(shape, rank, decay):
    """G may be copied once, where its transpose is wanted; all else is thin: a few times (m + n)·l, in fp64
    at most."""
    torch.manual_seed(0)
    grad = torch.randn(shape) * (torch.arange(1, shape[1] + 1) ** -decay)
    ops.range_finder(grad, rank)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.range_finder(grad, rank)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    thin = (shape[0] + shape[1]) * (rank + 8) * 4
    assert 0 < peak <= grad.numel() * 4 + 6 * thin


def test_a_skipped_step_or_a_bad_gradient_costs_no_work_and_keeps_the_basis():
    grads, previous = [torch.full((30, 40), float("nan")), torch.randn(30, 40)], [torch.randn(30, 4), torch.randn(30, 4)]
    kept, fresh = choose(grads, 4, previous=previous)
    assert torch.equal(kept, previous[0]) and kept.data_ptr() != previous[0].data_ptr()
    assert not torch.equal(fresh, previous[1])
    skipped = choose(grads, 4, previous=previous, found_inf=torch.ones(1))
    assert all(torch.equal(a, b) for a, b in zip(skipped, previous, strict=True))


@pytest.mark.gpu
def test_refresh_does_not_wait_for_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("only a GPU can be synchronised with")
    for shape, rank in (((256, 700), 64), ((700, 256), 16), ((64, 64), 60), ((1500, 1500), 1400)):
        grads = [torch.randn(shape, device="cuda") for _ in range(3)]
        for selection in SELECTIONS:
            choose(grads, rank, selection=selection)  # libraries make their handles
            torch.cuda.set_sync_debug_mode("error")
            try:
                choose(grads, rank, selection=selection)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["auto", "jacobi", "cusolver"])
@pytest.mark.parametrize("l, batch", [(1, 3), (2, 3), (32, 5), (33, 5), (136, 4), (520, 2), (2056, 1)])
def test_each_solver_of_a_gpu_gives_eigenvectors(solver, l, batch):
    """Without a wait of torch's. Residuals in fp64; Jacobi shifts by (2l + terms)·u = 6·l·u, relative to the
    largest element of the diagonal."""
    if not torch.cuda.is_available():
        pytest.skip("a CPU has LAPACK alone")
    torch.manual_seed(0)
    rows = torch.randn(batch, l, 4 * l, dtype=torch.float64, device="cuda") / torch.arange(1, l + 1, device="cuda")[:, None]
    rows[0] = 0
    gram = rows @ rows.mT
    parts.eigh(gram, 4 * l, solver)  # libraries make their handles
    torch.cuda.set_sync_debug_mode("error")
    try:
        vectors, values = parts.eigh(gram, 4 * l, solver)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    bound = 32 * l * 2.0**-53
    assert ((values[:, :-1] >= values[:, 1:]) & (values[:, 1:] >= 0)).all() and not values[0].any()
    assert (vectors.mT @ vectors - torch.eye(l, device="cuda")).norm(dim=(-2, -1)).le(bound * l**0.5).all()
    residual = (vectors * values[:, None] @ vectors.mT - gram).norm(dim=(-2, -1))
    assert residual.le(bound * l**0.5 * gram.norm(dim=(-2, -1))).all()


def test_the_shift_of_a_power_iteration_makes_it_more_accurate(monkeypatch):
    """On Gaussian noise: the compiled one finds more than a plain iteration of as many products with G·Gᵀ
    does."""
    monkeypatch.setattr(range_finder, "GRAM_STEPS", 3)
    energies = {"plain": 0.0, "compiled": 0.0}
    for seed in range(4):
        grad = torch.randn(256, 700, generator=torch.Generator().manual_seed(seed))
        best = torch.linalg.svdvals(grad)[:64].square().sum()
        for name, find in {"plain": range_finder.leading, "compiled": parts.leading}.items():
            basis, _ = find([grad], parts.peaks([grad]), 64, 8, 1, seed)
            energies[name] += ((basis[0].mT @ grad).square().sum() / best / 4).item()
    assert energies["compiled"] > energies["plain"] + 0.004
