"""The eigenproblem by cuSOLVER's batched solver, with LAPACK in its place (csrc/cuda/emulate_eigh.cpp): the
cut into calls, workspaces, what comes out, and what becomes of a matrix that the solver reports a failure
of."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from lowrank_kernels import ops, range_finder
from lowrank_kernels.ops import parts

CSRC = Path(__file__).parents[2] / "csrc"
UNIT = 2.0**-53
MOST_COLUMNS = 2 * 1024 + 8
"""l at rank 1024 under importance sampling: 2r + oversample."""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    output = tmp_path_factory.mktemp("eigh") / "emulate_eigh.so"
    folders = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    links = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-O1", "-Wall", "-shared", "-fPIC", "-std=c++20", "-fopenmp", "-fvisibility=hidden", abi, f"-I{CSRC}", *folders]
    source = CSRC / "cuda" / "emulate_eigh.cpp"
    done = subprocess.run([compiler, *flags, str(source), *links, "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return ctypes.CDLL(str(output))


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """What csrc/cuda/eigensolvers.h decides, by a library that needs no torch."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    output = tmp_path_factory.mktemp("eigh") / "emulate.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-std=c++17", str(CSRC / "cuda" / "emulate.cpp"), "-o", str(output)], check=True)
    library = ctypes.CDLL(str(output))
    library.matrices_per_call.restype = ctypes.c_int64
    return library


def pointer(tensor):
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def int64(value):
    return ctypes.c_int64(value)


def solve(library, gram, failing=-1, host_bytes=0):
    """Values (batch, l) and vectors (batch, l, l), as rows, and the calls that were made: rows of (l, first
    matrix, batch, bytes on the device, bytes on the host)."""
    batch, l, _ = gram.shape
    values, vectors = torch.full((batch, l), 7.0, dtype=torch.float64), torch.full((batch, l, l), 7.0, dtype=torch.float64)
    calls = torch.zeros(1 + batch // 1000, 5, dtype=torch.int64)
    library.eigh_by_lapack.restype = ctypes.c_int64
    before = gram.view(torch.int64).clone()  # bits, as a NaN does not equal itself
    numbers = (int64(l), int64(batch), int64(failing), int64(host_bytes))
    count = library.eigh_by_lapack(pointer(gram), pointer(values), pointer(vectors), *numbers, pointer(calls))
    assert count > 0, "the solver was called with wrong arguments, or its memory was not kept"
    assert torch.equal(gram.view(torch.int64), before), "the Gram matrix is not ours to overwrite"
    return values, vectors, calls[:count].tolist()


def gram_matrices(batch, l, decay=1.0):
    """(batch, l, l) with eigenvalues i^-decay and random eigenvectors; and the eigenvalues."""
    exact = torch.arange(1, l + 1, dtype=torch.float64) ** -decay
    turn = torch.linalg.qr(torch.randn(batch, l, l, dtype=torch.float64))[0]
    gram = (turn * exact) @ turn.mT
    return (gram + gram.mT) / 2, exact


def check(gram, values, vectors):
    """LAPACK's backward error, p(l)·u·‖A‖ with p(l) = l, in the values, the vectors, and the product."""
    l = gram.shape[-1]
    bound = 4 * l * UNIT * torch.linalg.matrix_norm(gram, 2)
    assert ((values - torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)).abs() <= bound[:, None]).all()
    assert (values[:, :-1] >= values[:, 1:]).all() and (values >= 0).all()
    assert (vectors @ vectors.mT - torch.eye(l)).abs().max() <= 4 * l * UNIT
    assert ((vectors.mT * values[:, None]) @ vectors - gram).abs().amax((-2, -1)).le(bound).all()


@pytest.mark.parametrize("l", [1, 2, 33, 136])
@pytest.mark.parametrize("exponent", [0, -1000, 900])
def test_values_descend_and_rows_are_eigenvectors(library, l, exponent):
    """At any scale: the library sees matrices with a diagonal of at most 1."""
    torch.manual_seed(l)
    gram, _ = gram_matrices(3, l)
    values, vectors, calls = solve(library, gram * 2.0**exponent)
    check(gram, values * 2.0**-exponent, vectors)
    assert [call[:3] for call in calls] == [[l, 0, 3]]


def test_the_largest_size(library):
    """One call, and eigenvectors in the right order. The matrix is diagonal, which LAPACK solves soonest."""
    diagonal = torch.rand(MOST_COLUMNS, dtype=torch.float64) + 0.5
    values, vectors, calls = solve(library, diagonal.diag()[None])
    order = diagonal.argsort(descending=True)
    assert torch.allclose(values[0], diagonal[order], rtol=8 * UNIT, atol=0)
    assert torch.equal(vectors[0].abs().argmax(-1), order)
    assert calls[0][:3] == [MOST_COLUMNS, 0, 1]


