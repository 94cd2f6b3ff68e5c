"""Candidates compiled in worker processes into Triton's cache, where a launch on the GPU then finds them.

A worker needs no GPU: it makes the launch as benchmarks/dry.py does, for the architecture of the real one. A
compiler that hangs, or takes its process down, costs one candidate.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lowrank_kernels.backends.triton.configs import BackProjectConfig, Config, ProjectMomentsConfig, SinglePassConfig, SplitConfig
from lowrank_kernels.backends.triton.tuned import Key

from .candidates import Choice, Shape

SECONDS = 180.0
"""A candidate may take that long to compile."""


@dataclass(frozen=True)
class Task:
    """A launch to compile. The second launch of a split knows nothing of moments."""

    kind: str
    moments: str
    side: str
    config: Config


def tasks_of(key: Key, choice: Choice) -> list[Task]:
    if isinstance(choice, SplitConfig):
        return [Task(key.kind, key.moments, key.side, choice.project_moments), Task(key.kind, "fp32", key.side, choice.back_project)]
    return [Task(key.kind, key.moments, key.side, choice)]


@dataclass(frozen=True)
class Compiled:
    """Registers of a thread, bytes of its local memory (spills), bytes of shared memory."""

    registers: int
    local_bytes: int
    shared_bytes: int

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.local_bytes} bytes spilled, {self.shared_bytes >> 10} K shared"


class NotCompiled(Exception):
    """Why a candidate is left out."""


def compile_task(task: Task, arch: int) -> Compiled:
    """In a worker. Raises where the compiler refuses, or where an architecture that is known would."""
    import torch

    from lowrank_kernels.backends.triton import back_project, project_moments, single_pass, table

    from .. import dry
    from .bench import bucket_of

    torch.set_float32_matmul_precision("high" if task.kind == "tf32" else "highest")
    rank = getattr(task.config, "BLOCK_R", 64)
    bucket, hyper = bucket_of(Key(task.kind, task.moments, task.side, rank, "many"), Shape(1, rank, 128), "cpu")
    kernels = []

    def on_launch(kernel: Any, grid: tuple[int, ...], keywords: dict) -> None:
        kernels.append(kernel)
        if arch in dry.SHARED_LIMIT:
            dry.check(kernel, grid, arch)

    with dry.launches(arch, on_launch):
        rows = table.rows_of(bucket)
        assert rows.aligned, "the launch on the GPU is of aligned matrices, and another variant"
        normalised = torch.empty((1, rank, 128), dtype=bucket.bases[0].dtype)
        if isinstance(task.config, SinglePassConfig):
            single_pass.step(bucket, hyper, rows, task.config)
        elif isinstance(task.config, ProjectMomentsConfig):
            project_moments.launch(bucket, hyper, rows, normalised, config=task.config)
        elif isinstance(task.config, BackProjectConfig):
            back_project.launch(bucket, hyper, rows, normalised, task.config)
    [kernel] = kernels
    usage = dry.resources(kernel.asm["cubin"])
    return Compiled(usage["REG"], usage.get("LOCAL", 0) + usage.get("STACK", 0), kernel.metadata.shared)


def compile_rereads(arch: int) -> Compiled:
    """In a worker: the kernel of the ceiling of the L2 cache."""
    import torch

    from .. import dry, rereads

    kernels: list[Any] = []
    with dry.launches(arch, lambda kernel, grid, keywords: kernels.append(kernel)):
        rereads.launch(torch.empty(2 * rereads.BLOCK, dtype=torch.int32), 1, torch.empty(1, dtype=torch.int32))
    usage = dry.resources(kernels[0].asm["cubin"])
    return Compiled(usage["REG"], usage.get("LOCAL", 0) + usage.get("STACK", 0), kernels[0].metadata.shared)


class Pool:
    """Calls in worker processes, each of which serves one thread of this process. A worker that hangs or ends
    fails its call alone."""

    def __init__(self, workers: int, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._threads = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._ended = False

    def submit(self, call: Callable[..., object], *arguments: object) -> Future:
        """Of what the call returns. NotCompiled, with the reason as text, stands for whatever it raises."""
        return self._threads.submit(self._run, call, arguments)

    def end(self) -> None:
        self._ended = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()

    def _run(self, call: Callable[..., object], arguments: tuple[object, ...]) -> object:
        if getattr(self._own, "worker", None) is None:
            self._own.worker = self._start()
        process, pipe = self._own.worker
        try:
            pipe.send((call, arguments))
            if not pipe.poll(self.seconds):
                raise NotCompiled(f"not compiled in {self.seconds:.0f} s")
            failed, found = pipe.recv()
        except (EOFError, OSError):
            self._discard()
            raise NotCompiled(f"the compiler's process ended with {process.exitcode}") from None
        except NotCompiled:
            self._discard()
            raise
        if failed:
            raise NotCompiled(found)
        return found

    def _start(self) -> tuple[multiprocessing.process.BaseProcess, Any]:
        if self._ended:
            raise NotCompiled("the pool has ended")
        spawn = multiprocessing.get_context("spawn")
        pipe, other = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(other,), daemon=True)
        process.start()
        other.close()
        self._processes.append(process)
        return process, pipe

    def _discard(self) -> None:
        process, pipe = self._own.worker
        process.kill()
        process.join()
        pipe.close()
        self._own.worker = None


def _serve(pipe: Any) -> None:
    """What a worker does: calls come in, results go out, until nobody is there."""
    import torch

    torch.set_num_threads(1)
    try:
        while True:
            call, arguments = pipe.recv()
            try:
                answer = (False, call(*arguments))
            except Exception as error:
                lines = str(error).strip().splitlines() or ["no message"]
                answer = (True, f"{type(error).__name__}: {lines[-1] if 'error' in lines[-1] else lines[0]}")
            pipe.send(answer)
    except (EOFError, OSError, KeyboardInterrupt):
        pass
