"""New bases for a bucket of gradients of equal shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..philox import derive_seed
from ..range_finder import frobenius_norm, multipliable
from .dominant import dominant
from .importance import importance
from .random import random
from .spectrum import Spectrum

SELECTIONS: dict[str, Callable[[Tensor, int, Spectrum, Sequence[int]], Tensor]] = {
    "importance": importance,
    "dominant": dominant,
    "random": random,
}
SVDS = ("randomized", "exact")

STACK_ELEMENTS = 2**25
"""Gradients are copied into one batch for the refresh, this many elements (128 MiB in fp32) or one matrix at a time."""


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
    """One basis (m, r) of `dtype` for each gradient; they may share memory, see `own_memory`.

    Args:
        grads: matrices as stored, of equal shape; the right side works on their transposes.
        previous: the bases in use, which stay where a gradient is not finite or found_inf ≠ 0 (decided on the device); None at the
            first refresh, when such a gradient gets a random basis.
        places: (parameter index, expert) of each matrix. All draws are functions of (seed, place, refresh_number); the sketch is
            one of (seed, refresh_number) and shared.
    """
    choose = SELECTIONS[selection]
    spectrum = Spectrum(svd, oversample, power_iters, derive_seed(seed, refresh_number))
    seeds = [derive_seed(seed, refresh_number, *place) for place in places]
    chunk = max(1, STACK_ELEMENTS // grads[0].numel())
    bases: list[Tensor] = []
    for start in range(0, len(grads), chunk):
        stop = start + chunk
        stacked = multipliable(torch.stack(tuple(grads[start:stop])))
        stacked = stacked.mT if right else stacked
        fresh = choose(stacked, rank, spectrum, seeds[start:stop]).to(dtype)
        if previous is not None:
            usable = torch.isfinite(frobenius_norm(stacked))
            if found_inf is not None:
                usable = usable & (found_inf.to(usable.device) == 0)
            fresh = torch.where(usable[:, None, None], fresh, torch.stack(tuple(previous[start:stop])))
        bases.extend(fresh.unbind())
    return bases


def own_memory(basis: Tensor) -> Tensor:
    """A copy (…, m, r) that keeps nothing else alive, in the order that the device's products want.

    By rows on a GPU, where the kernels read r neighbours at a time; by columns on a CPU, where Pᵀ then needs no copy.
    """
    if basis.device.type == "cpu":
        return basis.mT.clone(memory_format=torch.contiguous_format).mT
    return basis.clone(memory_format=torch.contiguous_format)
