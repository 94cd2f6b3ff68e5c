"""What a step and a refresh of bases hold for a moment, by formula: bounds, not counts."""

from __future__ import annotations

import torch

from ..backends import Hyper
from ..backends.cpu import CHUNK_ELEMENTS
from ..backends.foreach import CHUNK_ELEMENTS as RULE_ELEMENTS
from ..optim.refreshes import REFRESHED_ELEMENTS
from ..sharded.refresh import GATHERED_ELEMENTS
from ..sharded.step import PART_ELEMENTS

OF_A_RULE = 6
"""Tensors of R's size that a composed rule has at a time."""
OF_A_MESSAGE = 4
"""Tensors of R's size that exist while R is under way between processes."""


def step_bytes(m: int, n: int, r: int, count: int, dtype: torch.dtype, hyper: Hyper, device: str) -> int:
    """Temporaries of one bucket: R and N, and what a composed rule keeps; on a CPU also P·N of a matrix, and
    copies where the weight is in 16 bits or the lift takes the gradient."""
    size, takes_gradient = max(4, dtype.itemsize), hyper.lift.takes_gradient
    is_fused = hyper.rule.name == "adamw" and not (device == "cpu" and takes_gradient)
    of_r = r * n * size
    if device == "cpu":
        at_once = 2 * min(count, max(1, CHUNK_ELEMENTS // (r * n))) if is_fused else 3 * count
        return at_once * of_r + m * n * size * (1 + (dtype.itemsize < 4) + 3 * takes_gradient)
    if is_fused:
        from ..backends.triton.table import TEMPORARY_BYTES  # imported here, so that a CPU stays free of Triton

        return min(2 * count * of_r, max(2 * of_r, TEMPORARY_BYTES))
    return 2 * count * of_r + OF_A_RULE * min(count * of_r, max(of_r, RULE_ELEMENTS * size))


def refresh_bytes(m: int, n: int, columns: int, count: int, dtype: torch.dtype, device: str) -> int:
    """Temporaries of a range finder: the Gram matrix of the short side, in fp64 on a CPU, thin matrices, and
    a copy of the gradients at their own precision (in fp32 on a CPU)."""
    short, long = min(m, n), max(m, n)
    if device == "cpu":  # one matrix after another
        return (short * short + 4 * short * min(columns, short)) * 8 + m * n * 4 * (dtype.itemsize < 4)
    at_once = min(count, max(1, REFRESHED_ELEMENTS // (m * n)))
    return at_once * ((short * short + 2 * (short + long) * min(columns, short)) * 4 + m * n * dtype.itemsize)


def message_bytes(n: int, r: int, count: int, dtype: torch.dtype) -> int:
    """Of a bucket whose R is a sum over processes, with all of its n columns."""
    return OF_A_MESSAGE * min(count, max(1, PART_ELEMENTS // (r * n))) * r * n * max(4, dtype.itemsize)


def gathered(elements: int, count: int, shards: int) -> int:
    """How many of a bucket's matrices, of so many elements, a process has whole at a time in a refresh."""
    at_once = max(1, GATHERED_ELEMENTS // elements) * shards
    return -(-min(count, at_once) // shards)
