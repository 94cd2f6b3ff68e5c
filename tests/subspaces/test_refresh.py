"""The selections, the sampling over sketch and tail, and when a refresh keeps the old basis."""

import itertools
import math

import pytest
import torch

import lowrank_kernels as lrk
from lowrank_kernels import ops
from lowrank_kernels.subspaces import BLIND, SELECTIONS, SVDS, own_memory

pytestmark = pytest.mark.usefixtures("refresh_implementation")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORTHONORMAL = 1e-5
ORTHONORMAL_ONES = [selection for selection in SELECTIONS if selection != "gaussian"]


one_way = pytest.mark.parametrize("refresh_implementation", ["operators"], indirect=True)
"""For what is the same on every way."""


def defect(basis):
    basis = basis.double()
    return torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(basis.shape[-1]).to(basis), ord=2).max().item()


def with_spectrum(m, n, sigma):
    left = torch.linalg.qr(torch.randn(m, len(sigma), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, len(sigma), dtype=torch.float64))[0]
    return ((left * torch.as_tensor(sigma, dtype=torch.float64)) @ right.mT).float().to(DEVICE), left.float().to(DEVICE)


def fresh(grads, rank, *, previous=None, seed=0, number=0, right=False, places=None, dtype=torch.float32, **options):
    settings = dict(selection="importance", svd="randomized", oversample=8, power_iters=1) | options
    places = places or [(index, 0) for index in range(len(grads))]
    settings |= dict(rank=rank, right=right, seed=seed, refresh_number=number, places=places, dtype=dtype)
    return ops.choose_bases(grads, previous, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ORTHONORMAL_ONES)
@pytest.mark.parametrize("shape, rank", [((40, 100), 8), ((100, 40), 40), ((30, 30), 30), ((1, 9), 1), ((9, 1), 1), ((64, 65), 20)])
def test_every_selection_gives_an_orthonormal_basis(refresh_implementation, selection, shape, rank):
    torch.manual_seed(0)
    svds = SVDS if refresh_implementation == "operators" else SVDS[:1]  # an exact one is the same on every way
    for svd, right, scale in itertools.product(svds, (False, True), (1.0, 1e-30, 1e30)):
        grads = [torch.randn(shape, device=DEVICE) * scale for _ in range(3)]
        grads[1] = grads[1][:, :1] @ (grads[1][:1, :] / scale)  # rank 1
        for basis in fresh(grads, rank, right=right, selection=selection, svd=svd):
            assert basis.shape == (shape[1] if right else shape[0], rank)
            assert defect(basis) <= ORTHONORMAL, (svd, right, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ORTHONORMAL_ONES)
@pytest.mark.parametrize("svd", SVDS)
@pytest.mark.parametrize("shape, rank", [((40, 100), 8), ((100, 40), 40), ((64, 65), 3)])
def test_a_gradient_of_zeros_chooses_no_basis(selection, svd, shape, rank):
    """Zeros at the first refresh, the old one later; but for random ones, which need no gradient. The rest of
    the batch has its own."""
    torch.manual_seed(0)
    grads = [torch.randn(shape, device=DEVICE), torch.zeros(shape, device=DEVICE)]
    first = fresh(grads, rank, selection=selection, svd=svd)
    assert defect(first[0]) <= ORTHONORMAL
    second = fresh(grads, rank, previous=[first[1], first[0]], number=1, selection=selection, svd=svd)
    assert defect(second[0]) <= ORTHONORMAL
    if selection in BLIND:
        assert defect(first[1]) <= ORTHONORMAL and not torch.equal(second[1], first[0])
    else:
        assert not first[1].any() and torch.equal(second[1], first[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gaussian_basis_needs_no_gradient_and_follows_its_matrix_alone(dtype):
    """N(0, 1/r), another one at each refresh and for each matrix, whatever the gradient but one that is not
    finite."""
    grads = [torch.randn(60, 300, device=DEVICE), torch.zeros(60, 300, device=DEVICE)]
    first = fresh(grads, 16, selection="gaussian", dtype=dtype)
    second = fresh([grads[0] * torch.nan, grads[1]], 16, previous=first, number=1, selection="gaussian", dtype=dtype)
    assert all(basis.dtype == dtype and basis.shape == (60, 16) for basis in first)
    assert torch.equal(second[0], first[0]) and not torch.equal(second[1], first[1]) and not torch.equal(first[0], first[1])
    alone = fresh([grads[1]], 16, selection="gaussian", dtype=dtype, places=[(1, 0)])
    assert torch.equal(alone[0], first[1])
    entries = 4 * torch.stack(first).float()
    assert abs(entries.mean()) < 0.1 and abs(entries.var() - 1) < 0.15


@one_way
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 20, 6), (20, 6)])
def test_a_basis_owns_its_memory_and_no_more(shape):
    part = torch.randn(2, *shape, device=DEVICE)[1]
    own = own_memory(part)
    assert torch.equal(own, part) and own.untyped_storage().nbytes() == part.numel() * 4
    assert (own.mT if DEVICE == "cpu" else own).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("svd", SVDS)
