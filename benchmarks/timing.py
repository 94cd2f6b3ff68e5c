"""Timing: CUDA events on a GPU, a monotonic clock on a CPU; contenders in interleaved rounds, so that drift hits all alike.

On a GPU every timed run starts with a cold L2: a buffer of twice its size is overwritten just before, outside the events. Then either

    the host waits for that, and the time is what a caller waits for from an idle GPU, launches included, or
    with `device_only` the GPU is kept busy while the host launches, and the time is the GPU's own.

On a CPU nothing is flushed: what a contender leaves in the caches the next one evicts, as the rounds are interleaved.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP_SHARE, WARM_UP_S = 0.2, 1.0
"""Warm-up: a fifth of the budget shared among contenders, a second each at most; the first two runs at least."""
BUSY_CYCLES = 2_000_000
"""About a millisecond of a GPU doing nothing, in which the host launches what is timed."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds. `ratio` is the median over rounds of this contender's time over the first one's."""

    p20: float
    p50: float
    p80: float
    rounds: int
    ratio: float


@functools.cache
def _flushed() -> Tensor:
    """Twice the L2 cache of the current GPU."""
    return torch.empty(2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, dtype=torch.int8, device="cuda")


def time_once_ms(run: Callable[[], object], on_gpu: bool, device_only: bool = False) -> float:
    if not on_gpu:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flushed().zero_()
    if device_only:
        torch.cuda._sleep(BUSY_CYCLES)
    else:
        torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _warm_up(run: Callable[[], object], once_ms: Callable[[Callable[[], object]], float], seconds: float, slow_ms: float) -> float:
    """Milliseconds of the last run. The first one may compile and allocate, so it is the last only where it is slow."""
    deadline = time.perf_counter() + seconds
    last = once_ms(run)
    if last > slow_ms:
        return last
    while True:
        last = once_ms(run)
        if time.perf_counter() >= deadline:
            return last


def interleave(
    runs: Mapping[str, Callable[[], object]], on_gpu: bool, seconds: float, least_rounds: int = 5, device_only: bool = False
) -> dict[str, Timing]:
    """Times every contender once a round until `seconds` have passed, at least `least_rounds` times, after a warm-up.

    A contender that took over a third of the budget in the warm-up is timed in one round only.
    """

    def once_ms(run: Callable[[], object]) -> float:
        return time_once_ms(run, on_gpu, device_only)

    slow_ms = seconds * 1e3 / 3
    warm_up = min(WARM_UP_S, WARM_UP_SHARE * seconds / max(1, len(runs)))
    slow = {name for name, run in runs.items() if _warm_up(run, once_ms, warm_up, slow_ms) > slow_ms}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    first = next(iter(runs))
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_rounds or time.perf_counter() < deadline:
        for name, run in runs.items():
            if rounds == 0 or name not in slow:
                samples[name].append(once_ms(run))
        rounds += 1
        if slow.issuperset(runs):
            break
    timings = {}
    for name, times in samples.items():
        ratios = torch.tensor([mine / base for mine, base in zip(times, samples[first], strict=False)], dtype=torch.float64)
        quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        timings[name] = Timing(*quantiles, rounds=len(times), ratio=ratios.median().item())
    return timings
