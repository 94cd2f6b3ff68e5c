"""Timing: CUDA events on a GPU, a monotonic clock on a CPU; contenders in interleaved rounds, so that drift hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds. `ratio` is the median over rounds of this contender's time over the first one's."""

    p20: float
    p50: float
    p80: float
    rounds: int
    ratio: float


def time_once_ms(run: Callable[[], object], on_gpu: bool) -> float:
    if not on_gpu:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleave(runs: Mapping[str, Callable[[], object]], on_gpu: bool, seconds: float, least_rounds: int = 5) -> dict[str, Timing]:
    """Times every contender once a round until `seconds` have passed, at least `least_rounds` times, after two rounds of warm-up.

    A contender that took over a third of the budget in the warm-up is timed in one round only.
    """
    warm = {name: (run(), time_once_ms(run, on_gpu))[1] for name, run in runs.items()}
    slow = {name for name, ms in warm.items() if ms > seconds * 1e3 / 3}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    first = next(iter(runs))
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_rounds or time.perf_counter() < deadline:
        for name, run in runs.items():
            if rounds == 0 or name not in slow:
                samples[name].append(time_once_ms(run, on_gpu))
        rounds += 1
    timings = {}
    for name, times in samples.items():
        ratios = torch.tensor([mine / base for mine, base in zip(times, samples[first], strict=False)])
        quantiles = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        timings[name] = Timing(*quantiles, rounds=len(times), ratio=ratios.median().item())
    return timings


def ceilings(on_gpu: bool) -> dict[str, float]:
    """The machine's own copy bandwidth (GB/s, bytes read plus written) and matmul rate (TFLOP/s), measured now."""
    device, size = ("cuda", 2**28) if on_gpu else ("cpu", 2**26)
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    width, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    copy = interleave({"copy": lambda: target.copy_(source)}, on_gpu, 1.0)["copy"]
    matmul = interleave({"matmul": lambda: a @ b}, on_gpu, 1.0)["matmul"]
    return {
        "copy_gb_per_s": 2 * source.nbytes / copy.p50 / 1e6,
        f"matmul_tflop_per_s_{str(dtype).removeprefix('torch.')}": 2 * width**3 / matmul.p50 / 1e9,
    }
