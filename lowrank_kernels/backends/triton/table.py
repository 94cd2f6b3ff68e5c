"""Pointer tables, with which one launch serves a whole bucket.

A bucket is a list of B matrices of equal shape, dtype and strides. Its addresses live in an int64 tensor on
the device, and each program loads its own from there (pointers.py). Each step writes the table anew, by one
asynchronous copy.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...storage import eight_bit
from ..bucket import Bucket
from ..upload import pack, upload

_LOWEST = 0 if sys.byteorder == "little" else 7
MAX_MATRICES = 65535  # second dimension of a CUDA grid
TEMPORARY_BYTES = 2**28
"""Bytes of R and N of one part. Parts run one after another in the same memory. A part of this size has
enough programs to fill a large GPU five times over at r = 128 and more. It takes hundreds of microseconds, so
neither a last wave nor launches matter."""
NORMS = ("residual_norm", "scaled_norm")
"""States of lifts that have a limiter, one number for each matrix."""


@dataclass(frozen=True)
class Rows:
    """The rows of a bucket's table. Each row has the B addresses of one list of the bucket, (B,) int64 on the
    device. None: the list is absent.

    aligned: every matrix starts at a multiple of 16 bytes. Triton cannot know that of an address that a
    kernel loads from memory. steps and norms, the state of a lift, are read as one float each, so they need
    no alignment, and neither do scales.
    """

    weights: Tensor
    bases: Tensor
    steps: Tensor
    aligned: bool
    grads: Tensor | None = None
    projected: Tensor | None = None
    exp_avgs: Tensor | None = None
    exp_avg_sqs: Tensor | None = None
    exp_avg_scales: Tensor | None = None
    exp_avg_sq_scales: Tensor | None = None
    norms: Tensor | None = None


def rows_of(bucket: Bucket) -> Rows:
    """The table of a bucket, on its device, by a single asynchronous copy."""
    lists = {"weights": bucket.weights, "bases": bucket.bases}
    for name, tensors in (("grads", bucket.grads), ("projected", bucket.projected)):
        if tensors is not None:
            lists[name] = tensors
    for name in eight_bit.MOMENTS:
        if name in bucket.states:
            lists[f"{name}s"] = bucket.states[name]
    matrices = len(lists)
    for name in eight_bit.SCALES:
        if name in bucket.states:
            lists[f"{name}s"] = bucket.states[name]
    for name in NORMS:
        if name in bucket.states:
            lists["norms"] = bucket.states[name]
    lists["steps"] = bucket.steps
    packed = pack([list(map(Tensor.data_ptr, tensors)) for tensors in lists.values()])
    lowest_bytes = set(packed[_LOWEST : 8 * matrices * len(bucket) : 8])
    rows = dict(zip(lists, upload(packed, len(lists), bucket.device), strict=True))
    return Rows(**rows, aligned=not any(byte % 16 for byte in lowest_bytes))


def launchable(bucket: Bucket, temporary_bytes: int = 0) -> Iterator[Bucket]:
    """The bucket, in as many parts as one launch for each takes, and as TEMPORARY_BYTES want it.

    temporary_bytes: those of one matrix. All parts have equally many matrices but the last one, which has
    hardly fewer.
    """
    count = len(bucket)
    most = max(1, min(count, MAX_MATRICES, TEMPORARY_BYTES // max(1, temporary_bytes)))
    at_once = -(-count // -(-count // most))
    if at_once == count:
        yield bucket
        return
    for start in range(0, count, at_once):
        yield bucket.part(start, start + at_once)


def wide(*matrices: Tensor) -> bool:
    """True when Triton can prove 16-byte accesses: one stride is 1, and the extent along it and the other
    stride are multiples of 16 elements. The other extent does not matter."""
    return all(1 in matrix.stride() and _runs_of_16(matrix) for matrix in matrices)


def _runs_of_16(matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    along_rows, along_columns = matrix.stride()
    extent, other = (columns, along_rows) if along_columns == 1 else (rows, along_columns)
    return extent % 16 == 0 and other % 16 == 0


def on_device(device: torch.device):
    """Makes the bucket's device the current one, because Triton launches on the current device."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
