"""Timing with CUDA events on a GPU and a monotonic clock on a CPU. Contenders run in interleaved rounds, so
that drift affects all alike.

On a GPU every timed run starts with a cold L2: a buffer of twice its size is overwritten just before, outside
the events. There are two ways to time:

    by default the host waits for that, and the time is what a caller waits for from an idle GPU, launches
    included;
    with `device_only` the GPU is kept busy until the host has launched everything, and the time is the
    GPU's own.

The busy time is called the shield. Each contender finds its length in its warm-up, such that the timed work
has not begun when the host has launched everything. A stream takes about a thousand launches before the host
waits for it, so no shield hides more than those. A contender with more launches is captured in a CUDA graph.
If that fails, it is timed as it is. Timing.launches says which.

On a CPU nothing is flushed. The rounds are interleaved, so the next contender evicts what one leaves in the
caches.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP_SHARE, WARM_UP_S = 0.2, 1.0
"""The warm-up takes a fifth of the budget, shared among contenders, and at most a second each. Each contender
makes at least the first two runs."""
SHIELD_CYCLES = 2_000_000
"""The shortest shield: about a millisecond of a GPU doing nothing, during which the host launches the timed
work."""
LONGEST_SHIELD = 128 * SHIELD_CYCLES
HIDDEN, GRAPH, VISIBLE = "hidden", "graph", "visible"


@dataclass(frozen=True)
class Timing:
    """Milliseconds. `ratio` is the median over rounds of this contender's time over the first one's.

    `launches`, if the GPU's own time is measured, says how the host's time is kept out: "hidden" behind a
    shield, or in a "graph". If it is "visible", the host's time is included.
    """

    p20: float
    p50: float
    p80: float
    rounds: int
    ratio: float
    launches: str | None = None


@functools.cache
def _flushed() -> Tensor:
    """A buffer of twice the size of the current GPU's L2 cache."""
    return torch.empty(2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, dtype=torch.int8, device="cuda")


def time_once_ms(run: Callable[[], object], on_gpu: bool) -> float:
    """The time that a caller waits for one run."""
    if not on_gpu:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    _flushed().zero_()
    torch.cuda.synchronize()
    return _between_events(run)[0]


def _between_events(run: Callable[[], object]) -> tuple[float, bool]:
    """The GPU's ms from its current work to the end of `run`, and whether it was still busy with that work
    when the host had launched everything."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    hidden = not start.query()
    end.synchronize()
    return start.elapsed_time(end), hidden


class _Waiting:
    """Times what a caller waits for."""

    launches = None

    def __init__(self, run: Callable[[], object], on_gpu: bool) -> None:
        self.run, self.on_gpu = run, on_gpu

    def once_ms(self) -> float:
        return time_once_ms(self.run, self.on_gpu)


class _Shielded:
    """Times a GPU alone."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run, self.cycles, self.in_graph = run, SHIELD_CYCLES, False
        self.samples = self.seen = 0

    @property
    def launches(self) -> str:
        """How most of the samples since the shield was found were taken."""
        return VISIBLE if 2 * self.seen > self.samples else GRAPH if self.in_graph else HIDDEN

    def once_ms(self) -> float:
        ms, hidden = self._once()
        self.samples, self.seen = self.samples + 1, self.seen + (not hidden)
        return ms

    def find_shield(self) -> None:
        """Finds the length of the shield. Call it after the first run, which may compile. The length is twice
        what hides all launches once, because the host is not always as fast."""
        while not self._once()[1]:
            if self.cycles >= LONGEST_SHIELD:
                self._capture()
                break
            self.cycles *= 2
        self.cycles *= 2
        self.samples = self.seen = 0

    def _once(self) -> tuple[float, bool]:
        _flushed().zero_()
        torch.cuda._sleep(self.cycles)
        return _between_events(self.run)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.run()
        except Exception as why:
            print(f"not captured in a graph, so that the host's launches are in the times: {type(why).__name__}: {why}")
            return
        self.run, self.in_graph, self.cycles = graph.replay, True, SHIELD_CYCLES


def _warm_up(clock: _Waiting | _Shielded, seconds: float, slow_ms: float) -> float:
    """Milliseconds of the last run. It is never the first run, which may compile and allocate."""
    deadline = time.perf_counter() + seconds
    clock.once_ms()
    if isinstance(clock, _Shielded):
        clock.find_shield()
    while True:
        last = clock.once_ms()
        if last > slow_ms or time.perf_counter() >= deadline:
            return last


def interleave(
    runs: Mapping[str, Callable[[], object]], on_gpu: bool, seconds: float, least_rounds: int = 5, device_only: bool = False
) -> dict[str, Timing]:
    """Times every contender once a round until `seconds` have passed after a warm-up. Goes on to
    `least_rounds` rounds if they fit into twice that time.

    A contender whose second run still takes over a third of the budget is not timed again.
    """
    clocks = {name: _Shielded(run) if device_only and on_gpu else _Waiting(run, on_gpu) for name, run in runs.items()}
    slow_ms = seconds * 1e3 / 3
    warm_up = min(WARM_UP_S, WARM_UP_SHARE * seconds / max(1, len(runs)))
    samples: dict[str, list[float]] = {}
    for name, clock in clocks.items():
        last = _warm_up(clock, warm_up, slow_ms)
        samples[name] = [last] if last > slow_ms else []
    fast = [name for name in runs if not samples[name]]
    start, rounds = time.perf_counter(), 0
    while fast:
        for name in fast:
            samples[name].append(clocks[name].once_ms())
        rounds += 1
        if time.perf_counter() - start >= (seconds if rounds >= least_rounds else 2 * seconds):
            break
    first = samples[next(iter(runs))]
    timings = {}
    for name, times in samples.items():
        ratios = torch.tensor([mine / base for mine, base in zip(times, first, strict=False)], dtype=torch.float64)
        quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        timings[name] = Timing(*quantiles, rounds=len(times), ratio=ratios.median().item(), launches=clocks[name].launches)
    return timings
