"""The refresh in checked functions: orthonormalise, range_finder, sample_importance, choose_bases.

They are made of the operators of parts.py and the selections of subspaces/. None is differentiable, and
autocast has no effect inside them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extension, philox
from .. import range_finder as algorithms
from . import dispatch, parts


def _choose_bases_default(*arguments: object) -> list[Tensor]:
    from .. import subspaces  # imported here because subspaces imports the operators

    return subspaces.choose_bases(*arguments)


def _choose_bases_fake(grads: list[Tensor], previous: list[Tensor], rank: int, right: bool, *args: object) -> list[Tensor]:
    from .. import subspaces

    dtype = args[-2]
    shapes = [grad.shape[::-1] if right else grad.shape for grad in grads]
    return [subspaces.own_memory(grad.new_empty(m, rank, dtype=dtype)) for grad, (m, _) in zip(grads, shapes, strict=True)]


_choose_bases = dispatch.define(
    "choose_bases",
    "(Tensor[] grads, Tensor[] previous, int rank, bool right, str selection, str svd, int oversample, int power_iters, int seed, "
    "int[] seeds, ScalarType dtype, Tensor? found_inf) -> Tensor[]",
    _choose_bases_fake,
    _choose_bases_default,
)
"""An operator, so that a compiler does not look inside."""


def _check_rank(rank: int, limit: int, shape: torch.Size) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limit:
        raise ValueError(f"rank must be an int from 1 to {limit} for shape {tuple(shape)}, got {rank!r}")


@dispatch.outside_training
def orthonormalise(matrix: Tensor, *, seed: int = 0) -> Tensor:
    """Q with QᵀQ = I whose first k columns span Y's first k: (…, m, l), l ≤ m → the same shape, fp32 (fp64
    for fp64).

    Columns that are zero, not finite or dependent become random directions (a function of `seed`). So Q is
    always a full orthonormal set, to 1e-5. The method is shifted CholeskyQR (Fukaya et al. 2020). It is meant
    for m up to some 10⁶; much longer sums lose more accuracy in fp32. Raises ValueError if l > m, and
    TypeError for an integer or complex matrix.
    """
    if not matrix.is_floating_point():
        raise TypeError(f"matrix must be real floating-point, got {matrix.dtype}; convert it first")
    if matrix.dim() < 2 or not 1 <= matrix.shape[-1] <= matrix.shape[-2]:
        raise ValueError(f"matrix must have shape (…, m, l) with 1 ≤ l ≤ m, got {tuple(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.to(torch.float32)
    return parts.orthonormalise_each(matrix, philox.signed64(seed)).contiguous()


@dispatch.outside_training
def range_finder(grad: Tensor, rank: int, *, oversample: int = 8, power_iters: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors and values of G, by a randomized range finder (Halko, Martinsson, Tropp
    2011).

        Y = G·Ω;  q times: Y = G·orth(Gᵀ·orth(Y));  Q = orth(Y);  QᵀG = W·Σ·Xᵀ;  basis = Q·W

    If l = r + oversample columns are a fifth of the short side or more, products with A = G·Gᵀ on that side
    replace those with G: Y = A·Ω, then 3·q times Y = (A − s·I)·orth(Y). That is cheaper, and more accurate on
    slowly decaying spectra.

    Args:
        grad: (…, m, n), any real floating dtype. Products run at its precision with fp32 accumulation on a
            GPU, in fp32 on a CPU.
        rank: r, from 1 to min(m, n).
        oversample: columns sketched beyond r, ≥ 0. Where r + oversample reaches min(m, n) there is no sketch:
            the whole spectrum is computed from the Gram matrix of the short side.
        power_iters: q ≥ 0. Each iteration costs two more products with G and sharpens a slowly decaying
            spectrum.
        seed: any int. One Ω serves a whole batch.

    Returns:
        basis (…, m, r), orthonormal to 1e-5, and sigma (…, r), descending; fp32 (fp64 for fp64 input). The
        right basis is that of `grad.mT`. A zero or rank-deficient G gives a basis completed with random
        directions. A G that is not finite gives a random basis and NaN for sigma. NaN for both says that a
        GPU's eigensolver reported a failure.

    Raises:
        ValueError: shape, rank, oversample or power_iters out of range.
        TypeError: an integer, complex or sparse gradient.
    """
    if not grad.is_floating_point() or grad.layout != torch.strided:
        raise TypeError(f"grad must be a dense real floating-point tensor, got {grad.dtype}, {grad.layout}; convert it first")
    if grad.dim() < 2 or grad.numel() == 0:
        raise ValueError(f"grad must have shape (…, m, n) with m, n ≥ 1, got {tuple(grad.shape)}")
    _check_rank(rank, min(grad.shape[-2:]), grad.shape)
    for name, value in (("oversample", oversample), ("power_iters", power_iters)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be an int ≥ 0, got {value!r}")
    grads = algorithms.multipliable(grad).reshape(-1, *grad.shape[-2:])
    grads, look = [grads], algorithms.may_look(grads)
    if look:  # each matrix costs only what its own spectrum needs
        grads = list(grads[0])
    peak = parts.peaks(grads)
    finite = torch.isfinite(peak)[:, None]
    grads, peak, exponents = algorithms.in_range(grads, peak) if look else (grads, peak, [])
    basis, sigma = parts.leading(grads, peak, rank, min(oversample, max(grad.shape[-2:])), power_iters, philox.signed64(seed))
    if any(exponents):
        sigma = torch.stack([algorithms.times_power_of_two(*each) for each in zip(sigma, exponents, strict=True)])
    sigma = torch.where(finite, sigma, torch.nan)
    return basis.reshape(*grad.shape[:-1], rank).contiguous(), sigma.reshape(*grad.shape[:-2], rank)


@dispatch.outside_training
def sample_importance(sigma: Tensor, rank: int, *, seed: int | Sequence[int]) -> Tensor:
    """r directions drawn one after another without replacement, P(i) ∝ σᵢ among those left (I3S, arXiv
    2502.05790).

    The law is that of `torch.multinomial(sigma, rank, replacement=False)`, computed as the top r of log σ +
    Gumbel noise. There is no host sync, and the result is a pure function of the seed. Zero weights come
    last.

    Args:
        sigma: (…, k) weights ≥ 0, floating point.
        rank: r, from 1 to k.
        seed: an int (rows of a batch then draw independently), or one int for each row.

    Returns:
        (…, r) int64 indices into sigma's last dimension, sorted by σ descending.

    Raises:
        ValueError: rank outside 1…k, or the number of seeds is not the number of rows.
    """
    if sigma.dim() < 1 or not sigma.is_floating_point():
        raise ValueError(f"sigma must be a floating-point tensor of shape (…, k), got {sigma.dtype} {tuple(sigma.shape)}")
    _check_rank(rank, sigma.shape[-1], sigma.shape)
    rows = sigma.reshape(-1, sigma.shape[-1])
    seeds = [philox.derive_seed(seed, row) for row in range(len(rows))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(rows):
        raise ValueError(f"seed must be an int or hold one int for each of the {len(rows)} rows of sigma, got {len(seeds)}")
    chosen = parts.sample_importance(rows, rank, [philox.signed64(s) for s in seeds])
    return chosen.reshape(*sigma.shape[:-1], rank)


@dispatch.outside_training
def choose_bases(
    grads: Sequence[Tensor],
    previous: Sequence[Tensor] | None,
    *,
    rank: int,
    right: bool,
    selection: str,
    svd: str,
    oversample: int,
    power_iters: int,
    seed: int,
    refresh_number: int,
    places: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    found_inf: Tensor | None = None,
) -> list[Tensor]:
    """One basis (m, r) of `dtype` for each gradient, each in memory of its own. This is the optimizers'
    refresh, in one call.

    A gradient that is all zero chooses no basis. The old basis stays; at the first refresh the result is
    zeros ("random" and "gaussian" need no gradient and still draw).

    Args:
        grads: matrices as stored, of equal shape and device. The right side works on their transposes.
        previous: the bases in use. A basis stays where its gradient is not finite or found_inf ≠ 0 (decided
            on the device). None at the first refresh, when such a gradient gets a random basis. Where a GPU's
            eigensolver reports that it failed, the basis stays as well, and is zeros at the first refresh.
        selection, svd: keys of subspaces.SELECTIONS and SVDS.
        places: (number of the parameter, expert) of each matrix. All draws are functions of (seed, place,
            refresh_number), except the sketch, which is a function of (seed, refresh_number) and shared.
    """
    from .. import subspaces  # imported here because subspaces imports the operators

    _check_lists(grads, previous, places)
    for name, value, choices in (("selection", selection, tuple(subspaces.SELECTIONS)), ("svd", svd, subspaces.SVDS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    if grads[0].is_cuda:
        _say_if_slow()
    sketch_seed = philox.signed64(philox.derive_seed(seed, refresh_number))
    seeds = [philox.signed64(philox.derive_seed(seed, refresh_number, *place)) for place in places]
    oversample = min(oversample, max(grads[0].shape))
    arguments = (list(grads), list(previous or ()), rank, right, selection, svd, oversample, power_iters, sketch_seed, seeds, dtype)
    return _choose_bases(*arguments, found_inf)


@functools.cache
def _say_if_slow() -> None:
    """Warns once if a GPU's refresh has no compiled kernels."""
    if extension.missing("CUDA") and not dispatch.REFERENCE_FORCED:
        warnings.warn(
            f"lowrank_kernels: the subspace refresh on the GPU runs in PyTorch, which is slower; the extension is {extension.status()}",
            RuntimeWarning,
            stacklevel=2,
        )


def _check_lists(grads: Sequence[Tensor], previous: Sequence[Tensor] | None, places: Sequence[tuple[int, int]]) -> None:
    if not grads:
        raise ValueError("grads must hold at least one matrix, got none")
    if previous and len(previous) != len(grads):
        raise ValueError(f"previous must be empty or hold a basis for each of the {len(grads)} gradients, got {len(previous)}")
    if len(places) != len(grads):
        raise ValueError(f"places must give a seed for each of the {len(grads)} gradients, got {len(places)}")