@pytest.mark.slow
def test_the_largest_size_in_full(library):
    torch.manual_seed(0)
    gram = torch.randn(1, MOST_COLUMNS, 2 * MOST_COLUMNS, dtype=torch.float64)
    gram = gram @ gram.mT
    values, vectors, _ = solve(library, gram)
    check(gram, values, vectors)


@pytest.mark.parametrize("batch", [1, 16384, 16385, 40000])
def test_a_batch_is_cut_into_calls(library, batch):
    """Every matrix is in one call, and each call has workspaces of the size that it asked for."""
    torch.manual_seed(0)
    gram, _ = gram_matrices(batch, 2)
    failing = batch - 1
    values, vectors, calls = solve(library, gram, failing=failing, host_bytes=96)
    assert [call[1] for call in calls] == list(range(0, batch, 16384))
    assert sum(call[2] for call in calls) == batch
    assert all(device == 8 * l * count + 64 and host == 96 for l, _, count, device, host in calls)
    assert values[failing].isnan().all() and vectors[failing].isnan().all()
    if batch > 1:
        check(gram[:-1], values[:-1], vectors[:-1])


@pytest.mark.parametrize("failing", [0, 2, 4])
def test_what_is_not_solved_is_nan_and_the_rest_is_not(library, failing):
    """The solver leaves finite numbers behind when it gives up."""
    torch.manual_seed(0)
    gram, _ = gram_matrices(5, 20)
    expected, right, _ = solve(library, gram)
    values, vectors, _ = solve(library, gram, failing=failing)
    good = torch.arange(5) != failing
    assert values[failing].isnan().all() and vectors[failing].isnan().all()
    assert torch.equal(values[good], expected[good]) and torch.equal(vectors[good], right[good])


def test_zero_singular_and_not_finite_matrices(library):
    torch.manual_seed(0)
    gram, _ = gram_matrices(5, 12)
    gram[1] = 0
    gram[2] = torch.nan
    gram[3, 4, 4] = torch.inf
    columns = torch.randn(12, 3, dtype=torch.float64)
    gram[4] = columns @ columns.mT
    values, vectors, _ = solve(library, gram)
    check(gram[[0, 1, 4]], values[[0, 1, 4]], vectors[[0, 1, 4]])
    assert not values[1:4].any()
    assert (vectors @ vectors.mT - torch.eye(12)).abs().max() <= 48 * UNIT


def test_the_table_names_a_solver_for_every_size(table):
    for l in (1, 2, 32, 33, 136, 264, 1032, MOST_COLUMNS, 10**6):
        for batch in (1, 7, 224, 10**6):
            assert table.cusolver_takes(int64(l), int64(batch), 1) == (l > 32)
            assert table.cusolver_takes(int64(l), int64(batch), 0) == 0
    assert "measured on a GPU yet" in (CSRC / "cuda" / "eigensolvers.h").read_text()


def test_a_call_stays_within_the_limits(table):
    assert table.matrices_per_call(int64(2)) == 2**14
    for l in (1, 181, 1000, MOST_COLUMNS, 46340, 10**5):
        most = table.matrices_per_call(int64(l))
        assert 1 <= most <= 2**14
        assert most * l * l < 2**31 or most == 1
    assert table.matrices_per_call(int64(MOST_COLUMNS)) > 500


def as_on_a_gpu(library, monkeypatch, failing):
    """The operators of a refresh that solve an eigenproblem, on batches, by the emulated solver."""

    def leading(grads, peak, count, oversample, power_iters, seed):
        grad = range_finder.stacked(grads).contiguous()
        batch, m, n = grad.shape
        vectors, sigma = torch.empty(batch, count, m), torch.empty(batch, count)
        numbers = map(int64, (batch, m, n, count, oversample, power_iters, seed, failing))
        library.leading_as_on_a_gpu(pointer(grad), *numbers, pointer(vectors), pointer(sigma))
        return vectors.mT, sigma

    def short_side_spectrum(grads, count):
        grad = range_finder.stacked(grads).contiguous()
        batch, m, n = grad.shape
        k = min(m, n)
        vectors, sigma = torch.empty(batch, k, k), torch.empty(batch, k)
        numbers = map(int64, (batch, m, n, count, failing))
        library.short_side_spectrum_as_on_a_gpu(pointer(grad), *numbers, pointer(vectors), pointer(sigma))
        return vectors.mT, sigma

    monkeypatch.setattr(parts, "leading", leading)
    monkeypatch.setattr(parts, "short_side_spectrum", short_side_spectrum)
    monkeypatch.setattr(range_finder, "may_look", lambda tensor: False)


