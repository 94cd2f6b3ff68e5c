"""Randomized range finder and the sampling of directions, in plain PyTorch: what a subspace refresh is made of.

    Y = G·Ω;  q times: Y = G·orth(Gᵀ·orth(Y));  Q = orth(Y);  QᵀG = W·Σ·Xᵀ;  U = Q·W

The algorithms of csrc/, for devices and installations without the extension. Batched over equal shapes; on a GPU no branch on data.
Products run at the gradient's precision with fp32 accumulation (in fp32 for fp16, and for everything on a CPU); all that is l × l
runs in fp32 or better, never in tf32.

Sources: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1; Fukaya et al., "Shifted Cholesky QR",
SIAM J. Sci. Comput. 42 (2020); Feng, Yu, Xie, Tang, arXiv 2404.09276, for the shift of a power iteration; Efraimidis, Spirakis,
Inf. Process. Lett. 97 (2006) for sampling by keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import philox
from .precision import full_accumulation, full_precision

SQUARE_FROM = 5
"""The range finder works on G·Gᵀ where 5·l reaches the short side: forming it then costs less than four products with G."""
GRAM_STEPS = 3
"""Products with G·Gᵀ for each power iteration."""
STEEP_STEPS = 1
"""… and at most this many more once the spectrum turns out to be steep, which makes each of them worth more."""
STEEP = 2.0**-13
"""λ_r / λ₁ under which eigenvalues of a Gram matrix formed in fp32 no longer give σ to 1 %: a few rounding errors of λ₁ over 2 %."""
LEAST_PIVOT = 2.0**-7
"""Of the Cholesky factor of unit columns: under it two unshifted passes may not reach full accuracy."""


def full_precision_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right without tf32, which would leave a basis orthonormal to 1e-3 only."""
    with full_precision():
        return left @ right


def orthonormalise(matrix: Tensor, seed: int = 0) -> Tensor:
    """Q with QᵀQ = I and span(Q) ⊇ span(Y), by shifted CholeskyQR. (…, m, l) fp32 or fp64 with l ≤ m → the same shape and dtype.

    Q's first k columns span Y's first k. Columns that are zero, not finite or dependent on earlier ones come back as random
    directions orthogonal to the rest, so the result is a full orthonormal set whatever Y holds: ‖QᵀQ − I‖ ≤ 1e-5 in fp32.
    """
    m, columns = matrix.shape[-2:]
    noise = philox.normal(philox.seed_tensor([seed], matrix.device), (columns, m), philox.COMPLETION, matrix.dtype)[0].mT / m**0.5
    # Dependent columns become distinct, by less than the rounding of Y hides anyway.
    matrix = _unit_columns(matrix, noise) + (8 * torch.finfo(matrix.dtype).eps) * noise
    for shifted in (True, True, True, False):
        matrix = _cholesky_pass(matrix, shifted)
    return matrix.contiguous()


def _unit_columns(matrix: Tensor, substitute: Tensor | float = 0.0) -> Tensor:
    """Columns scaled to length 1, in two steps so that no square overflows; `substitute` where a column is zero or not finite."""
    peak = matrix.abs().amax(dim=-2, keepdim=True)
    usable = torch.isfinite(peak) & (peak > 0)
    matrix = torch.where(usable, matrix / torch.where(usable, peak, 1), substitute)
    return matrix / torch.linalg.vector_norm(matrix, dim=-2, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def _cholesky_pass(matrix: Tensor, shifted: bool = True) -> Tensor:
    """Y·R⁻¹ with RᵀR = YᵀY + shift·I, the columns of Y scaled to length 1 first.

    The shift, 11·(m + l)·l·u as Fukaya et al. have it, keeps the factorisation from failing and lifts small singular values by up to
    1/sqrt(shift): one such pass is all that a power iteration needs between its products. For that to be much the Gram matrix is fp64: in
    fp32 a shift large enough for sums of m products, which may all err alike, would lift by ten, and lengths be off by 1e-5. Without
    it, a well-conditioned Y becomes orthonormal.
    """
    matrix = _unit_columns(matrix)
    rows, columns = matrix.shape[-2:]
    identity = torch.eye(columns, dtype=torch.float64, device=matrix.device)
    gram = full_precision_product(matrix.double().mT, matrix.double())
    if shifted:
        gram = gram + (11 * (rows + columns) * columns * torch.finfo(torch.float64).eps / 2) * identity
    factor, failed = torch.linalg.cholesky_ex(gram)
    factor = torch.where((failed != 0)[..., None, None], identity, factor).to(matrix.dtype)
    with full_precision():
        return torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False)


