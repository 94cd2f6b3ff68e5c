"""Randomized range finder and the sampling of directions, in plain PyTorch: what a subspace refresh is made of.

    Y = G·Ω;  q times: Y = G·orth(Gᵀ·orth(Y));  Q = orth(Y);  QᵀG = W·Σ·Xᵀ;  U = Q·W

Batched over equal shapes, fixed shapes throughout, no branch on data. Products run at the gradient's precision with fp32
accumulation (in fp32 for fp16, and for everything on a CPU); all that is l × l runs in fp32 or better, never in tf32.

Sources: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1; Fukaya et al., "Shifted Cholesky QR",
SIAM J. Sci. Comput. 42 (2020); Efraimidis, Spirakis, Inf. Process. Lett. 97 (2006) for sampling by keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import philox
from .precision import full_precision


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
    for shifted in (True, True, True, False, False):
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

    The shift keeps the factorisation from failing and lifts small singular values by up to 1/sqrt(shift): one such pass is all
    that a power iteration needs between its products. Without the shift, a well-conditioned Y becomes orthonormal.
    """
    matrix = _unit_columns(matrix)
    columns = matrix.shape[-1]
    identity = torch.eye(columns, dtype=matrix.dtype, device=matrix.device)
    gram = full_precision_product(matrix.mT, matrix)
    if shifted:
        gram = gram + (2 * torch.finfo(matrix.dtype).eps * columns) * identity
    factor, failed = torch.linalg.cholesky_ex(gram)
    factor = torch.where((failed != 0)[..., None, None], identity, factor)
    with full_precision():
        return torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False)


def frobenius_norm(grad: Tensor) -> Tensor:
    """(…, m, n) → (…) fp64: ‖G‖_F without overflow or underflow; not finite exactly where G holds a NaN or an infinity."""
    return torch.linalg.vector_norm(grad, dim=(-2, -1), dtype=torch.float64)


def multipliable(grad: Tensor) -> Tensor:
    """G in the dtype its products run in: bf16 as it is on a GPU; other half precision in fp32 (fp16 overflows, CPUs are slow)."""
    native = grad.dtype == torch.bfloat16 and grad.is_cuda
    return grad if native else grad.to(torch.promote_types(grad.dtype, torch.float32))


def multiply(grad: Tensor, factor: Tensor) -> Tensor:
    """G·X in G's precision, in the dtype of X."""
    return (grad @ factor.to(grad.dtype)).to(factor.dtype)


def range_finder(grad: Tensor, rank: int, oversample: int = 8, power_iters: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors and values of G, approximately: (…, m, n) → basis (…, m, r), sigma (…, r) descending.

    Sketches l = r + oversample columns; where that reaches min(m, n) the whole spectrum comes from eigh on the short side.
    One Ω, a function of `seed` alone, serves the whole batch. Output is fp32 (fp64 for fp64 input). The basis is orthonormal
    to 1e-5 for every input; sigma is NaN for a matrix that is not finite, whose basis is then random.
    """
    m, n = grad.shape[-2:]
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    finite = torch.isfinite(frobenius_norm(grad))
    columns = rank + oversample
    if columns >= min(m, n):
        basis, sigma = _whole_spectrum(grad.to(dtype), seed)
    else:
        basis, sigma = _sketched_spectrum(grad, columns, power_iters, seed, dtype)
    sigma = torch.where(finite[..., None], sigma, torch.nan)
    return basis[..., :rank].contiguous(), sigma[..., :rank].contiguous()


def _sketched_spectrum(grad: Tensor, columns: int, power_iters: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grad = multipliable(grad)
    sketch = philox.normal(philox.seed_tensor([seed], grad.device), (columns, grad.shape[-1]), philox.SKETCH, dtype)[0].mT
    image = multiply(grad, sketch)
    for _ in range(power_iters):
        image = multiply(grad, _cholesky_pass(multiply(grad.mT, _cholesky_pass(image))))
    basis = orthonormalise(image, seed)
    rotation, sigma = _left_singular(multiply(grad.mT, basis).mT)
    return full_precision_product(basis, rotation), sigma


def complement(directions: Tensor, candidates: Tensor, seed: int) -> Tensor:
    """Orthonormal columns of (I − UUᵀ)·Y for orthonormal U: (…, m, h) and (…, m, t) with h + t ≤ m → (…, m, t).

    Twice is enough; the second time also clears what completion put into U. A seed of its own each time: U may itself be completed,
    and the same draws again would lie in it.
    """

    def clear(matrix: Tensor) -> Tensor:
        return matrix - full_precision_product(directions, full_precision_product(directions.mT, matrix))

    for again in range(2):
        candidates = orthonormalise(clear(candidates), philox.derive_seed(seed, again))
    return clear(candidates)


def _whole_spectrum(grad: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    m, n = grad.shape[-2:]
    if m <= n:
        return _left_singular(grad)
    rotation, sigma = _left_singular(grad.mT)
    return orthonormalise(grad @ rotation, seed), sigma


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(…, k, n) with k ≤ n → all k left singular vectors (…, k, k) and values (…, k), descending, by eigh(A·Aᵀ).

    The eigenproblem runs in fp64: fp32's vectors are orthonormal to 1e-5 only. The eigenvalues of a Gram matrix formed in fp32 lose
    everything under sqrt(u)·σ₁, so sigma is measured again as the length of the rows of UᵀA.
    """
    peak = matrix.abs().amax(dim=(-2, -1), keepdim=True)
    peak = torch.where(torch.isfinite(peak) & (peak > 0), peak, 1)
    scaled = torch.nan_to_num(matrix / peak, nan=0.0, posinf=0.0, neginf=0.0)
    vectors = torch.linalg.eigh(full_precision_product(scaled, scaled.mT).double()).eigenvectors.to(matrix.dtype)
    sigma, order = torch.linalg.vector_norm(full_precision_product(vectors.mT, scaled), dim=-1).sort(dim=-1, descending=True)
    vectors = vectors.gather(-1, order[..., None, :].expand_as(vectors))
    return vectors, sigma * peak[..., 0]


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
