"""The bodies of the CUDA kernels, run on the host by csrc/cuda/emulate.cpp: results, barriers, and the limits
their headers state."""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from matrix import pairwise, representative
from test_philox import VECTORS

from lowrank_kernels import philox

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
UNIT = {np.float32: 2.0**-24, np.float64: 2.0**-53}
SUFFIX = {np.float32: "f32", np.float64: "f64"}
ASCENDING, DESCENDING, SHUFFLED = range(3)
LENGTHS = [1, 2, 3, 7, 8, 31, 32, 33, 64, 100, 136, 264, 340]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    output = tmp_path_factory.mktemp("csrc") / "emulate.so"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-std=c++17"]
    subprocess.run([compiler, *flags, str(CSRC / "emulate.cpp"), "-o", str(output)], check=True)
    return ctypes.CDLL(str(output))


def pointer(array):
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


def int64(value):
    return ctypes.c_int64(value)


def test_detector_sees_a_missing_barrier_and_an_index_out_of_range(library):
    library.faults_of_a_shift.restype = ctypes.c_int64
    assert library.faults_of_a_shift(1, int64(0)) == 0
    assert library.faults_of_a_shift(0, int64(0)) == 64
    assert library.faults_of_a_shift(1, int64(64)) == 1
    assert library.faults_of_a_shift(1, int64(-1)) == 1


SEEDS = [0, 1, -1, 1 << 31, 1 << 32, 1 << 63, 0x0123456789ABCDEF]


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_known_answers(library, counter, key, expected):
    out = np.zeros(4, np.uint32)
    library.philox4x32(pointer(np.array(counter, np.uint32)), pointer(np.array(key, np.uint32)), pointer(out))
    assert out.tolist() == expected


def test_single_words_agree_with_python(library):
    blocks = [0, 1, 2, (1 << 30) - 1, (1 << 32) - 1, 1 << 32, (1 << 32) + 5, (1 << 61) + 12345]
    out = np.zeros(4, np.uint32)
    for seed, stream, block in itertools.product(SEEDS, range(5), blocks):
        library.philox_words(ctypes.c_uint64(seed & philox.MASK64), ctypes.c_uint32(stream), ctypes.c_uint64(block), pointer(out))
        counter = [torch.tensor(word) for word in (block & philox.MASK32, block >> 32, stream, 0)]
        key = [torch.tensor(word) for word in (seed & philox.MASK32, (seed >> 32) & philox.MASK32)]
        assert out.tolist() == [int(word) for word in philox.philox4x32(counter, key)], (seed, stream, block)


def test_derived_seeds_agree_with_python(library):
    library.derive_seed.restype = ctypes.c_uint64
    for seed, part in itertools.product(SEEDS, [0, 1, 77, -1]):
        derived = library.derive_seed(ctypes.c_uint64(seed & philox.MASK64), ctypes.c_uint64(part & philox.MASK64))
        assert derived == philox.derive_seed(seed, part)


def fill(library, name, dtype, count, seeds, stream, offset=0):
    """(batch, count) from the emulated kernel, `offset` elements past a 64-byte boundary. Nothing outside it
    may change."""
    seeds = np.array([philox.signed64(seed) for seed in seeds], np.int64)
    size = len(seeds) * count
    memory = np.full(size + 96, -77, dtype)
    start = (-memory.ctypes.data % 64) // memory.itemsize + offset
    out = memory[start : start + size]
    getattr(library, name)(pointer(out), int64(count), pointer(seeds), int64(len(seeds)), ctypes.c_uint32(stream))
    assert (memory[:start] == -77).all() and (memory[start + size :] == -77).all()
    return torch.from_numpy(out.reshape(len(seeds), count).copy())


@pytest.mark.parametrize(
    "count, offset",
    representative(itertools.product([1, 2, 3, 4, 5, 6, 7, 8, 1003], range(4)), lambda count, offset: count in (1, 4, 7, 1003)),
)
def test_rows_of_any_length_and_address(library, count, offset):
    seeds = philox.seed_tensor(SEEDS, "cpu")
    words = fill(library, "words", np.int64, count, SEEDS, philox.TAIL, offset)
    assert torch.equal(words, philox.words(seeds, count, philox.TAIL))
    normal = fill(library, "normal_f32", np.float32, count, SEEDS, philox.TAIL, offset)
    assert torch.equal(normal.double(), fill(library, "normal_f64", np.float64, count, SEEDS, philox.TAIL, offset))
    full = fill(library, "normal_f32", np.float32, 1004, SEEDS, philox.TAIL)
    assert torch.equal(normal, full[:, :count])


