"""What a step costs the host: the Python and the launches over 224 matrices of three shapes, as LLaMA 7B has.

The matrices are so small that a GPU is done before the host is. On a machine without one everything runs as
on one, buckets, tables and Triton's own launch code, up to the call of the driver, which is left out: so it
is a lower bound, and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from ..cases import Context, Selection
from ..records import OURS, Row, timed_rows
from ..timing import Timing

RANK = 16
SHAPES = [(64, 64)] * 4 + [(128, 64)] * 2 + [(64, 128)]
LAYERS = 32
NEVER = 10**9
TARGET = 90
"""The architecture that is compiled for where there is no GPU."""


@dataclass(frozen=True)
class HostCase:
    driver: bool

    @property
    def label(self) -> str:
        return f"host {LAYERS * len(SHAPES)} matrices{'' if self.driver else ', without the driver'} r={RANK} bfloat16"


def cases(selection: Selection, on_gpu: bool) -> list[HostCase]:
    return [HostCase(driver=on_gpu)]


def run(case: HostCase, context: Context) -> list[Row]:
    if context.on_gpu:
        samples = measure("cuda", context.measuring_s())
    else:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["OMP_NUM_THREADS"] = "1"
        program = f"import json; from benchmarks.suites import host; print(json.dumps(host.without_driver({context.measuring_s()})))"
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
        samples = json.loads(done.stdout.splitlines()[-1])
    base = torch.tensor(next(iter(samples.values()))).median().item()
    timings = {}
    for name, times in samples.items():
        p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        timings[name] = Timing(p20, p50, p80, len(times), p50 / base)
    buckets = [(LAYERS * SHAPES.count(shape), *shape) for shape in dict.fromkeys(SHAPES)]
    return timed_rows(case.label, torch.bfloat16, timings, {}, context.machine, suite="host", rank=RANK, shapes=buckets)


def measure(device: str, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of optimizer.step() by contender: gradients where they were, or new tensors, as after
    zero_grad(set_to_none=True)."""
    import lowrank_kernels as lrk

    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=device).bfloat16()) for _ in range(LAYERS) for shape in SHAPES]
    group = {"params": params, "rank": RANK, "update_proj_gap": NEVER, "selection": "random"}
    steps: dict[str, Callable[[], object]] = {OURS: lrk.LowRankAdamW([group]).step}
    if device == "cuda":
        steps["AdamW(fused=True), full rank"] = torch.optim.AdamW(params, fused=True).step
    samples: dict[str, list[float]] = {}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or not samples or len(next(iter(samples.values()))) < 25:
        for anew in (False, True):
            for name, step in steps.items():
                if anew or not samples:
                    for param in params:
                        param.grad = torch.zeros_like(param)
                if not samples:
                    step()  # states, buckets, compilation
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                elapsed = (time.perf_counter() - start) * 1e3
                samples.setdefault(f"{name}, new gradients" if anew else name, []).append(elapsed)
    return samples


def without_driver(seconds: float) -> dict[str, list[float]]:
    """measure() on CPU tensors with the kernels of a GPU, each launch stopping where the driver would be
    called.

    The counts of updates, 224 additions on a CPU and three launches on a GPU, are left out too, but for a
    look at each of them. In a process of its own: the backend is not put back, and the kernels must not have
    been imported for Triton's interpreter.
    """
    from .. import dry

    dry.backend_of_a_gpu()
    with dry.launches(TARGET), mock.patch.object(torch, "_foreach_add_", lambda tensors, number: list(map(Tensor.data_ptr, tensors))):
        return measure("cpu", seconds)
