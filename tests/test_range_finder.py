"""Orthonormalisation, the range finder and the sampling law, on spectra and shapes that hurt."""

import math
import threading
import warnings
from itertools import permutations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_kernels import ops, philox, precision, range_finder
from lowrank_kernels.ops import parts
from lowrank_kernels.subspaces.importance import complement

pytestmark = pytest.mark.usefixtures("refresh_implementation")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORTHONORMAL = 1e-5  # DESIGN: a basis is orthonormal to 1e-5 before it is cast; here in the spectral norm


two_ways = pytest.mark.parametrize("refresh_implementation", ["operators", "PyTorch"], indirect=True)
"""For sampling, which is the same over a batch."""
one_way = pytest.mark.parametrize("refresh_implementation", ["operators"], indirect=True)
"""For what is checked before an operator runs."""


def defect(basis):
    basis = basis.double()
    eye = torch.eye(basis.shape[-1], dtype=torch.float64, device=basis.device)
    return torch.linalg.matrix_norm(basis.mT @ basis - eye, ord=2).max().item()


def with_spectrum(m, n, sigma, dtype=torch.float32):
    k = len(sigma)
    left = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0]
    return ((left * sigma.double()) @ right.mT).to(dtype).to(DEVICE)


def hurtful_matrices(m, columns):
    """(name, matrix) of shape (m, columns) for orthonormalise."""
    k = columns
    yield "zero", torch.zeros(m, k)
    yield "ones", torch.ones(m, k)
    yield "rank 1", torch.randn(m, 1) @ torch.randn(1, k)
    yield "rank k/2", torch.randn(m, max(1, k // 2)) @ torch.randn(max(1, k // 2), k)
    for exponent in (2, 4, 6, 7, 9):
        yield f"condition 1e{exponent}", with_spectrum(m, k, torch.logspace(0, -exponent, k)).cpu()
    for scale in (1e-38, 1e-30, 1e30):
        yield f"scale {scale}", torch.randn(m, k) * scale
    yield "graded columns", torch.randn(m, k) * torch.logspace(-30, 30, k)
    yield "NaN", torch.randn(m, k).index_put((torch.tensor(m // 2), torch.tensor(k // 2)), torch.tensor(math.nan))
    yield "infinity", torch.randn(m, k).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.inf))


@pytest.mark.gpu
@pytest.mark.parametrize("m, columns", [(1, 1), (5, 3), (64, 1), (64, 64), (65, 64), (300, 137), (700, 40)])
def test_orthonormalise_gives_a_full_orthonormal_set(m, columns):
    torch.manual_seed(m * 1000 + columns)
    for name, matrix in hurtful_matrices(m, columns):
        basis = ops.orthonormalise(matrix.to(DEVICE), seed=m)
        assert defect(basis) <= ORTHONORMAL, name


@pytest.mark.gpu
@pytest.mark.parametrize("m, seeds", [(128, 3), (300, 1), pytest.param(513, 3, marks=pytest.mark.slow)])
def test_orthonormalise_square_or_nearly(m, seeds):
    """Where no room is left, completion is badly conditioned: rank 16 of m, a decay to 1e-8 and beyond, all
    but one column random."""
    for columns in (m, m - 1):
        for seed in range(seeds):
            torch.manual_seed(seed)
            low_rank = torch.randn(m, 16) @ torch.randn(16, columns)
            for name, matrix in {
                "rank 16": low_rank,
                "decay": with_spectrum(m, columns, torch.logspace(0, -8, columns)).cpu(),
                "more decay": with_spectrum(m, columns, torch.logspace(0, -15, columns)).cpu(),
                "duplicates": torch.randn(m, 1).expand(m, columns) + 0.0,
            }.items():
                assert defect(ops.orthonormalise(matrix.to(DEVICE), seed=seed)) <= ORTHONORMAL, (name, columns, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("m, n, rank", [pytest.param(512, 1400, 503, marks=pytest.mark.slow), (300, 300, 291), (257, 900, 248)])
def test_range_finder_with_hardly_a_direction_to_spare(m, n, rank):
    for seed in range(3):
        torch.manual_seed(seed)
        basis, _ = ops.range_finder(with_spectrum(m, n, torch.logspace(0, -15, m)), rank, seed=seed)
        assert defect(basis) <= ORTHONORMAL


@pytest.fixture(params=["legacy", "per backend"])
def reduced_precision(request):
    """fp32 products allowed in less, by torch's old setting and by its new one, put back in the end."""
    matmuls = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [matmul.fp32_precision for matmul in matmuls]
    if request.param == "legacy":
        torch.set_float32_matmul_precision("medium")
        yield
        torch.set_float32_matmul_precision("highest")
    else:
        matmuls[0].fp32_precision, matmuls[1].fp32_precision = "tf32", "bf16"
        yield
    for matmul, value in zip(matmuls, before, strict=True):
        matmul.fp32_precision = value


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one setting only")
def test_a_basis_is_orthonormal_where_products_may_be_less_precise(reduced_precision):
    allowed = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    for shape in ((300, 500), (200, 200)):
        assert defect(ops.range_finder(torch.randn(shape, device=DEVICE), 60)[0]) <= ORTHONORMAL
    assert defect(ops.orthonormalise(torch.randn(300, 200, device=DEVICE))) <= ORTHONORMAL
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == allowed


class RecordPrecision(TorchDispatchMode):
    """What fp32 products are allowed when each one is made in Python: a CPU may be exact all the same, so the
    result would not tell."""

    def __init__(self):
        super().__init__()
        self.allowed = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm) and args[0].dtype == torch.float32:
            self.allowed.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


@one_way
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one setting only")
def test_what_makes_a_basis_orthonormal_runs_in_full_precision(reduced_precision):
    matrix, basis = torch.randn(2, 60, 40), torch.linalg.qr(torch.randn(2, 60, 10))[0]
    for run in (
        lambda: complement(basis, matrix[..., :20], 0),
        lambda: range_finder.leading([matrix], range_finder.peaks([matrix]), 40, 0, 1, 0),
    ):
        with RecordPrecision() as record:
            run()
        assert record.allowed == {("ieee", "ieee")}


@one_way
def test_tf32_is_allowed_where_torch_allows_it(reduced_precision):
    assert precision.tf32_allowed()
    with precision.full_precision():
        assert not precision.tf32_allowed()
    assert precision.tf32_allowed()


@pytest.fixture
def sums_allowed():
    """(in bf16 or not, whether sums may be split) at each product with a matrix of 96 × 40, whoever asks for
    it, in C++ too."""
    found = []

    def product(a, b):
        if (96, 40) in {shape for factor in (a, b) for shape in (factor.shape[-2:], factor.mT.shape[-2:])}:
            found.append(cublas_sums())
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)

    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel of torch's is overridden
        for name in ("mm", "bmm"):
            library.impl(name, product, "CPU")
        yield found


def cublas_sums():
    return torch._C._get_cublas_allow_bf16_reduced_precision_reduction()


@pytest.mark.skipif(torch.cuda.is_available(), reason="products on a GPU are not seen")
@pytest.mark.parametrize("allowed", [True, False, "unless split"])
def test_sums_of_products_with_the_gradient_are_never_in_bf16(refresh_implementation, sums_allowed, allowed):
    grads = torch.randn(2, 96, 40)
    matmul = torch.backends.cuda.matmul
    if allowed == "unless split" and not isinstance(cublas_sums(), tuple):
        pytest.skip("this torch has no such setting")
    matmul.allow_bf16_reduced_precision_reduction = (False, False) if allowed == "unless split" else allowed
    before = cublas_sums()
    try:
        if refresh_implementation != "PyTorch":  # whose other products with the gradient are in fp32
            ops.range_finder(grads, 2, oversample=2)
            assert cublas_sums() == before
        for _ in range(4):
            parts.multiply([grads], torch.ones(2, 40, 3))
        with pytest.raises(RuntimeError):
            parts.multiply([grads], torch.ones(3, 3))
        assert cublas_sums() == before
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True
    expected = before if allowed == "unless split" else (False, True) if isinstance(before, tuple) else False
    assert len(sums_allowed) >= 4 and set(sums_allowed) == {expected}


@pytest.mark.gpu
def test_orthonormalise_keeps_the_span_and_its_nesting():
    torch.manual_seed(0)
    matrix = with_spectrum(300, 50, torch.logspace(0, -4, 50))
    basis = ops.orthonormalise(matrix)
    for columns in (1, 7, 50):
        head, part = basis[:, :columns].double(), matrix[:, :columns].double()
        assert (part - head @ (head.mT @ part)).norm() <= 1e-5 * part.norm()


def test_orthonormalise_in_fp64_is_as_good_as_fp64():
    torch.manual_seed(0)
    assert defect(ops.orthonormalise(with_spectrum(200, 60, torch.logspace(0, -12, 60), torch.float64))) <= 1e-13


def decaying(k):
    return [torch.logspace(0, -6, k), torch.logspace(0, -4, k), 1 / torch.arange(1.0, k + 1), 1 / torch.arange(1.0, k + 1).sqrt()]


@pytest.mark.gpu
@pytest.mark.parametrize("m, n", [(96, 256), (256, 96), (128, 128)])
@pytest.mark.parametrize("power_iters", [1, 2])
def test_energy_of_decaying_spectra(m, n, power_iters):
    """As good as torch.svd_lowrank, the Householder version of the same algorithm, with as many columns and
    iterations."""
    torch.manual_seed(m + n)
    rank, oversample = 24, 8
    for sigma in decaying(min(m, n)):
        grad = with_spectrum(m, n, sigma)
        basis, found = ops.range_finder(grad, rank, oversample=oversample, power_iters=power_iters, seed=1)
        best = sigma[:rank].square().sum().item()
        energy = (basis.mT @ grad).square().sum().item() / best
        householder = torch.svd_lowrank(grad, q=rank + oversample, niter=power_iters)[0][:, :rank]
        assert energy >= (householder.mT @ grad).square().sum().item() / best - 0.02
        assert energy >= (0.97, 0.99)[power_iters - 1]
        assert (found[: rank // 2].cpu() / sigma[: rank // 2] - 1).abs().max() <= (0.05, 0.01)[power_iters - 1]
        assert defect(basis) <= ORTHONORMAL
        assert (found[:-1] >= found[1:]).all()


@pytest.mark.gpu
def test_energy_of_flat_and_stepped_spectra():
    torch.manual_seed(0)
    flat, stepped = torch.ones(128), torch.cat([torch.ones(12), torch.full((116,), 1e-3)])
    for sigma in (flat, stepped):
        grad = with_spectrum(128, 300, sigma)
        basis, _ = ops.range_finder(grad, 24)
        assert (basis.mT @ grad).square().sum() >= 0.95 * sigma[:24].square().sum()
    noise = torch.randn(128, 300, device=DEVICE)
    basis, _ = ops.range_finder(noise, 24)
    assert (basis.mT @ noise).square().sum() >= 0.85 * torch.linalg.svdvals(noise)[:24].square().sum()


@pytest.mark.parametrize("m, n", [(40, 90), (90, 40), (33, 33)])
def test_whole_spectrum_agrees_with_svd(m, n):
    torch.manual_seed(m)
    sigma = torch.logspace(0, -5, min(m, n))
    grad = with_spectrum(m, n, sigma)
    basis, found = ops.range_finder(grad, 20, oversample=100)
    vectors = torch.linalg.svd(grad.double(), full_matrices=False).U[:, :20].to(basis.dtype)
    assert torch.allclose(found.cpu(), sigma[:20], rtol=1e-3)
    assert (vectors[:, :10].mT @ basis[:, :10]).square().sum() >= 10 * 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 3, 5), (3, 2), (50, 49)])
def test_shapes_that_hurt(shape):
    torch.manual_seed(0)
    for grad in (torch.randn(shape), torch.zeros(shape), torch.ones(shape), torch.randn(shape) * 1e-30, torch.randn(shape) * 1e30):
        for rank in {1, min(shape[-2:])}:
            basis, sigma = ops.range_finder(grad.to(DEVICE), rank)
            assert basis.shape == (*shape[:-1], rank) and sigma.shape == (*shape[:-2], rank)
            assert defect(basis) <= ORTHONORMAL
            assert sigma.isfinite().all()
            exact = torch.linalg.svdvals(grad.double())[..., :rank].to(DEVICE)
            assert torch.allclose(sigma.double(), exact, rtol=0.2, atol=1e-5 * grad.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_dtypes_and_scales(dtype, scale):
    torch.manual_seed(0)
    sigma = torch.logspace(0, -3, 60)
    grad = (with_spectrum(60, 150, sigma, torch.float64) * scale).to(dtype)
    if not grad.isfinite().all() or (grad == 0).all():
        pytest.skip(f"{dtype} does not hold {scale}")
    basis, found = ops.range_finder(grad, 16)
    assert basis.dtype == found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert defect(basis) <= ORTHONORMAL
    best = torch.linalg.svdvals(grad.double())[:16]
    assert (basis.double().mT @ grad.double()).square().sum() >= 0.97 * best.square().sum()
    assert ((found.double() - best).abs() <= 0.05 * best).all()


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [4, 30])
def test_not_finite_gives_nan_sigma_and_a_basis(poison, rank):
    grad = torch.randn(3, 30, 70, device=DEVICE)
    grad[1, 5, 6] = poison
    basis, sigma = ops.range_finder(grad, rank)
    assert sigma.isnan().any(-1).tolist() == [False, True, False]
    assert basis.isfinite().all() and defect(basis) <= ORTHONORMAL
    clean, _ = ops.range_finder(grad[::2], rank)
    assert torch.allclose(clean, basis[::2], atol=1e-4)


@pytest.mark.gpu
def test_same_in_a_batch_and_alone_and_on_strided_input():
    torch.manual_seed(0)
    grads = torch.randn(4, 40, 110, device=DEVICE)
    batch, sigma = ops.range_finder(grads, 8, seed=5)
    for number, grad in enumerate(grads):
        alone, its_sigma = ops.range_finder(grad, 8, seed=5)
        assert torch.allclose(alone @ alone.mT, batch[number] @ batch[number].mT, atol=1e-4)
        assert torch.allclose(its_sigma, sigma[number], rtol=1e-4)
        strided, _ = ops.range_finder(grad.mT.contiguous().mT, 8, seed=5)
        assert torch.allclose(strided @ strided.mT, alone @ alone.mT, atol=1e-4)


def test_a_function_of_the_seed():
    grad = torch.randn(60, 200)
    first, second, other = (ops.range_finder(grad, 8, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@one_way
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(rank=0), "rank must be an int from 1 to 20"),
        (dict(rank=21), "rank must be an int from 1 to 20"),
        (dict(rank=True), "rank must be"),
        (dict(rank=2.0), "rank must be"),
        (dict(rank=2, oversample=-1), "oversample must be an int ≥ 0"),
        (dict(rank=2, power_iters=0.5), "power_iters must be an int ≥ 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.range_finder(torch.randn(20, 30), **arguments)


@one_way
def test_bad_gradients():
    for grad in (torch.ones(4, 4, dtype=torch.int32), torch.ones(4, 4, dtype=torch.complex64), torch.eye(4).to_sparse()):
        with pytest.raises(TypeError, match="dense real floating-point"):
            ops.range_finder(grad, 2)
    for grad in (torch.ones(4), torch.ones(0, 4)):
        with pytest.raises(ValueError, match="shape"):
            ops.range_finder(grad, 2)
    with pytest.raises(ValueError, match="1 ≤ l ≤ m"):
        ops.orthonormalise(torch.ones(3, 4))


def subset_probabilities(sigma, rank):
    """Exact law of successive sampling: {sorted index tuple: probability}."""
    law = {}
    for order in permutations(range(len(sigma)), rank):
        probability, left = 1.0, sum(sigma)
        for index in order:
            probability *= sigma[index] / left
            left -= sigma[index]
        law[tuple(sorted(order))] = law.get(tuple(sorted(order)), 0.0) + probability
    return law


def chi_squared(rows, law):
    counts = {}
    for row in rows.sort(dim=-1).values.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert set(counts) <= set(law)
    rare = [s for s, p in law.items() if len(rows) * p < 10]  # one cell together, for the statistic needs expected counts
    cells = [(counts.get(s, 0), law[s]) for s in law if s not in rare]
    if rare:
        cells.append((sum(counts.get(s, 0) for s in rare), sum(law[s] for s in rare)))
    return sum((count - len(rows) * p) ** 2 / (len(rows) * p) for count, p in cells), len(cells) - 1


def chi_squared_limit(freedom):
    """The value that chance exceeds with probability about 1e-6 (Wilson–Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3


@two_ways
@pytest.mark.gpu
@pytest.mark.parametrize("sigma, rank", [([4.0, 3.0, 2.0, 1.0, 0.5], 3), ([1.0] * 6, 2), ([100.0, 1.0, 0.1, 0.1], 2)])
def test_sampling_law_is_that_of_multinomial(sigma, rank):
    draws = 30_000
    law = subset_probabilities(sigma, rank)
    weights = torch.tensor(sigma, device=DEVICE).expand(draws, -1)
    ours, freedom = chi_squared(ops.sample_importance(weights, rank, seed=0), law)
    torch.manual_seed(0)
    theirs, _ = chi_squared(torch.multinomial(weights, rank, replacement=False), law)
    limit = chi_squared_limit(freedom)
    assert theirs < limit, "the test's law is wrong"
    assert ours < limit


@two_ways
def test_sampled_indices_are_distinct_sorted_by_sigma_and_scale_free():
    sigma = torch.rand(500, 40)
    chosen = ops.sample_importance(sigma, 12, seed=3)
    assert all(len(set(row)) == 12 for row in chosen.tolist())
    picked = sigma.gather(-1, chosen)
    assert (picked[:, :-1] >= picked[:, 1:]).all()
    assert torch.equal(chosen, ops.sample_importance(sigma * 2.0**-80, 12, seed=3))


@two_ways
def test_zero_weights_come_last():
    sigma = torch.zeros(200, 10)
    sigma[:, [2, 5, 7]] = torch.tensor([1e-20, 1.0, 1e3])
    chosen = ops.sample_importance(sigma, 4, seed=0)
    assert (chosen[:, :3] == torch.tensor([7, 5, 2])).all()
    assert len(set(chosen[:, 3].tolist())) > 1
    assert ops.sample_importance(torch.zeros(10), 10, seed=0).sort().values.tolist() == list(range(10))


@two_ways
@pytest.mark.parametrize(
    "sigma, dtype",
    [([1e-6, 5e-5], torch.float16), ([1e10, 1.1e10], torch.bfloat16), ([1e-37, 0.0], torch.float32), ([1e-300, 3e-300], torch.float64)],
)
def test_sampling_law_at_the_ends_of_a_dtype(sigma, dtype):
    draws, weights = 40_000, torch.tensor(sigma, dtype=dtype)
    expected = (weights.double() / weights.double().sum())[0].item()
    found = (ops.sample_importance(weights.expand(draws, -1), 1, seed=0) == 0).double().mean().item()
    assert abs(found - expected) <= 5.5 * math.sqrt(expected * (1 - expected) / draws)


@two_ways
def test_sampling_seeds():
    sigma = torch.rand(50)
    one = ops.sample_importance(sigma, 5, seed=9)
    assert torch.equal(one, ops.sample_importance(sigma, 5, seed=9))
    rows = ops.sample_importance(sigma.expand(64, -1), 5, seed=9)
    assert torch.equal(rows[0], one)
    assert len({tuple(row) for row in rows.tolist()}) > 32
    seeds = [philox.derive_seed(9, row) for row in range(64)]
    assert torch.equal(rows, ops.sample_importance(sigma.expand(64, -1), 5, seed=seeds))
    with pytest.raises(ValueError, match="64 rows"):
        ops.sample_importance(sigma.expand(64, -1), 5, seed=[1])
    with pytest.raises(ValueError, match="rank must be an int from 1 to 50"):
        ops.sample_importance(sigma, 51, seed=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [200, 5000])
def test_sums_that_all_err_alike(m, dtype):
    """Equal rows: the lengths and products of the columns of Y are sums of m equal terms, whose rounding
    errors have one sign."""
    torch.manual_seed(0)
    for rank in (3, 7, 14):
        grad = torch.ones(m, 1, dtype=dtype, device=DEVICE) @ torch.randn(1, 33, dtype=dtype, device=DEVICE)
        basis, _ = ops.range_finder(grad, rank, oversample=2)
        assert defect(basis) <= ORTHONORMAL
        assert defect(ops.orthonormalise(grad[:, :rank])) <= ORTHONORMAL


def test_threads_leave_the_precision_as_it_was():
    matmul = torch.backends.mkldnn.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch has one setting only")
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        grad = torch.randn(100, 300)
        threads = [threading.Thread(target=lambda: [ops.range_finder(grad, 20) for _ in range(15)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
