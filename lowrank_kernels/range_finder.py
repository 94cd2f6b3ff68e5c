"""The parts of a subspace refresh in plain PyTorch: orthonormal bases, singular directions, random draws.

    Y = Ω;  several times: Y = G·Gᵀ·orth(Y);  Q = orth(Y);  QᵀG = W·Σ·Xᵀ;  U = Q·W

These are the defaults of the operators in ops/parts.py, for devices and installations without csrc/, which
does the same faster. Here Gram matrices, QR and eigenproblems are fp64, no result is looked at on the way,
and G is copied. On a GPU `eigh` waits for the device.

Sources: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1; Efraimidis, Spirakis, Inf.
Process. Lett. 97 (2006) for sampling by keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import philox
from .precision import full_accumulation, full_precision

SQUARE_FROM = 5
"""G·Gᵀ is formed if 5·l reaches the short side."""
GRAM_STEPS = 6
"""Products with G·Gᵀ for each power iteration, beside the first product. Six leave σ of Gaussian noise off by
0.5 % (leading half of r = m/4, 512 × 1376) and hold 0.991 of its energy. Three leave 1.6 % and hold 0.969."""


def full_precision_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right without tf32. With tf32 a basis would be orthonormal only to 1e-3."""
    with full_precision():
        return left @ right


def may_look(tensor: Tensor) -> bool:
    """Whether the code may read results on the way: true on a CPU. On a GPU reading would stall the queue."""
    return tensor.device.type == "cpu"


def multipliable(grad: Tensor) -> Tensor:
    """G in the dtype its products run in. bf16 stays on a GPU; other half precision becomes fp32, because
    fp16 overflows and CPUs are slow."""
    native = grad.dtype == torch.bfloat16 and grad.is_cuda
    return grad if native else grad.to(torch.promote_types(grad.dtype, torch.float32))


def in_range(grads: Sequence[Tensor], peak: Tensor) -> tuple[list[Tensor], Tensor, list[int]]:
    """Scaled matrices, their peaks, and the power of two that each matrix was divided by. The matrices must
    be ones that may be looked at.

    A matrix is scaled where fourth powers of its elements could leave the dtype's range. Zeros replace a
    matrix that is not finite.
    """
    scaled, exponents, most = list(grads), [0] * len(grads), 20 if grads[0].dtype == torch.float32 else 150
    for number, value in enumerate(peak.tolist()):
        if not math.isfinite(value):
            scaled[number] = torch.zeros_like(grads[number])
        elif value > 0 and abs(exponent := math.frexp(value)[1]) > most:
            scaled[number], exponents[number] = times_power_of_two(grads[number], -exponent), exponent
    changed = any(one is not other for one, other in zip(scaled, grads, strict=True))
    return scaled, peaks(scaled) if changed else peak, exponents


def times_power_of_two(tensor: Tensor, exponent: int) -> Tensor:
    """tensor · 2^exponent, in two steps, because the power of two may itself be out of range."""
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)


def stacked(grads: Sequence[Tensor]) -> Tensor:
    """Matrices (m, n) and batches of them (batch, m, n) as one (batch, m, n)."""
    return torch.cat([grad if grad.dim() > 2 else grad[None] for grad in grads])


def over_peak(grads: Sequence[Tensor], peak: Tensor) -> Tensor:
    """G over its largest element, (batch, m, n) in fp32 (fp64 for fp64). It is zero where the largest element
    is not finite."""
    matrix = stacked(grads)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    usable = (torch.isfinite(peak) & (peak > 0))[:, None, None]
    return torch.where(usable, matrix / torch.where(usable, peak[:, None, None], 1).to(matrix.dtype), 0)


def peaks(grads: Sequence[Tensor]) -> Tensor:
    """The largest |Gᵢⱼ| of each matrix, (batch,) fp64. It is not finite exactly where G holds a NaN or an
    infinity."""
    return torch.cat([torch.linalg.vector_norm(grad, math.inf, dim=(-2, -1)).double().reshape(-1) for grad in grads])


def multiply(grads: Sequence[Tensor], factor: Tensor) -> Tensor:
    """G·X in G's precision with fp32 sums: X (n, c), shared by all, or (batch, n, c) → (batch, m, c) in the
    dtype of X."""
    grad = stacked(grads)
    with full_accumulation():
        return (grad @ factor.to(grad.dtype)).to(factor.dtype)


def normal(like: Tensor, shape: Sequence[int], seeds: Sequence[int], stream: int) -> Tensor:
    """N(0, 1), (seeds, *shape) in fp32 (fp64 for fp64), on the device of `like`."""
    return philox.normal(philox.seed_tensor(seeds, like.device), tuple(shape), stream, torch.promote_types(like.dtype, torch.float32))


def orthonormalise(matrix: Tensor, seed: int = 0) -> Tensor:
    """Q with QᵀQ = I and span(Q) ⊇ span(Y): (…, m, l) fp32 or fp64 with l ≤ m → the same shape and dtype.

    Q's first k columns span Y's first k, and QᵀY has a positive diagonal. Columns that are zero, not finite
    or dependent on earlier ones come back as random directions orthogonal to the rest.
    """
    m, columns = matrix.shape[-2:]
    noise = normal(matrix, (columns, m), [seed], philox.COMPLETION)[0].mT / m**0.5
    peak = matrix.abs().amax(dim=-2, keepdim=True)
    usable = torch.isfinite(peak) & (peak > 0)
    unit = torch.where(usable, matrix / torch.where(usable, peak, 1), noise)
    unit = unit / torch.linalg.vector_norm(unit, dim=-2, keepdim=True)
    # The noise makes dependent columns distinct. It is smaller than the rounding of Y.
    basis, factor = torch.linalg.qr((unit + 8 * torch.finfo(matrix.dtype).eps * noise).double())
    signs = torch.where(factor.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)
    return _by_columns((basis * signs[..., None, :]).to(matrix.dtype))


