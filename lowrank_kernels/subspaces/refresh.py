"""New bases for a bucket of gradients of equal shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import range_finder as algorithms
from ..ops import parts
from .dominant import dominant
from .importance import importance
from .random import gaussian, random
from .spectrum import Spectrum

SELECTIONS: dict[str, Callable[[Spectrum, int, Sequence[int]], Tensor]] = {
    "importance": importance,
    "dominant": dominant,
    "random": random,
    "gaussian": gaussian,
}
BLIND = ("random", "gaussian")
"""Selections that need no gradient. Even a gradient that is all zero gets a basis from them."""
SVDS = ("randomized", "exact")

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Elements of the largest intermediate of the matrices that are processed together. In fp32 they take 16 MiB
on a CPU and 512 MiB on a GPU. About four such intermediates exist at a time."""
APART_FROM_ELEMENTS = 2**20
"""On a GPU matrices with at least this many elements are multiplied one by one in place. Smaller ones are
copied into one batch."""


def choose_bases(
    grads: Sequence[Tensor],
    previous: Sequence[Tensor],
    rank: int,
    right: bool,
    selection: str,
    svd: str,
    oversample: int,
    power_iters: int,
    seed: int,
    seeds: Sequence[int],
    dtype: torch.dtype,
    found_inf: Tensor | None = None,
) -> list[Tensor]:
    """The implementation of ops.choose_bases; see there. `seed` draws the shared sketch, `seeds` draw what
    each matrix draws for itself."""
    method = (svd, oversample, power_iters, seed)
    grads = [grad.mT if right else grad for grad in grads]
    m, n = grads[0].shape
    columns = min(2 * rank + oversample, m, n)
    copied = svd == "exact" or algorithms.SQUARE_FROM * columns >= min(m, n)
    chunk = max(1, CHUNK_ELEMENTS.get(grads[0].device.type, 2**25) // max((m + n) * columns, m * n if copied else 0))
    bases: list[Tensor] = []
    for start in range(0, len(grads), chunk):
        part = slice(start, start + chunk)
        chosen = _choose_chunk(grads[part], previous[part], rank, selection, method, seeds[part], dtype, found_inf)
        bases.extend(map(own_memory, chosen))
    return bases


def _choose_chunk(
    grads: Sequence[Tensor],
    previous: Sequence[Tensor],
    rank: int,
    selection: str,
    method: tuple[str, int, int, int],
    seeds: Sequence[int],
    dtype: torch.dtype,
    found_inf: Tensor | None,
) -> Sequence[Tensor]:
    """A basis (m, r) of `dtype` for each of a few oriented gradients. The bases may share memory with each
    other or with `previous`."""
    choose = SELECTIONS[selection]
    matrices = [algorithms.multipliable(grad) for grad in grads]
    look = algorithms.may_look(grads[0])
    if not look and matrices[0].numel() < APART_FROM_ELEMENTS:
        matrices = [torch.stack(matrices)]
    peak = parts.peaks(matrices)
    if not look:
        taken = torch.ones_like(peak, dtype=torch.bool) if selection in BLIND else peak != 0
        if previous:
            taken = taken & torch.isfinite(peak)
            if found_inf is not None:
                taken = taken & (found_inf.to(peak.device) == 0)
        fresh = choose(Spectrum(matrices, peak, *method), rank, seeds).to(dtype)
        taken = taken & torch.isfinite(fresh).flatten(1).all(dim=1)  # NaN: its eigenproblem was not solved
        return torch.where(taken[:, None, None], fresh, torch.stack(tuple(previous)).to(dtype) if previous else 0).unbind()
    # Do not compute a basis that will not be used.
    skipped = bool(previous) and found_inf is not None and found_inf.item() != 0
    chosen = list(previous) or [grads[0].new_zeros(grads[0].shape[0], rank, dtype=dtype)] * len(grads)
    wanted = [
        number
        for number, value in enumerate(peak.tolist())
        if (value != 0 or selection in BLIND) and not (skipped or (previous and not math.isfinite(value)))
    ]
    if wanted:
        if len(wanted) < len(grads):
            matrices, peak, seeds = [matrices[number] for number in wanted], peak[wanted], [seeds[number] for number in wanted]
        matrices, peak, _ = algorithms.in_range(matrices, peak)
        for number, basis in zip(wanted, choose(Spectrum(matrices, peak, *method), rank, seeds).to(dtype), strict=True):
            chosen[number] = basis
    return chosen


def own_memory(basis: Tensor) -> Tensor:
    """A copy (…, m, r) that keeps no other memory alive, in the memory order that the device's products want.

    The copy is by rows on a GPU, where the kernels read r neighbours at a time. It is by columns on a CPU,
    where Pᵀ then needs no copy.
    """
    if basis.device.type == "cpu":
        return basis.mT.clone(memory_format=torch.contiguous_format).mT
    return basis.clone(memory_format=torch.contiguous_format)