def multipliable(grad: Tensor) -> Tensor:
    """G in the dtype its products run in: bf16 as it is on a GPU; other half precision in fp32 (fp16 overflows, CPUs are slow)."""
    native = grad.dtype == torch.bfloat16 and grad.is_cuda
    return grad if native else grad.to(torch.promote_types(grad.dtype, torch.float32))


def multiply(grad: Tensor, factor: Tensor) -> Tensor:
    """G·X in G's precision with fp32 sums, in the dtype of X."""
    with full_accumulation():
        return (grad @ factor.to(grad.dtype)).to(factor.dtype)


def range_finder(grad: Tensor, rank: int, oversample: int = 8, power_iters: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors and values of G, approximately: (…, m, n) → basis (…, m, r), sigma (…, r) descending.

    With l = r + oversample, by shape alone: l ≥ min(m, n), the whole spectrum from the Gram matrix of the short side;
    5·l ≥ min(m, n), subspace iteration on that matrix; else the products above. One Ω, a function of `seed` alone, serves the whole
    batch. Output is fp32 (fp64 for fp64 input). The basis is orthonormal to 1e-5 for every input; sigma is NaN for a matrix that is not
    finite, whose basis is then random.
    """
    if grad.device.type == "cpu" and grad.dim() > 2:  # one by one: each takes what its own spectrum needs
        batch = grad.shape[:-2]
        found = [range_finder(g, rank, oversample, power_iters, seed) for g in grad.flatten(0, -3)]
        basis, sigma = (torch.stack(parts).unflatten(0, batch) for parts in zip(*found, strict=True))
        return basis, sigma
    m, n = grad.shape[-2:]
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    peak = peak_of(grad)
    grad, exponent = _in_range(multipliable(grad), peak)
    columns = rank + oversample
    if columns >= min(m, n):
        basis, sigma = _whole_spectrum(grad.to(dtype), seed)
    elif SQUARE_FROM * columns >= min(m, n):
        basis, sigma = _iterate_on_gram(grad, peak, rank, columns, power_iters, seed, dtype)
    else:
        basis, sigma = _iterate_on_products(grad, columns, power_iters, seed, dtype)
    sigma = torch.where(torch.isfinite(peak)[..., None], _times_power_of_two(sigma, exponent), torch.nan)
    return basis[..., :rank].contiguous(), sigma[..., :rank].contiguous()


def _in_range(grad: Tensor, peak: Tensor) -> tuple[Tensor, int]:
    """On a CPU, G divided by a power of two where fourth powers of its elements could leave the dtype's range; and its exponent.

    On a GPU it stays: asking would stall it, and the products only need G times orthonormal columns to be in range.
    """
    if grad.device.type != "cpu" or not math.isfinite(value := peak.item()) or value == 0:
        return grad, 0
    exponent = math.frexp(value)[1]
    if abs(exponent) <= (20 if grad.dtype == torch.float32 else 150):
        return grad, 0
    return _times_power_of_two(grad, -exponent), exponent


def _times_power_of_two(tensor: Tensor, exponent: int) -> Tensor:
    """In two steps, for a power of two may itself be out of range."""
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)


def peak_of(grad: Tensor) -> Tensor:
    """(…, m, n) → (…) fp64: the largest |Gᵢⱼ|, not finite exactly where G holds a NaN or an infinity."""
    return torch.linalg.vector_norm(grad, math.inf, dim=(-2, -1)).double()


def _sketch(grad: Tensor, columns: int, length: int, seed: int, dtype: torch.dtype) -> Tensor:
    return philox.normal(philox.seed_tensor([seed], grad.device), (columns, length), philox.SKETCH, dtype)[0].mT


def _iterate_on_products(grad: Tensor, columns: int, power_iters: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    sketch = _sketch(grad, columns, grad.shape[-1], seed, dtype)
    image = multiply(grad, sketch)
    for _ in range(power_iters):
        image = multiply(grad, _cholesky_pass(multiply(grad.mT, _cholesky_pass(image))))
    basis = orthonormalise(image, seed)
    return _rayleigh_ritz(basis, multiply(grad.mT, basis).mT)


def _rayleigh_ritz(basis: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """From orthonormal Q whose span holds the wanted directions, and QᵀG: its singular vectors, turned back, and values."""
    rotation, sigma = _left_singular(projected)
    return full_precision_product(basis, rotation), sigma


def _iterate_on_gram(
    grad: Tensor, peak: Tensor, rank: int, columns: int, power_iters: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A = G·Gᵀ on the short side;  Y = A·Ω;  3·q times: Y = (A − s·I)·orth(Y), s about half the largest eigenvalue left out.

    The shift halves what is left out and hardly changes what is wanted. A is formed in fp32 and knows no σ under about 1e-3·σ₁: where the
    spectrum is that steep one more half-step with G itself, and Rayleigh and Ritz in fp64, restore it. A CPU looks; a GPU, which
    cannot without stalling, always does so.
    """
    tall = grad.shape[-2] > grad.shape[-1]
    if tall:
        grad = grad.mT
    matrix = grad.to(dtype)
    on_cpu = matrix.device.type == "cpu"
    if not on_cpu:
        half = torch.where(torch.isfinite(peak) & (peak > 0), peak, 1).rsqrt().to(dtype)[..., None, None]
        matrix = torch.nan_to_num(matrix * half * half, nan=0.0, posinf=0.0, neginf=0.0)
    squares = full_precision_product(matrix, matrix.mT)
    short = squares.shape[-1]
    mean = squares.diagonal(dim1=-2, dim2=-1).mean(-1).item() or 1.0 if on_cpu else 1.0
    squares = squares / mean  # of which products stay in range
    trace, energy = squares.diagonal(dim1=-2, dim2=-1).sum(-1), squares.square().sum(dim=(-2, -1))
    basis = _sketch(grad, columns, short, seed, dtype)
    image, shift, steep = full_precision_product(squares, basis), None, not on_cpu
    left = 1 + GRAM_STEPS * power_iters
    while True:
        if shift is not None:
            image = image - shift * basis
        following = None if steep else _well_conditioned_pass(image)
        if following is None and not steep:
            steep, left = True, min(left, 1 + STEEP_STEPS)
        basis = _cholesky_pass(image) if following is None else following
        image = full_precision_product(squares, basis)
        left -= 1
        if left == 0:
            break
        shift = None
        if not steep:  # shifted passes do not quite make a basis, of which alone it can be told what it leaves out
            left_out = trace - (basis * image).sum(dim=(-2, -1)), energy - image.square().sum(dim=(-2, -1))
            shift = _half_left_out(*left_out, trace, energy)[..., None, None]
    if not steep:
        values, vectors = torch.linalg.eigh(full_precision_product(basis.mT, image))
        if values[-rank] > STEEP * values[-1]:
            vectors = full_precision_product(basis, vectors.flip(-1)[..., :rank])
            exact = _well_conditioned_pass(vectors)
            vectors = orthonormalise(vectors, seed) if exact is None else polish(exact)
            return _from_short_side(grad, vectors, (values.flip(-1)[..., :rank] * mean).sqrt(), tall, seed)
    image = multiply(grad, _cholesky_pass(multiply(grad.mT, basis)))
    basis = orthonormalise(image, seed)
    vectors, sigma = _rayleigh_ritz(basis, multiply(grad.mT, basis).mT)
    return _from_short_side(grad, vectors, sigma, tall, seed)


def _half_left_out(total: Tensor, squares: Tensor, trace: Tensor, energy: Tensor) -> Tensor:
    """Half of Σλ² / Σλ over the eigenvalues that a basis leaves out: less than half the largest of them, and so a safe shift.

    Zero where the sums are rounding errors of those they are the difference of.
    """
    noise = 64 * torch.finfo(trace.dtype).eps
    real = (total > noise * trace) & (squares > noise * energy)
    return torch.where(real, 0.5 * squares / torch.where(real, total, 1), 0)


def _from_short_side(grad: Tensor, vectors: Tensor, sigma: Tensor, tall: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors of the wide G, or of its transpose, the matrix that was asked about, where that is `tall`."""
    return (orthonormalise(multiply(grad.mT, vectors), seed) if tall else vectors), sigma


def _well_conditioned_pass(matrix: Tensor) -> Tensor | None:
    """The unshifted pass over one matrix on a CPU, or None where its columns are too near to dependent (condition above about 10³)."""
    gram = full_precision_product(matrix.mT, matrix)
    lengths = gram.diagonal().sqrt()
    if not (lengths.min() > 1e-12 and lengths.max() < 1e12):  # also NaN
        return None
    factor, failed = torch.linalg.cholesky_ex(gram / lengths / lengths[:, None])
    if failed or not factor.diagonal().min() > LEAST_PIVOT:
        return None
    with full_precision():
        return torch.linalg.solve_triangular(factor.mT, matrix / lengths, upper=True, left=False)


def polish(basis: Tensor) -> Tensor:
    """U·(3/2·I − 1/2·UᵀU), which squares the defect of nearly orthonormal columns."""
    gram = full_precision_product(basis.mT, basis)
    return full_precision_product(basis, 1.5 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) - 0.5 * gram)


def complement(directions: Tensor, candidates: Tensor, seed: int) -> Tensor:
    """Orthonormal columns of (I − UUᵀ)·Y for orthonormal U: (…, m, h) and (…, m, t) with h + t ≤ m → (…, m, t).

    Twice is enough; the second time also clears what completion put into U. A seed of its own each time: U may itself be completed,
    and the same draws again would lie in it.
    """

    for again in range(2):
        candidates = orthonormalise(clear(directions, candidates), philox.derive_seed(seed, again))
    return clear(directions, candidates)


def clear(directions: Tensor, matrix: Tensor) -> Tensor:
    """(I − UUᵀ)·Y for orthonormal U (…, m, h)."""
    return matrix - full_precision_product(directions, full_precision_product(directions.mT, matrix))


def _whole_spectrum(grad: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    vectors, sigma = short_side_spectrum(grad)
    return left_vectors(grad, vectors, seed), sigma


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(…, k, n) with k ≤ n → all k left singular vectors (…, k, k) and values (…, k), descending, by eigh(A·Aᵀ).

    In fp64: formed in fp32 the Gram matrix would lose every σ under 3e-4·σ₁, and fp32's vectors are orthonormal to 1e-5 only.
    """
    values, vectors, _, peak = _eigen(matrix)
    return vectors.to(matrix.dtype), (values.clamp_min(0).sqrt() * peak).to(matrix.dtype)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues of A·Aᵀ, descending, and vectors, with A the matrix over its peak; A; the peak (…, 1). All fp64."""
    peak = peak_of(matrix)[..., None, None]
    usable = torch.isfinite(peak) & (peak > 0)
    peak = torch.where(usable, peak, 1)
    scaled = torch.where(usable, matrix.double() / peak, 0)
    values, vectors = torch.linalg.eigh(full_precision_product(scaled, scaled.mT))
    return values.flip(-1), vectors.flip(-1), scaled, peak[..., 0]


def short_side_spectrum(grad: Tensor) -> tuple[Tensor, Tensor]:
    """All k = min(m, n) singular vectors u (…, k, k) on the short side of G, and values ‖Gᵀu‖ (…, k).

    Eigenvalues know them to the root of fp64's rounding only.
    """
    matrix = grad.mT if grad.shape[-2] > grad.shape[-1] else grad
    _, vectors, scaled, peak = _eigen(matrix)
    sigma = torch.linalg.vector_norm(full_precision_product(vectors.mT, scaled), dim=-1) * peak
    return vectors.to(grad.dtype), sigma.to(grad.dtype)


def left_vectors(grad: Tensor, vectors: Tensor, seed: int) -> Tensor:
    """Left singular vectors (…, m, r) of G, orthonormal to 1e-5, from r of the vectors (…, k, r) on its short side."""
    return orthonormalise(full_precision_product(grad, vectors), seed) if grad.shape[-2] > grad.shape[-1] else vectors


def sample_importance(sigma: Tensor, rank: int, seeds: Sequence[int]) -> Tensor:
    """Successive sampling without replacement, P(i) ∝ σᵢ: (batch, k) → (batch, r) int64 indices, sorted by σ descending.

    The top r of log σ + Gumbel noise, which is the law of torch.multinomial(σ, r, replacement=False). Zero weights are drawn
    only after all others, uniformly. One seed a row.
    """
    weights = sigma.double()
    weights = weights / weights.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    keys = weights.clamp_min(torch.finfo(torch.float64).tiny).log()
    keys = keys + philox.gumbel(philox.seed_tensor(seeds, sigma.device), sigma.shape[-1], philox.GUMBEL)
    chosen = keys.topk(rank, dim=-1).indices.sort(dim=-1).values
    order = sigma.gather(-1, chosen).sort(dim=-1, descending=True, stable=True).indices
    return chosen.gather(-1, order)
