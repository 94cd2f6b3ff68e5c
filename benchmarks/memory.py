"""Counting bytes: the peak of a call, what an optimizer's state holds, what autograd saves, and how large a
batch fits."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def peak_bytes(run: Callable[[], Result], on_gpu: bool) -> tuple[Result, int]:
    """What `run` returns, and the most bytes that were allocated while it ran. Bytes that were live before do
    not count; the results of `run` do.

    On a CPU torch's profiler counts. It sees every allocation and release of torch's allocator on this
    thread, inside C++ operators too. It does not see what a BLAS, LAPACK or oneDNN packs in buffers of its
    own, nor tensors made inside worker threads.
    """
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # otherwise it prints when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return result, max(allocated, default=0)


def tensor_bytes(holder: Any) -> int:
    """Bytes of all storages that tensors in `holder` keep alive, each counted once. Containers (a dict's
    values) and attributes are searched."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    remaining = [holder]
    while remaining:
        found = remaining.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
        elif isinstance(found, dict):
            remaining += found.values()
        elif isinstance(found, (list, tuple, set)):
            remaining += found
        elif hasattr(found, "__dict__") and not callable(found):
            remaining += vars(found).values()
    return sum(storages.values())


def saved_bytes(forward: Callable[[], Tensor], lasting: Sequence[Tensor]) -> int:
    """Bytes of all storages that autograd saves for the backward pass of `forward`, each counted once.
    Storages of `lasting` do not count."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # keeps the graph alive, and so the addresses in it
    count = tensor_bytes([saved, *lasting]) - tensor_bytes([*lasting])
    del result
    return count


def largest(attempt: Callable[[int], Result], limit: int = 2**16) -> tuple[int, Result] | None:
    """The largest number, to an eighth, at which `attempt` does not run out of a GPU's memory, and what
    `attempt` returned for it. None if even 1 runs out.

    The search doubles from 1, then halves the interval.
    """
    found, too_large, number = None, limit + 1, 1
    while number <= limit:
        result = _unless_full(attempt, number)
        if result is None:
            too_large = number
        else:
            found = number, result
        low = found[0] if found else 0
        if too_large > limit:
            number = 2 * low
        elif too_large - low <= max(1, low // 8):
            break
        else:
            number = (low + too_large) // 2
    return found


def _unless_full(attempt: Callable[[int], Result], number: int) -> Result | None:
    try:
        return attempt(number)
    except torch.OutOfMemoryError:
        return None
    finally:
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
