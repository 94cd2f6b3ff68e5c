"""Pointer tables, with which one launch serves a whole bucket.

A bucket is a list of B matrices of equal shape, dtype and strides. Its addresses live in an int64 tensor on
the device, and each program loads its own from there (pointers.py). Each step writes the table anew, by one
asynchronous copy.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..upload import pack, upload

_LOWEST = 0 if sys.byteorder == "little" else 7
MAX_MATRICES = 65535  # second dimension of a CUDA grid


@dataclass(frozen=True)
class Rows:
    """The rows of a whole step's table. Each row has the B addresses of one list of the bucket, (B,) int64 on
    the device. None: the list is absent."""

    weights: Tensor
    grads: Tensor
    bases: Tensor
    exp_avgs: Tensor
    exp_avg_sqs: Tensor
    exp_avg_scales: Tensor | None = None
    exp_avg_sq_scales: Tensor | None = None
    steps: Tensor | None = None


def rows_of(lists: Sequence[Sequence[Tensor]], steps: Sequence[Tensor]) -> tuple[Rows, bool]:
    """The table of a bucket's step, and whether every matrix starts at a multiple of 16 bytes.

    lists: weights, grads, bases, exp_avgs, exp_avg_sqs and, for 8-bit moments, their scales. steps: counters,
    each read as one float, so they need no alignment.
    """
    packed = pack([_addresses(tensors) for tensors in (*lists, steps)])
    *rows, steps_at = upload(packed, len(lists) + 1, lists[0][0].device)
    lowest_bytes = set(packed[_LOWEST : 8 * len(lists) * len(steps) : 8])
    return Rows(*rows, steps=steps_at), not any(byte % 16 for byte in lowest_bytes)


def pointer_table(*buckets: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One int64 row of B addresses a bucket, on the bucket's device, by a single asynchronous copy."""
    return upload(pack(list(map(_addresses, buckets))), len(buckets), buckets[0][0].device)


def _addresses(bucket: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, bucket))


def aligned(*buckets: list[Tensor]) -> bool:
    """True when every address is a multiple of 16 bytes. Triton cannot know that of an address that a kernel
    loads from memory."""
    return all(_multiples_of_16(_addresses(bucket)) for bucket in buckets)


def _multiples_of_16(addresses: list[int]) -> bool:
    return not any(address % 16 for address in addresses)


def wide(*matrices: Tensor) -> bool:
    """True when Triton can prove 16-byte accesses: one stride is 1, and the extents and the other stride are
    multiples of 16 elements."""
    return all(1 in tensor.stride() and all(size % 16 == 0 for size in (*tensor.shape, max(tensor.stride()))) for tensor in matrices)


def on_device(device: torch.device):
    """Makes the bucket's device the current one, because Triton launches on the current device."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def check_bucket(name: str, tensors: list[Tensor], dtypes: tuple[torch.dtype, ...], row_major: bool = False) -> None:
    """Checks that a bucket holds one matrix or more, all of one shape, strides, dtype and device."""
    if not tensors:
        raise ValueError(f"{name} is empty: a bucket holds at least one matrix")
    if len(tensors) > MAX_MATRICES:
        raise ValueError(f"{name} holds {len(tensors)} matrices and one launch takes at most {MAX_MATRICES}: split the bucket")
    first = tensors[0]
    shape, stride, dtype, device = first.shape, first.stride(), first.dtype, first.device
    if first.dim() != 2:
        raise ValueError(f"{name} must hold 2-D tensors, got shape {tuple(shape)}")
    if dtype not in dtypes:
        raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))}, got {dtype}")
    if row_major and not first.is_contiguous():
        raise ValueError(f"{name} must be row-major, got shape {tuple(shape)} with strides {stride}")
    # Comparing whole lists is fast in Python. Find the matrix that differs only if one does.
    shapes, dtypes = [tensor.shape for tensor in tensors], [tensor.dtype for tensor in tensors]
    strides, devices = list(map(Tensor.stride, tensors)), list(map(Tensor.get_device, tensors))
    alike = shapes.count(shape), dtypes.count(dtype), strides.count(stride), devices.count(first.get_device())
    if alike == (len(tensors),) * 4:
        return
    for index, tensor in enumerate(tensors):
        if tensor.shape != shape or tensor.stride() != stride or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} must share shape, strides, dtype and device to be one bucket: [0] has {tuple(shape)}, {stride}, {dtype}, "
                f"{device}; [{index}] has {tuple(tensor.shape)}, {tensor.stride()}, {tensor.dtype}, {tensor.device}"
            )


def check_batch(name: str, batch: Tensor, bucket: list[Tensor], dtypes: tuple[torch.dtype, ...], shape=None) -> None:
    """Checks a (B, r, n) tensor that goes with a bucket: row-major, on the bucket's device, each matrix of
    shape `shape` (default: the bucket's)."""
    expected = (len(bucket), *(bucket[0].shape if shape is None else shape))
    if tuple(batch.shape) != expected or not batch.is_contiguous():
        raise ValueError(f"{name} must be row-major of shape {expected}, got {tuple(batch.shape)} with strides {batch.stride()}")
    if batch.dtype not in dtypes or batch.device != bucket[0].device:
        raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))} on {bucket[0].device}, got {batch.dtype} on {batch.device}")


def check_same_length(**buckets: list[Tensor]) -> None:
    lengths = {name: len(bucket) for name, bucket in buckets.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"buckets must hold equally many matrices, got {lengths}")


def check_same_device(**buckets: list[Tensor]) -> None:
    devices = {name: str(bucket[0].device) for name, bucket in buckets.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"buckets must live on one device, got {devices}")


def check_basis_fits(name: str, matrix: Tensor, basis: Tensor, right: bool) -> None:
    """Checks that a basis (m, r) goes with a matrix (m, n), stored as (n, m) on the right side."""
    if basis.shape[0] != matrix.shape[1 if right else 0]:
        side, shape = ("right", "(n, m)") if right else ("left", "(m, n)")
        raise ValueError(f"a basis (m, r) must fit a {side} {name} {shape}, got {tuple(basis.shape)} and {tuple(matrix.shape)}")


def check_one_float(name: str, value: Tensor | None, device: torch.device) -> None:
    """Checks that the value is one fp32 on the device, or None."""
    if value is not None and (value.numel() != 1 or value.dtype != torch.float32 or value.device != device):
        raise ValueError(f"{name} must be one float32 on {device}, got shape {tuple(value.shape)}, {value.dtype} on {value.device}")


def check_counts(counts: Sequence[Tensor] | None, bucket: list[Tensor]) -> None:
    """Checks that there is one fp32 for each matrix of the bucket, on its device, or None."""
    if counts is not None:
        check_same_length(bucket=bucket, device_steps=counts)
        for count in counts:
            check_one_float("device_steps", count, bucket[0].device)


def check_rounding_seeds(seeds: Tensor | None, weights: list[Tensor]) -> None:
    """Checks that there is one int64 for each matrix of a bucket of bf16 weights, or None."""
    if seeds is None:
        return
    if seeds.shape != (len(weights),) or seeds.dtype != torch.int64 or seeds.device != weights[0].device:
        raise ValueError(
            f"rounding_seeds must be ({len(weights)},) int64 on {weights[0].device}, got {tuple(seeds.shape)}, {seeds.dtype} on "
            f"{seeds.device}"
        )
    if weights[0].dtype != torch.bfloat16:
        raise ValueError(f"rounding_seeds are for bfloat16 weights, got {weights[0].dtype}; leave them out to round to nearest")