def test_normal_agrees_with_python(library):
    """Log, sin and cos are within 2 ulp = 4u on either side. The root halves what comes from log and adds u,
    the product adds u: 2u + u + 4u + u = 8u, twice."""
    count = 200_001
    expected = philox.normal(philox.seed_tensor(SEEDS[:3], "cpu"), (count,), philox.SKETCH, torch.float32).double()
    actual = fill(library, "normal_f32", np.float32, count, SEEDS[:3], philox.SKETCH).double()
    assert ((actual - expected).abs() <= 16 * UNIT[np.float32] * expected.abs()).all()


def test_gumbel_agrees_with_python(library):
    """E is off by 4u, which shifts log E by as much, and log E itself by 4u of its value: 4u·(1 + |g|),
    twice."""
    count = 200_001
    expected = philox.gumbel(philox.seed_tensor(SEEDS[:3], "cpu"), count, philox.GUMBEL).double()
    actual = fill(library, "gumbel", np.float32, count, SEEDS[:3], philox.GUMBEL).double()
    assert ((actual - expected).abs() <= 8 * UNIT[np.float32] * (1 + expected.abs())).all()


@pytest.mark.parametrize("word", [0, 0xFF, 0x80000000, 0xFFFFFF7F, 0xFFFFFFFF])
def test_ends_of_the_integers(library, word, monkeypatch):
    monkeypatch.setattr(philox, "words", lambda seeds, count, stream, first=0: torch.full((1, count), word))
    words = np.full(4, word, np.uint32)
    for name in ("normal", "gumbel"):
        out = np.full(4, np.nan, np.float32)
        getattr(library, f"{name}_of_words")(pointer(words), pointer(out))
        expected = philox.normal(None, (4,), 0, torch.float32) if name == "normal" else philox.gumbel(None, 4, 0)
        np.testing.assert_allclose(out, expected[0].numpy(), rtol=16 * UNIT[np.float32], atol=8 * UNIT[np.float32])


def cholesky_inverse(library, gram, shift=0.0, threads=0, order=SHUFFLED, seed=1):
    """(batch, l, l) → X with Xᵀ(S + shift·I)X = I, from an output full of NaN. No race, no index out of
    range."""
    gram = np.ascontiguousarray(gram)
    kind = gram.dtype.type
    inverse = np.full_like(gram, np.nan)
    function = getattr(library, f"cholesky_inverse_{SUFFIX[kind]}")
    function.restype = ctypes.c_int64
    scalar = ctypes.c_float(shift) if kind is np.float32 else ctypes.c_double(shift)
    batch, l, _ = gram.shape
    faults = function(pointer(gram), pointer(inverse), l, int64(batch), scalar, threads, order, ctypes.c_uint64(seed))
    assert faults == 0
    return inverse


def positive_definite(generator, l, condition, dtype):
    basis, _ = np.linalg.qr(generator.standard_normal((l, l)))
    gram = (basis * np.logspace(0, -np.log10(condition), l)) @ basis.T
    return ((gram + gram.T) / 2).astype(dtype)


def triangular_inverse(lower):
    lower = torch.from_numpy(np.ascontiguousarray(lower))
    return torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False).numpy()


def residuals(gram, shift, inverse):
    """|R̂ᵀR̂ − A| and |R̂⁻ᵀ·A·R̂⁻¹ − I| for A = S + shift·I and the computed R̂⁻¹, each with its bound.

    The factor satisfies |L̂L̂ᵀ − A| ≤ γ|L||Lᵀ| (Higham, theorem 10.3), the inverse by forward substitution
    |L̂X̂ − I| ≤ γ|L||X| (section 14.2). γ = (l + 8)·u: sums of l terms, and the shift, the difference, the
    root, the reciprocal and its product. Hence, to first order, |X̂⁻¹X̂⁻ᵀ − A| ≤ γ·(|L||Lᵀ| + K + Kᵀ), K =
    |L||X||L||Lᵀ|; and |X̂AX̂ᵀ − I| ≤ γ·(|X||L||Lᵀ||Xᵀ| + M + Mᵀ), M = |X||L||X||L|. Twice that allows for the
    second order. The residuals are computed in fp64 by a triangular solve and products, whose errors are of
    the same form: negligible for fp32, and as much again for fp64.
    """
    exact = gram.astype(np.float64) + float(gram.dtype.type(shift)) * np.eye(len(gram))
    exact = np.tril(exact) + np.tril(exact, -1).T
    computed = inverse.astype(np.float64).T
    factor = np.linalg.cholesky(exact)
    l, x = np.abs(factor), np.abs(triangular_inverse(factor))
    gamma = (len(gram) + 8) * (UNIT[gram.dtype.type] + UNIT[np.float64])
    recovered = triangular_inverse(computed)
    k, m = l @ x @ l @ l.T, x @ l @ x @ l
    return [
        (np.abs(recovered @ recovered.T - exact), 2 * gamma * (l @ l.T + k + k.T)),
        (np.abs(computed @ exact @ computed.T - np.eye(len(gram))), 2 * gamma * (x @ l @ l.T @ x.T + m + m.T)),
    ]


