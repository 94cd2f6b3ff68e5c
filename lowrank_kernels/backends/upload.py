"""Copies numbers from the host to the device, where kernels read them, without waiting for the device."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


def pack(rows: Sequence[list[int]]) -> bytes:
    """All numbers of the rows, one after another, as signed 64-bit integers in the machine's byte order."""
    flat: list[int] = []
    for row in rows:
        flat += row
    return struct.pack(f"{len(flat)}q", *flat)


def upload(packed: bytes, rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """Copies `rows` equally long rows, packed by `pack`, to the device in one asynchronous copy. Returns one
    int64 tensor for each row.

    The pinned memory is not reused while the copy is in flight, because PyTorch's caching host allocator
    frees a block only after the streams that read it have passed. A copy captured in a CUDA graph reads its
    source at every replay, so its source is kept for good.
    """
    flat = torch.frombuffer(bytearray(packed), dtype=torch.int64).view(rows, -1)
    if device.type != "cuda":
        return flat.to(device).unbind()
    if torch.cuda.is_current_stream_capturing():
        source = _reserve.take(flat)
    else:
        _reserve.top_up()
        source = torch.empty(flat.shape, dtype=torch.int64, device="cpu", pin_memory=True).copy_(flat)
    return source.to(device, non_blocking=True).unbind()


class _Reserve:
    """Pinned memory for captured copies. It is allocated beforehand, because memory cannot be pinned while a
    stream is being captured."""

    ELEMENTS = 2**17  # 1 MiB; the table of a model with 224 matrices takes 1120 to 1792 elements

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: Tensor | None = None
        self._taken: list[Tensor] = []  # kept for good: a graph reads them as long as it lives, and its end is not reported

    def top_up(self) -> None:
        """Allocates memory where less than half is left. Call it outside of captures only."""
        if self._free is None or self._free.numel() < self.ELEMENTS // 2:
            with self._lock:
                self._free = torch.empty((self.ELEMENTS,), dtype=torch.int64, device="cpu", pin_memory=True)

    def take(self, values: Tensor) -> Tensor:
        with self._lock:
            if self._free is None or self._free.numel() < values.numel():
                raise RuntimeError(
                    "no pinned memory is left to capture this step in a CUDA graph; take one step outside of the graph first, "
                    "which sets some aside"
                )
            part, self._free = self._free[: values.numel()], self._free[values.numel() :]
            self._taken.append(part)
        return part.view(values.shape).copy_(values)


_reserve = _Reserve()
