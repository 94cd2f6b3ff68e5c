"""The operators that a subspace refresh is made of: schemas, fakes, and defaults in PyTorch
(range_finder.py). csrc/ registers its own implementations.

`grads` are matrices (m, n) of one shape, or batches of them (batch, m, n), in the dtype their products run
in. Results are one batch. On a CPU the compiled operators look at each separate matrix on the way. A batch is
processed in one way for all its matrices, as on a GPU, where no operator waits for the device. Vectors are
columns, and each column is contiguous in memory: (batch, m, k) is the transpose of a contiguous (batch, k,
m).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import range_finder as algorithms
from . import dispatch


def _count(grads: Sequence[Tensor]) -> int:
    return sum(grad.shape[0] if grad.dim() > 2 else 1 for grad in grads)


def _columns(like: Tensor, *shape: int) -> Tensor:
    *batch, m, columns = shape
    return like.new_empty(*batch, columns, m, dtype=torch.promote_types(like.dtype, torch.float32)).mT


def _peaks_fake(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty(_count(grads), dtype=torch.float64)


def _leading_fake(grads: list[Tensor], peak: Tensor, count: int, oversample: int, power_iters: int, seed: int) -> tuple[Tensor, Tensor]:
    vectors = _columns(grads[0], _count(grads), grads[0].shape[-2], count)
    return vectors, vectors.new_empty(len(vectors), count)


def _short_side_spectrum_fake(grads: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    short = min(grads[0].shape[-2:])
    vectors = _columns(grads[0], _count(grads), short, short)
    return vectors, vectors.new_empty(len(vectors), short)


def _eigh_fake(gram: Tensor, terms: int, solver: str) -> tuple[Tensor, Tensor]:
    return gram.new_empty(gram.shape).mT, gram.new_empty(gram.shape[:-1])


def _multiply_fake(grads: list[Tensor], factor: Tensor) -> Tensor:
    return _columns(factor, _count(grads), grads[0].shape[-2], factor.shape[-1])


def _normal_fake(like: Tensor, shape: Sequence[int], seeds: Sequence[int], stream: int) -> Tensor:
    return like.new_empty(len(seeds), *shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _orthonormalise_fake(matrix: Tensor, seed: int) -> Tensor:
    return _columns(matrix, *matrix.shape)


def _sample_importance_fake(sigma: Tensor, rank: int, seeds: Sequence[int]) -> Tensor:
    return sigma.new_empty(sigma.shape[0], rank, dtype=torch.int64)


peaks = dispatch.define("peaks", "(Tensor[] grads) -> Tensor", _peaks_fake, algorithms.peaks)
leading = dispatch.define(
    "leading",
    "(Tensor[] grads, Tensor peak, int count, int oversample, int power_iters, int seed) -> (Tensor, Tensor)",
    _leading_fake,
    algorithms.leading,
)
short_side_spectrum = dispatch.define(
    "short_side_spectrum", "(Tensor[] grads, int count) -> (Tensor, Tensor)", _short_side_spectrum_fake, algorithms.short_side_spectrum
)
eigh = dispatch.define("eigh", "(Tensor gram, int terms, str solver) -> (Tensor, Tensor)", _eigh_fake, algorithms.eigh)
multiply = dispatch.define("multiply", "(Tensor[] grads, Tensor factor) -> Tensor", _multiply_fake, algorithms.multiply)
normal = dispatch.define("normal", "(Tensor like, int[] shape, int[] seeds, int stream) -> Tensor", _normal_fake, algorithms.normal)
orthonormalise = dispatch.define("orthonormalise", "(Tensor matrix, int seed) -> Tensor", _orthonormalise_fake, algorithms.orthonormalise)
sample_importance = dispatch.define(
    "sample_importance", "(Tensor sigma, int rank, int[] seeds) -> Tensor", _sample_importance_fake, algorithms.sample_importance
)


def orthonormalise_each(matrix: Tensor, seed: int) -> Tensor:
    """orthonormalise for (…, m, l). A CPU takes the matrices one by one, so that it may look at each."""
    if matrix.dim() == 2 or not algorithms.may_look(matrix):
        return orthonormalise(matrix, seed)
    if matrix.numel() == 0:
        return torch.empty_like(matrix)
    return torch.stack([orthonormalise(one, seed).mT for one in matrix.flatten(0, -3)]).mT.view(matrix.shape)