@pytest.mark.parametrize("l, condition, dtype", pairwise(LENGTHS, [1, 30, 1e3, 1e6], [np.float32, np.float64]))
def test_cholesky_inverse(library, l, dtype, condition):
    gram = positive_definite(np.random.default_rng(l), l, condition, dtype)
    shift = 4 * l * UNIT[dtype]
    poisoned = gram + np.triu(np.full_like(gram, np.nan), 1)  # only the lower triangle is read
    (inverse,) = cholesky_inverse(library, poisoned[None], shift)
    assert np.array_equal(inverse, np.triu(inverse))
    for error, bound in residuals(gram, shift, inverse):
        assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("l", [5, 33, 136])
def test_cholesky_inverse_gives_the_same_bits_in_any_order(library, l):
    gram = positive_definite(np.random.default_rng(7), l, 100, np.float32)[None]
    expected = cholesky_inverse(library, gram, 1e-5, order=ASCENDING)
    for order in (DESCENDING, SHUFFLED):
        assert np.array_equal(cholesky_inverse(library, gram, 1e-5, order=order), expected)
    for threads in (-(-l // 32) * 32, 384, 1024):
        assert np.array_equal(cholesky_inverse(library, gram, 1e-5, threads=threads), expected)


def test_the_shift_is_added(library):
    (inverse,) = cholesky_inverse(library, np.zeros((1, 9, 9), np.float32), 0.25)
    assert np.array_equal(inverse, 2 * np.eye(9, dtype=np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("l", [1, 8, 9, 40])
def test_not_positive_definite_gives_the_identity(library, l, dtype):
    good = positive_definite(np.random.default_rng(3), l, 10, dtype)
    spoilt = []
    for place in {0, l // 2, l - 1}:
        for value in (0.0, -1.0, np.nan, np.inf, -np.inf):
            spoilt.append(good.copy())
            spoilt[-1][place, place] = value
            if not np.isfinite(value):
                spoilt.append(good.copy())
                spoilt[-1][l - 1, place] = value
    spoilt.append(np.zeros_like(good))
    spoilt.append(np.diag(np.arange(l) < l - 1).astype(dtype))  # the last pivot is zero, exactly
    batch = np.stack([good, *spoilt, good])
    inverse = cholesky_inverse(library, batch)
    assert np.array_equal(inverse[1:-1], np.broadcast_to(np.eye(l, dtype=dtype), inverse[1:-1].shape))
    for matrix in (inverse[0], inverse[-1]):
        assert all((error <= bound).all() for error, bound in residuals(good, 0.0, matrix))


def test_singular_without_a_shift_and_not_with_it(library):
    generator = np.random.default_rng(5)
    columns = generator.standard_normal((50, 20)).astype(np.float32)
    columns[:, 12] = 0
    gram = (columns.T @ columns)[None]
    assert np.array_equal(cholesky_inverse(library, gram)[0], np.eye(20, dtype=np.float32))
    (inverse,) = cholesky_inverse(library, gram, 1e-3)
    assert all((error <= bound).all() for error, bound in residuals(gram[0], 1e-3, inverse))


def test_limits_stated_by_the_header(library):
    library.cholesky_inverse_shared_bytes.restype = ctypes.c_int64
    table = re.findall(r"(\d+) KB \(.*\) +l ≤ (\d+) +l ≤ (\d+)", (CSRC / "cholesky_inverse.h").read_text())
    assert {row[0] for row in table} == {"163", "227"}
    for kilobytes, *limits in table:
        limit = int(kilobytes) * 1024
        for itemsize, columns in zip((4, 8), map(int, limits), strict=True):
            assert library.cholesky_inverse_max_columns(int64(limit), int64(itemsize)) == columns
            assert library.cholesky_inverse_shared_bytes(columns, int64(itemsize)) <= limit
            assert library.cholesky_inverse_shared_bytes(columns + 1, int64(itemsize)) > limit
            assert columns <= library.cholesky_inverse_threads(columns)


def jacobi(library, matrices, max_sweeps=12, threads=0, order=SHUFFLED, seed=1):
    """(batch, rows, l) → U·Σ (batch, rows, l) as the kernel leaves it, and the number of sweeps that had
    something to do. No race."""
    kind = matrices.dtype.type
    vectors = np.ascontiguousarray(matrices.transpose(0, 2, 1))
    batch, l, rows = vectors.shape
    flags = np.full((max_sweeps, batch), 99, np.int32)
    function = getattr(library, f"jacobi_{SUFFIX[kind]}")
    function.restype = ctypes.c_int64
    faults = function(pointer(vectors), l, int64(rows), int64(batch), pointer(flags), max_sweeps, threads, order, ctypes.c_uint64(seed))
    assert faults == 0
    assert set(np.unique(flags)) <= {0, 1} and (np.diff(flags, axis=0) <= 0).all()
    return vectors.transpose(0, 2, 1), flags.sum(axis=0)


def check_jacobi(matrix, result, reference=None, significant=0.0):
    """Singular values relative to themselves, vectors orthogonal, and the result spans what the matrix did.

    One-sided Jacobi computes each singular value to a relative error of about l·u·κ(A·D⁻¹), D the lengths of
    the columns (Demmel, Veselić, theorem 4.1, whose factor is linear in l and in practice far smaller). Pairs
    are orthogonal to 2⁻²³, plus the rounding of their normalised elements and dots: 8u. `significant`:
    singular values above this part of the largest are looked at.
    """
    unit = UNIT[matrix.dtype.type]
    exact, computed = matrix.astype(np.float64), result.astype(np.float64)
    assert np.isfinite(computed).all()
    order = np.argsort(-np.linalg.norm(computed, axis=0), kind="stable")
    computed = computed[:, order]
    sigma = np.linalg.norm(computed, axis=0)
    of_reference = matrix.shape[1] * UNIT[np.float64] if reference is None else 0.0  # LAPACK's, in relation to the largest
    reference = np.linalg.svd(exact, compute_uv=False) if reference is None else reference
    lengths = np.linalg.norm(exact, axis=0)
    keep = (reference > significant * reference[0]) & (reference > 0)
    kept = lengths > 0
    condition = np.linalg.cond(exact[:, kept] / lengths[kept]) if significant == 0 else 1 / significant
    bound = matrix.shape[1] * unit * condition * reference[keep] + of_reference * reference[0]
    assert (np.abs(sigma - reference)[keep] <= bound).all(), (np.abs(sigma - reference)[keep] / bound).max()
    vectors = computed[:, keep] / sigma[keep]
    error = np.abs(vectors.T @ vectors - np.eye(keep.sum())).max()
    assert error <= 16 * unit, error / unit
    # A·Aᵀ is what it was: rotations of n columns in s sweeps, 4u each, in the norm.
    drift = np.linalg.norm(computed @ computed.T - exact @ exact.T) / np.linalg.norm(exact @ exact.T)
    assert drift <= 4 * 16 * matrix.shape[1] * unit


def test_tournament(library):
    pair = np.zeros(2, np.int32)
    for l in [*range(2, 20), 136, 137]:
        met = set()
        for round_ in range(library.tournament_rounds(l)):
            players = set()
            for index in range(l // 2):
                library.tournament_pair(l, round_, index, pointer(pair))
                first, second = pair.tolist()
                assert 0 <= first < second < l
                met.add((first, second))
                players |= {first, second}
            assert len(players) == 2 * (l // 2)  # the blocks of a launch share no vector
        assert len(met) == l * (l - 1) // 2
    assert [library.tournament_rounds(l) for l in (2, 3, 8, 33)] == [1, 3, 7, 33]


GRADED = [*((np.float32, l) for l in [1, 2, 3, 5, 8, 33, 136, 264]), *((np.float64, l) for l in [2, 33, 136])]


@pytest.mark.parametrize(
    "dtype, l, condition",
    representative(
        [(*factor, condition) for factor in GRADED for condition in (1e2, 1e6, 1e12)],
        lambda dtype, l, condition: l < 100 or (l, condition) in ((136, 1e12), (264, 1e2)),
    ),
)
def test_jacobi_on_factors_of_graded_matrices(library, l, dtype, condition):
    gram = positive_definite(np.random.default_rng(l), l, condition, np.float64)
    factor = np.linalg.cholesky(gram + 1e-14 * np.eye(l)).astype(dtype)
    (result,), (sweeps,) = jacobi(library, factor[None])
    assert sweeps <= 10
    check_jacobi(factor, result)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("l", [2, 5, 33, 136])
def test_jacobi_with_columns_of_very_different_lengths(library, l, dtype):
    """Lengths from 1 to 1e-12 in any order. Small singular values are the reciprocals of the inverse's large
    ones, where fp64's svd, accurate in relation to the largest, sees them."""
    generator = np.random.default_rng(l)
    matrix = generator.standard_normal((l, l)) + 4 * np.eye(l) * np.sqrt(l)
    lengths = np.logspace(0, -12, l)
    generator.shuffle(lengths)
    matrix = (matrix * lengths).astype(dtype)
    exact = matrix.astype(np.float64)
    columns = np.linalg.norm(exact, axis=0)
    large = np.linalg.svd(exact, compute_uv=False)
    small = 1 / np.linalg.svd(np.linalg.inv(exact / columns) / columns[:, None], compute_uv=False)[::-1]
    reference = np.where(large > 1e-6 * large[0], large, small)
    (result,), _ = jacobi(library, matrix[None], max_sweeps=16)
    if dtype is np.float64:
        # The reference itself is good to 1e-16 / 1e-6 only.
        sigma = np.sort(np.linalg.norm(result, axis=0))[::-1]
        np.testing.assert_allclose(sigma, reference, rtol=1e-8)
        vectors = result / np.linalg.norm(result, axis=0)
        assert np.abs(vectors.T @ vectors - np.eye(l)).max() <= 16 * UNIT[dtype]
    else:
        check_jacobi(matrix, result, reference)


@pytest.mark.parametrize("rows, l", [(40, 17), (300, 20), (1500, 12), (5, 9)])
def test_jacobi_of_tall_and_wide_matrices(library, rows, l):
    """Several warps a pair, and more columns than they have dimensions: the rest shrink to rounding
    errors."""
    matrix = np.random.default_rng(rows).standard_normal((rows, l)).astype(np.float32)
    (result,), _ = jacobi(library, matrix[None], max_sweeps=16)
    reference = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    reference = np.concatenate([reference, np.zeros(l - len(reference))])
    check_jacobi(matrix, result, reference, significant=1e-3)


@pytest.mark.parametrize("l", [2, 9, 64])
def test_jacobi_leaves_orthogonal_and_zero_columns(library, l):
    basis, _ = np.linalg.qr(np.random.default_rng(l).standard_normal((l, l)))
    rounded = np.sign(basis) * np.eye(l)
    for matrix in (np.diag(np.arange(l, 0, -1.0)), rounded * np.logspace(-3, 3, l), np.zeros((l, l))):
        matrix = matrix.astype(np.float32)
        (result,), (sweeps,) = jacobi(library, matrix[None])
        assert sweeps == 0 and np.array_equal(result, matrix)


@pytest.mark.parametrize("rank", [0, 1, 3, 30])
def test_jacobi_of_rank_deficient_matrices(library, rank):
    generator = np.random.default_rng(rank)
    l = 33
    for zero_columns in (True, False):
        matrix = np.zeros((l, l))
        if zero_columns:
            matrix[:, generator.permutation(l)[:rank]] = generator.standard_normal((l, rank))
        else:
            matrix = generator.standard_normal((l, rank)) @ generator.standard_normal((rank, l))
        matrix = matrix.astype(np.float32)
        (result,), _ = jacobi(library, matrix[None], max_sweeps=16)
        if rank == 0:
            assert (result == 0).all()
        else:
            check_jacobi(matrix, result, significant=1e-4)


def test_jacobi_of_equal_singular_values(library):
    generator = np.random.default_rng(2)
    basis, _ = np.linalg.qr(generator.standard_normal((64, 64)))
    factor = np.linalg.cholesky((basis * np.repeat([1.0, 0.01], 32)) @ basis.T).astype(np.float32)
    (result,), (sweeps,) = jacobi(library, factor[None], max_sweeps=16)
    assert sweeps < 16
    check_jacobi(factor, result)


def test_jacobi_with_a_nan_ends_and_spares_the_other_matrices(library):
    generator = np.random.default_rng(4)
    batch = generator.standard_normal((3, 10, 10)).astype(np.float32)
    batch[1, 4, 6] = np.nan
    together, sweeps = jacobi(library, batch)
    assert np.isnan(together[1]).any() and (sweeps < 12).all()
    for index in (0, 2):
        alone, _ = jacobi(library, batch[index : index + 1])
        assert np.array_equal(together[index], alone[0])
        check_jacobi(batch[index], together[index])


@pytest.mark.parametrize("l", [7, 34])
def test_jacobi_gives_the_same_bits_in_any_order(library, l):
    """Blocks of a launch, threads of a phase: none may depend on another. Matrices that converge early stop
    alone."""
    generator = np.random.default_rng(l)
    batch = np.stack([np.eye(l), generator.standard_normal((l, l)), np.tril(generator.standard_normal((l, l)))]).astype(np.float32)
    expected, sweeps = jacobi(library, batch, order=ASCENDING)
    assert sweeps[0] == 0 < sweeps[1]
    for order in (DESCENDING, SHUFFLED):
        result, again = jacobi(library, batch, order=order)
        assert np.array_equal(result, expected) and np.array_equal(again, sweeps)


@pytest.mark.parametrize("exponent", [-45, 40])
def test_jacobi_does_not_depend_on_a_power_of_two(library, exponent):
    """‖p‖²·‖q‖² would leave the range of fp32 long before ‖p‖² does."""
    matrix = np.random.default_rng(8).standard_normal((1, 12, 12)).astype(np.float32)
    scale = np.float32(2.0**exponent)
    assert np.array_equal(jacobi(library, matrix * scale)[0], jacobi(library, matrix)[0] * scale)


def test_jacobi_at_the_ends_of_the_range(library):
    far_apart = np.array([[[1, 1e-21], [0, 1e-18]]], np.float32)  # ζ = 5e20, whose square overflows
    (result,), (sweeps,) = jacobi(library, far_apart)
    assert sweeps == 1
    assert result[0, 0] == 1 and result[1, 1] == far_apart[0, 1, 1] and abs(result[0, 1]) <= 1e-25 >= abs(result[1, 0])
    underflows = np.array([[[1, 1e-25], [0, 1e-25]]], np.float32)
    (result,), (sweeps,) = jacobi(library, underflows)
    assert sweeps == 0 and np.array_equal(result, underflows[0])


def test_jacobi_stops_after_max_sweeps(library):
    matrix = np.random.default_rng(6).standard_normal((1, 20, 20)).astype(np.float32)
    once, (sweeps,) = jacobi(library, matrix, max_sweeps=1)
    assert sweeps == 1
    assert not np.array_equal(once, jacobi(library, matrix)[0])


@pytest.mark.parametrize(
    "decay, l",
    representative(itertools.product([0.0, 1.0, 3.0, "rank 3", "zero"], [5, 40, 136]), lambda decay, l: l < 100 or decay == 3.0),
)
def test_eigenproblem_as_the_binding_composes_it(library, l, decay):
    """cuda/binding.cpp's eigh: scale, shift, factor, rotate the columns of the factor, take lengths; against
    LAPACK's."""
    torch.manual_seed(0)
    exact = {"rank 3": torch.zeros(l), "zero": torch.zeros(l)}.get(decay)
    if exact is None:
        exact = torch.arange(1, l + 1, dtype=torch.float64) ** (-2 * decay)
    elif decay == "rank 3":
        exact[:3] = torch.tensor([9.0, 4.0, 1.0])
    turn = torch.linalg.qr(torch.randn(l, l, dtype=torch.float64))[0]
    gram = (turn * exact.double()) @ turn.mT * 1e-20
    largest = gram.diagonal().amax()
    largest = largest if largest > 0 else torch.ones(())
    shift = 2 * torch.finfo(torch.float64).eps * l
    factor = torch.linalg.cholesky(gram / largest + shift * torch.eye(l, dtype=torch.float64))
    (rotated,), _ = jacobi(library, factor.numpy()[None], max_sweeps=16)
    lengths, order = torch.from_numpy(np.linalg.norm(rotated, axis=0)).sort(descending=True)
    vectors = torch.from_numpy(rotated)[:, order] / lengths
    values = (lengths.square() - shift).clamp_min(0) * (largest if exact.any() else 0)
    scale = 1e-20 * exact.double().amax()
    assert (values - 1e-20 * exact.double().sort(descending=True).values).abs().max() <= 1e-13 * scale + 1e-30
    assert (vectors.mT @ vectors - torch.eye(l)).abs().max() <= 1e-10
    assert (vectors * values @ vectors.mT - gram).abs().max() <= 1e-12 * scale + 1e-30