def test_dominant_is_the_top_of_the_spectrum(svd):
    torch.manual_seed(0)
    grad, left = with_spectrum(60, 150, [2.0**-k for k in range(30)])
    (basis,) = fresh([grad], 6, selection="dominant", svd=svd)
    assert lrk.subspace_overlap(basis, left[:, :6]) > 0.999


def test_random_needs_no_gradient():
    a, b = (fresh([grad], 5, selection="random")[0] for grad in (torch.randn(20, 30), torch.zeros(20, 30)))
    assert torch.equal(a, b)
    mean = torch.stack([p @ p.mT for p in fresh([torch.zeros(20, 30)] * 1000, 5, selection="random")]).mean(0)
    assert (mean - 0.25 * torch.eye(20)).abs().max() < 5 * 0.25 / math.sqrt(1000)  # E[PPᵀ] = (r/m)·I


@pytest.mark.gpu
def test_importance_samples_singular_vectors_by_their_value():
    """With the whole spectrum known, how often each direction is in the basis is the law of
    torch.multinomial."""
    torch.manual_seed(0)
    draws, rank, sigma = 6000, 3, [8.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.1]
    grad, left = with_spectrum(8, 20, sigma)
    for svd in SVDS:
        bases = torch.stack(fresh([grad] * draws, rank, svd=svd))
        parts = (left.mT @ bases).abs()
        assert ((parts > 0.99).sum(1) == 1).all(), "columns are singular vectors"
        frequency = (parts > 0.99).any(-1).float().mean(0).cpu()
        drawn = torch.multinomial(torch.tensor(sigma).expand(200_000, -1), rank, replacement=False)
        expected = torch.zeros(8).scatter_add_(0, drawn.flatten(), torch.ones(drawn.numel())) / len(drawn)
        assert ((frequency - expected).abs() < 5.5 * (expected * (1 - expected) / draws).sqrt() + 3e-3).all()
        order = parts.argmax(1)
        assert (order[:, :-1] < order[:, 1:]).all(), "columns are sorted by σ"


@pytest.mark.gpu
def test_importance_over_a_sketch_draws_the_tail_as_often_as_it_weighs():
    """16 directions of 144 known: a draw of one of the others gives a direction outside of them, as often as
    they weigh."""
    torch.manual_seed(0)
    m, rank, draws = 144, 4, 600
    sigma = torch.cat([torch.linspace(8, 4, 16), torch.full((128,), 1.0)])
    grad, left = with_spectrum(m, 200, sigma)
    bases = torch.stack(fresh([grad] * draws, rank, power_iters=4))
    assert max(defect(basis) for basis in bases[:200]) <= ORTHONORMAL
    inside = (left[:, :16].mT @ bases).square().sum(1)  # (draws, r), near 1 for a known direction and 0 for a tail one
    assert ((inside < 0.1) | (inside > 0.9)).float().mean() > 0.995
    weights = sigma.expand(100_000, -1)
    expected = (torch.multinomial(weights, rank, replacement=False) < 16).float().mean().item()
    found = (inside > 0.5).float().mean().item()
    assert abs(found - expected) < 5.5 * math.sqrt(expected * (1 - expected) / (draws * rank)) + 0.01


