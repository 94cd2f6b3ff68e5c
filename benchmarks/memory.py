"""Counting bytes: the peak of a call, and what an optimizer's state holds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def peak_bytes(run: Callable[[], Result], on_gpu: bool) -> tuple[Result, int]:
    """What `run` returns, and the most bytes that were allocated while it ran beyond what was live, its results included.

    On a CPU by torch's profiler, which sees every allocation and release of torch's allocator on this thread, inside C++ operators too.
    It does not see what a BLAS, LAPACK or oneDNN packs in buffers of its own, nor tensors made inside worker threads.
    """
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or it prints when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return result, max(allocated, default=0)


def tensor_bytes(holder: Any) -> int:
    """Bytes of all storages that tensors in `holder` keep alive, each counted once: in containers (a dict's values) and attributes."""
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
