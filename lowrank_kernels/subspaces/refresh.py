"""New bases for a bucket of gradients of equal shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..range_finder import multipliable, peak_of
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
    """The default of the operator of that name, see ops.choose_bases: `seed` draws the sketch, `seeds` what is each matrix's own."""
    choose = SELECTIONS[selection]
    spectrum = Spectrum(svd, oversample, power_iters, seed)
    chunk = max(1, STACK_ELEMENTS // grads[0].numel())
    bases: list[Tensor] = []
    for start in range(0, len(grads), chunk):
        stop = start + chunk
        stacked = multipliable(torch.stack(tuple(grads[start:stop])))
        stacked = stacked.mT if right else stacked
        fresh = choose(stacked, rank, spectrum, seeds[start:stop]).to(dtype)
        peak = peak_of(stacked)
        some = torch.ones_like(peak, dtype=torch.bool) if selection == "random" else peak != 0
        if previous:
            usable = torch.isfinite(peak) & some
            if found_inf is not None:
                usable = usable & (found_inf.to(usable.device) == 0)
            fresh = torch.where(usable[:, None, None], fresh, torch.stack(tuple(previous[start:stop])).to(dtype))
        else:
            fresh = torch.where(some[:, None, None], fresh, 0)
        bases.extend(map(own_memory, fresh.unbind()))
    return bases


def own_memory(basis: Tensor) -> Tensor:
    """A copy (…, m, r) that keeps nothing else alive, in the order that the device's products want.

    By rows on a GPU, where the kernels read r neighbours at a time; by columns on a CPU, where Pᵀ then needs no copy.
    """
    if basis.device.type == "cpu":
        return basis.mT.clone(memory_format=torch.contiguous_format).mT
    return basis.clone(memory_format=torch.contiguous_format)