def test_tail_of_a_low_rank_gradient_is_not_drawn():
    torch.manual_seed(0)
    grad, left = with_spectrum(64, 128, [1.0] * 8)
    for basis in fresh([grad] * 50, 8):
        assert lrk.subspace_overlap(basis, left) > 0.999


@pytest.mark.parametrize("selection", ["importance", "random"])
def test_draws_are_a_function_of_seed_place_and_refresh(selection):
    torch.manual_seed(0)
    grad = torch.randn(40, 90)

    def draw(seed=0, number=0, place=(0, 0), others=()):
        return fresh([grad, *others], 6, selection=selection, seed=seed, number=number, places=[place, *[(9, 9)] * len(others)])[0]

    base = draw()
    assert torch.equal(base, draw())
    assert torch.allclose(base, draw(others=[torch.randn(40, 90)]), atol=1e-4), "not of what else is in the batch"
    for other in (draw(seed=1), draw(number=1), draw(place=(1, 0)), draw(place=(0, 1))):
        assert lrk.subspace_overlap(base, other) < 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ORTHONORMAL_ONES)
@pytest.mark.parametrize("svd", SVDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_keeps_the_old_basis(selection, svd, poison):
    torch.manual_seed(0)
    grads = [torch.randn(20, 50, device=DEVICE) for _ in range(3)]
    grads[1][3, 4] = poison
    first = fresh(grads, 4, selection=selection, svd=svd)
    assert all(basis.isfinite().all() and defect(basis) <= ORTHONORMAL for basis in first)
    second = fresh(grads, 4, previous=first, number=1, selection=selection, svd=svd)
    assert torch.equal(second[1], first[1])
    if selection != "dominant":
        assert not torch.equal(second[0], first[0]) and not torch.equal(second[2], first[2])


@pytest.mark.gpu
def test_found_inf_keeps_every_old_basis():
    grads = [torch.randn(20, 50, device=DEVICE) for _ in range(2)]
    first = fresh(grads, 4)
    skipped = fresh(grads, 4, previous=first, number=1, found_inf=torch.ones(1, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(first, skipped, strict=True))
    taken = fresh(grads, 4, previous=first, number=1, found_inf=torch.zeros(1, device=DEVICE))
    assert not any(torch.equal(a, b) for a, b in zip(first, taken, strict=True))


@pytest.mark.gpu
def test_chunks_change_nothing(monkeypatch):
    grads = [torch.randn(20, 50, device=DEVICE) for _ in range(5)]
    whole = fresh(grads, 4)
    monkeypatch.setattr("lowrank_kernels.subspaces.refresh.CHUNK_ELEMENTS", {DEVICE: 2 * 70 * 16})
    for a, b in zip(whole, fresh(grads, 4), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.gpu
def test_basis_is_cast_after_it_is_orthonormal():
    grads = [torch.randn(64, 200, device=DEVICE).bfloat16()]
    (half,) = fresh(grads, 16, dtype=torch.bfloat16)
    (full,) = fresh(grads, 16, dtype=torch.float32)
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())
    assert defect(full) <= ORTHONORMAL


@one_way
def test_overlap():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 40, 8))[0]
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    assert torch.allclose(lrk.subspace_overlap(basis, basis @ rotation), torch.ones(3), atol=1e-5)
    complement = torch.linalg.qr(torch.cat([basis[0], torch.randn(40, 8)], dim=-1))[0][:, 8:]
    assert lrk.subspace_overlap(basis[0], complement) < 1e-10
    half = torch.cat([basis[0][:, :4], complement[:, :4]], dim=-1)
    assert lrk.subspace_overlap(basis[0], half).item() == pytest.approx(0.5, abs=1e-5)
    assert lrk.subspace_overlap(basis.bfloat16(), basis.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="same shape"):
        lrk.subspace_overlap(basis[0], basis[0][:, :4])


