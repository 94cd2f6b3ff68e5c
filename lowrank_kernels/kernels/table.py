"""Pointer tables: what lets one launch serve a whole bucket.

A bucket is a list of B matrices of equal shape, dtype and strides. Its addresses live in an int64 tensor on the device; a program
loads its own (`tl.load(bases_at + matrix).to(tl.pointer_type(dtype))`). The table of a whole step is copied once.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_MATRICES = 65535  # second dimension of a CUDA grid


@dataclass(frozen=True)
class Rows:
    """The rows of a whole step's table: for each list of the bucket B addresses, (B,) int64 on the device. None: the list is absent."""

    weights: Tensor
    grads: Tensor
    bases: Tensor
    exp_avgs: Tensor
    exp_avg_sqs: Tensor
    exp_avg_scales: Tensor | None = None
    exp_avg_sq_scales: Tensor | None = None
    steps: Tensor | None = None


def pointer_table(*buckets: list[Tensor]) -> tuple[Tensor, ...]:
    """One int64 row of B addresses a bucket, on the bucket's device, by a single asynchronous copy.

    The pinned source is not reused while the copy is in flight: PyTorch's caching host allocator frees a block only after the
    streams that read it have passed.
    """
    device = buckets[0][0].device
    addresses = [[tensor.data_ptr() for tensor in bucket] for bucket in buckets]
    if device.type != "cuda":
        return torch.tensor(addresses, dtype=torch.int64).unbind()
    return torch.tensor(addresses, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True).unbind()


def aligned(*buckets: list[Tensor]) -> bool:
    """True when every address is a multiple of 16 bytes. An address that a kernel loads from memory carries no such fact."""
    return all(tensor.data_ptr() % 16 == 0 for bucket in buckets for tensor in bucket)


def wide(*matrices: Tensor) -> bool:
    """True when Triton can prove 16-byte accesses: a unit stride, and extents and the other stride multiples of 16 elements."""
    return all(1 in tensor.stride() and all(size % 16 == 0 for size in (*tensor.shape, max(tensor.stride()))) for tensor in matrices)


def on_device(device: torch.device):
    """Triton launches on the current device; make that the bucket's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def check_bucket(name: str, tensors: list[Tensor], dtypes: tuple[torch.dtype, ...], row_major: bool = False) -> None:
    """A bucket holds one matrix or more, all of one shape, strides, dtype and device."""
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
    for index, tensor in enumerate(tensors):
        if tensor.shape != shape or tensor.stride() != stride or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} must share shape, strides, dtype and device to be one bucket: [0] has {tuple(shape)}, {stride}, {dtype}, "
                f"{device}; [{index}] has {tuple(tensor.shape)}, {tensor.stride()}, {tensor.dtype}, {tensor.device}"
            )


def check_batch(name: str, batch: Tensor, bucket: list[Tensor], dtypes: tuple[torch.dtype, ...], shape=None) -> None:
    """A (B, r, n) tensor that goes with a bucket: row-major, on its device, `shape` (default: the bucket's) a matrix."""
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


def check_found_inf(found_inf: Tensor | None, device: torch.device) -> None:
    if found_inf is not None and (found_inf.numel() != 1 or found_inf.dtype != torch.float32 or found_inf.device != device):
        raise ValueError(
            f"found_inf must be one float32 on {device}, got shape {tuple(found_inf.shape)}, {found_inf.dtype} on {found_inf.device}"
        )
