"""Memory of one run in a process that makes several runs: its peak, and what the backward pass needs."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import llama
import torch
from torch import Tensor, nn


class PeakMemory:
    """Bytes at the highest point since this object was made.

    CUDA: `torch.cuda.max_memory_allocated`, from a reset counter. CPU: growth of the process since this
    object was made. Linux keeps the resident high-water mark (VmHWM) and resets it when "5" is written to
    /proc/self/clear_refs. On other systems the answer is None.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._start_bytes: int | None = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            return_freed_memory()
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._start_bytes = _status_bytes("VmRSS")
            except OSError:  # not Linux, or not allowed: the table says n/a
                self._start_bytes = None

    def bytes(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return None if self._start_bytes is None else max(0, _status_bytes("VmHWM") - self._start_bytes)


def saved_activation_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Bytes that the forward pass of the loss keeps for the backward pass. Each tensor's memory counts once,
    and parameters do not count."""
    found = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = llama.loss(model, tokens)  # keep the graph alive until everything is counted, so that no address is used twice
    del loss
    return sum(found.values())


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def return_freed_memory() -> None:
    """Returns memory that an earlier run freed but glibc kept. It would hide the growth of this run."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another libc: the figure is then a lower bound
        pass