def _by_columns(matrix: Tensor) -> Tensor:
    return matrix.mT.contiguous().mT


def eigh(gram: Tensor, terms: int, solver: str = "auto") -> tuple[Tensor, Tensor]:
    """Eigenvectors (…, k, k) and eigenvalues (…, k), descending, of Gram matrices (…, k, k) in fp64, of
    vectors of length `terms`.

    `solver` is "auto", or one of the two that csrc/ has for a GPU, "jacobi" and "cusolver". Here there is one
    solver, and torch.linalg.eigh raises an error where it fails.
    """
    if solver != "auto":
        raise ValueError(f"solver must be 'auto' where the extension's CUDA part does not run, got {solver!r}")
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(-1), values.flip(-1)


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors and values, by eigh(A·Aᵀ) in fp64: (batch, k, n) with k ≤ n → vectors (batch,
    k, k) and values (batch, k), descending.

    A Gram matrix in fp32 would lose every σ under 3e-4·σ₁, and fp32's vectors are orthonormal only to 1e-5.
    """
    wide = matrix.double()
    vectors, values = eigh(wide @ wide.mT, wide.shape[-1])
    return vectors, values.clamp_min(0).sqrt()


def short_side_spectrum(grads: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """All k = min(m, n) singular vectors (batch, k, k) on the short side of G, and values (batch, k). The
    caller wants `count` of them."""
    peak = peaks(grads)
    matrix = over_peak(grads, peak)
    vectors, sigma = left_singular(matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix)
    return _by_columns(vectors.to(matrix.dtype)), (sigma * peak[:, None]).to(matrix.dtype)


def leading(grads: Sequence[Tensor], peak: Tensor, count: int, oversample: int, power_iters: int, seed: int) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors (batch, m, count) of G and values (batch, count), descending,
    approximately. `peak` is the result of `peaks`.

    The shape alone decides the method, with l = count + oversample. If l ≥ min(m, n), the whole spectrum is
    computed. Else it is subspace iteration on the short side, from one Ω for all: with G·Gᵀ if 5·l ≥ min(m,
    n), else with Gᵀ and G in turn. Vectors are orthonormal to 1e-5 for every input. Those of a matrix that is
    not finite are arbitrary.
    """
    matrix = over_peak(grads, peak)
    tall = matrix.shape[-2] > matrix.shape[-1]
    matrix = matrix.mT if tall else matrix
    short, columns = matrix.shape[-2], count + oversample
    if columns >= short:
        vectors, sigma = left_singular(matrix)
    else:
        square = matrix.double() @ matrix.double().mT if SQUARE_FROM * columns >= short else None
        basis = normal(matrix, (columns, short), [seed], philox.SKETCH)[0].mT
        for _ in range(1 + power_iters * (1 if square is None else GRAM_STEPS)):
            image = matrix @ (matrix.mT @ basis) if square is None else square @ basis.double()
            basis = orthonormalise(image, seed).to(image.dtype)
        basis = basis.double()
        rotation, sigma = left_singular(basis.mT @ matrix.double())
        vectors = basis @ rotation
    vectors, sigma = vectors[..., :count].to(matrix.dtype), sigma[..., :count] * peak[:, None]
    return _by_columns(orthonormalise(full_precision_product(matrix.mT, vectors), seed) if tall else vectors), sigma.to(matrix.dtype)


def polish(basis: Tensor) -> Tensor:
    """U·(3/2·I − 1/2·UᵀU), which squares the defect of nearly orthonormal columns. It runs in fp64, because
    the errors of products may all have the same sign."""
    wide = basis.double()
    gram = wide.mT @ wide
    return (wide @ (1.5 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) - 0.5 * gram)).to(basis.dtype)


def clear(directions: Tensor, matrix: Tensor) -> Tensor:
    """(I − UUᵀ)·Y for orthonormal U (…, m, h)."""
    with full_precision():
        return matrix - directions @ (directions.mT @ matrix)


def sample_importance(sigma: Tensor, rank: int, seeds: Sequence[int]) -> Tensor:
    """Successive sampling without replacement, P(i) ∝ σᵢ: (batch, k) → (batch, r) int64 indices, sorted by σ
    descending.

    The indices are the top r of log σ + Gumbel noise, which is the law of torch.multinomial(σ, r,
    replacement=False). Zero weights are drawn only after all others, uniformly. Each row has its own seed.
    """
    weights = sigma.double()
    weights = weights / weights.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    keys = weights.clamp_min(torch.finfo(torch.float64).tiny).log()
    keys = keys + philox.gumbel(philox.seed_tensor(seeds, sigma.device), sigma.shape[-1], philox.GUMBEL)
    chosen = keys.topk(rank, dim=-1).indices.sort(dim=-1).values
    order = sigma.gather(-1, chosen).sort(dim=-1, descending=True, stable=True).indices
    return chosen.gather(-1, order)