@pytest.mark.parametrize("selection", ORTHONORMAL_ONES)
@pytest.mark.parametrize("svd", SVDS)
def test_autocast_and_autograd_do_not_reach_in(selection, svd):
    torch.manual_seed(0)
    grads = [torch.randn(60, 150, requires_grad=True) for _ in range(2)]
    plain = fresh([grad.detach() for grad in grads], 14, selection=selection, svd=svd)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fresh(grads, 14, selection=selection, svd=svd)
        basis, sigma = ops.range_finder(grads[0], 14)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert not any(tensor.requires_grad for tensor in (*inside, basis, sigma))
    assert basis.dtype == torch.float32 and defect(basis) <= ORTHONORMAL


@one_way
def test_exact_vectors_are_orthonormal_where_lapacks_are_not():
    (basis,) = fresh([torch.ones(300, 300)], 290, selection="dominant", svd="exact")
    assert defect(torch.linalg.svd(torch.ones(300, 300))[0][:, :290]) > ORTHONORMAL, "nothing to see"
    assert defect(basis) <= ORTHONORMAL


@one_way
@pytest.mark.gpu
@pytest.mark.parametrize("selection", ["dominant", "importance"])
@pytest.mark.parametrize("shape", [(2048, 256), (256, 2048)], ids=str)
def test_exact_vectors_of_equal_elements_are_orthonormal(refresh_implementation, shape, selection):
    """Products of equal elements are rounded the same way, so that their errors add up."""
    (basis,) = fresh([torch.ones(shape, device=DEVICE)], 64, selection=selection, svd="exact")
    assert defect(basis) <= ORTHONORMAL / 4


@one_way
@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e38])
def test_an_exact_svd_is_handed_numbers_around_one(monkeypatch, scale):
    """cuSOLVER does not scale, so that squares of larger ones would overflow, and those of smaller ones
    vanish."""
    grad = torch.nn.functional.normalize(torch.randn(40, 60, dtype=torch.float64, device=DEVICE), dim=1)
    grad = (grad * scale * torch.logspace(0, -3, 40, dtype=torch.float64, device=DEVICE)[:, None]).float()
    peaks, svd = [], torch.linalg.svd
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", lambda matrix, **options: peaks.append(matrix.abs().max().item()) or svd(matrix, **options))
        (basis,) = fresh([grad], 8, selection="dominant", svd="exact")
    assert peaks and all(0.4 < peak <= 1 for peak in peaks)
    exact = torch.linalg.svd(grad.double() / scale)[0][:, :8]
    assert defect(basis) <= ORTHONORMAL / 4
    assert (basis.double().mT @ exact).square().sum() / 8 > (0.999 if scale > 1e-38 else 0.9)  # of 1e-40 few bits are left


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e38), (torch.float64, 1e200), (torch.float64, 1e-200)])
def test_a_large_finite_gradient_is_no_reason_to_keep_the_old_basis(dtype, scale):
    grad = torch.diag(torch.tensor([1.0, 3.0, 1.0], dtype=dtype)) * scale
    (basis,) = fresh([grad], 1, previous=[torch.eye(3, dtype=dtype)[:, :1]], selection="dominant", number=1, dtype=dtype)
    assert basis[1].abs() == pytest.approx(1, abs=1e-5)


@one_way
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(grads=[]), "at least one"),
        (dict(previous=[torch.eye(20)[:, :4]]), "previous must be empty or hold a basis for each of the 2"),
        (dict(places=[(0, 0)]), "a seed for each of the 2"),
        (dict(selection="best"), "selection must be one of"),
        (dict(svd="fast"), "svd must be one of"),
    ],
)
def test_lists_and_names_that_do_not_fit(change, message):
    settings = dict(grads=[torch.randn(20, 30)] * 2, rank=4) | change
    with pytest.raises(ValueError, match=message):
        fresh(settings.pop("grads"), settings.pop("rank"), **settings)