SHAPES = {
    "on products": (60, 160, 3),
    "on the Gram matrix": (40, 100, 8),
    "whole spectrum": (24, 50, 20),
    "on products, tall": (160, 60, 3),
    "on the Gram matrix, tall": (100, 40, 8),
    "whole spectrum, tall": (50, 24, 20),
}


@pytest.mark.parametrize("way", SHAPES)
@pytest.mark.parametrize("selection", ["importance", "dominant"])
def test_a_refresh_keeps_the_basis_of_a_matrix_that_was_not_solved(library, monkeypatch, way, selection):
    """In every way to a basis, on either side: the other matrices get new ones. At the first refresh there is
    none to keep, and the matrix waits, as one with a gradient of zeros does."""
    torch.manual_seed(0)
    m, n, rank = SHAPES[way]
    grads = [torch.randn(m, n) for _ in range(3)]
    options = dict(rank=rank, right=False, selection=selection, svd="randomized", oversample=8, power_iters=1, seed=3, refresh_number=1)
    options |= dict(places=[(index, 0) for index in range(3)], dtype=torch.float32)
    as_on_a_gpu(library, monkeypatch, failing=-1)
    previous = [torch.linalg.qr(torch.randn(m, rank))[0] for _ in grads]
    fresh = ops.choose_bases(grads, previous, **options)
    as_on_a_gpu(library, monkeypatch, failing=1)
    kept, first = ops.choose_bases(grads, previous, **options), ops.choose_bases(grads, None, **options)
    assert torch.equal(kept[1], previous[1]) and not first[1].any()
    for index in (0, 2):
        assert (fresh[index].mT @ fresh[index] - torch.eye(rank)).abs().max() <= 1e-5
        assert torch.equal(kept[index], fresh[index]) and torch.equal(first[index], fresh[index])


def test_range_finder_says_by_nan_what_was_not_solved(library, monkeypatch):
    torch.manual_seed(0)
    as_on_a_gpu(library, monkeypatch, failing=0)
    for shape in ((2, 40, 100), (2, 100, 40)):
        basis, sigma = ops.range_finder(torch.randn(shape), 6)
        assert basis[0].isnan().all() and sigma[0].isnan().all()
        assert basis[1].isfinite().all() and sigma[1].isfinite().all()


def test_emulated_leading_directions_are_those_of_the_operator(library, monkeypatch):
    """The emulation takes the way of a batch, which the extension has on a CPU as well."""
    torch.manual_seed(0)
    grad = torch.randn(2, 40, 100) / torch.arange(1, 41)[:, None]
    expected, sigma = parts.leading([grad], parts.peaks([grad]), 6, 8, 2, 5)
    as_on_a_gpu(library, monkeypatch, failing=-1)
    basis, found = parts.leading([grad], None, 6, 8, 2, 5)
    assert torch.allclose(found, sigma, rtol=1e-4)
    assert ((basis.mT @ expected).square().sum((-2, -1)) / 6 > 0.999).all()


def test_eigh_on_a_cpu_takes_no_other_solver():
    gram, _ = gram_matrices(2, 9)
    vectors, values = parts.eigh(gram, 9, "auto")
    check(gram, values, vectors.mT)
    for solver in ("cusolver", "jacobi"):
        with pytest.raises((RuntimeError, ValueError), match="solver"):
            parts.eigh(gram, 9, solver)
    with pytest.raises((RuntimeError, ValueError), match="solver"):
        parts.eigh(gram, 9, "qr")


CALLED = ("cusolverDnXsyevBatched", "cusolverDnXsyevBatched_bufferSize", "cusolverDnCreateParams", "cusolverDnDestroyParams")


def test_what_is_called_of_cusolver_exists():
    """In the cuSOLVER that torch's wheels bring, where there is one. Nothing else is called."""
    called = set(re.findall(r"\b(cusolverDn\w+)\(", (CSRC / "cuda" / "cusolver.cpp").read_text()))
    assert called == set(CALLED)
    found = sorted((Path(torch.__file__).parent.parent / "nvidia").glob("**/libcusolver.so.*"))
    if not found:
        pytest.skip("torch brings no cuSOLVER")
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(found[0])], capture_output=True, text=True, check=True).stdout
    assert called <= set(re.findall(r" T (\w+)", symbols))
