"""Stochastic rounding of bf16 weights, as a function of (seed, step, element)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import philox


def round_stochastically(values: Tensor, seed: Tensor, step: int | Tensor) -> Tensor:
    """Rounds one matrix (rows, columns) to bf16, up or down at random so that the mean stays: E[result] =
    fp32(value), exactly.

    A bf16 is the upper half of an fp32. For element (i, j), 16 random bits are added to the lower half, which
    is then dropped:

        word(i, j) = philox(key = seed, counter = (j // 8, i, ROUNDING, step))[j % 8 // 2];
        the bits are its lower half where j is even, else its upper half

    i and j are indices into the matrix as it is stored. seed: (1,) int64. step: the number of this update.
    Values that are not finite are rounded to nearest.
    """
    rows, columns = values.shape
    values = values.to(torch.float32).contiguous()
    bits = philox.rounding_bits(seed, rows, columns, step)
    rounded = ((values.view(torch.int32) + bits.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))
