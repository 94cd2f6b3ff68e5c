"""Cases in worker processes. One that hangs, or takes its process down, is a fault of its own and does not
end the run."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing import connection

from .cases import Case
from .stages import Outcome

SECONDS = 600  # a case may take


class _Worker:
    def __init__(self, stages: tuple[str, ...]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, other = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(other, stages), daemon=True)
        self.process.start()
        other.close()
        self.case: Case | None = None
        self.deadline = 0.0

    def give(self, case: Case) -> None:
        self.case, self.deadline = case, time.monotonic() + SECONDS
        self.pipe.send(case)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def work(pipe, stages: tuple[str, ...]) -> None:
    """What a worker does: cases come in, outcomes go out, until nobody is there."""
    import torch

    from . import compiler, launches, semantics
    from .stages import run

    torch.set_num_threads(1)
    gc.disable()  # it looks at the millions of tokens of a module again and again
    semantics.set_up()
    compiler.set_up()
    launches.replace_table()
    try:
        while True:
            case, start = pipe.recv(), time.perf_counter()
            try:
                outcome = run(case, stages)
            except Exception as error:  # the lane's own or ttsem's, and no proof of anything
                outcome = Outcome(case.name, faults=[f"{type(error).__name__}: {error}"], seconds=time.perf_counter() - start)
            pipe.send(outcome)
            gc.collect()
    except EOFError:
        pass
    finally:
        compiler.clean_up()


def outcomes(cases: list[Case], stages: tuple[str, ...], workers: int) -> Iterator[Outcome]:
    """In the order in which they end."""
    waiting = deque(cases)
    running = [_Worker(stages) for _ in range(min(workers, len(cases)))]
    try:
        for worker in running:
            worker.give(waiting.popleft())
        while running:
            timeout = max(0.0, min(worker.deadline for worker in running) - time.monotonic())
            ready = connection.wait([worker.pipe for worker in running], timeout)
            for worker in [worker for worker in running if worker.pipe in ready or time.monotonic() > worker.deadline]:
                yield _outcome(worker, worker.pipe in ready)
                running.remove(worker)
                if not worker.process.is_alive() or worker.pipe not in ready:
                    worker.end()
                    worker = _Worker(stages) if waiting else None
                if waiting:
                    worker.give(waiting.popleft())
                    running.append(worker)
                elif worker:
                    worker.pipe.close()  # it leaves by itself
                    worker.process.join()
    finally:
        for worker in running:
            worker.end()


def _outcome(worker: _Worker, ready: bool) -> Outcome:
    if not ready:
        return Outcome(worker.case.name, faults=[f"not done in {SECONDS} s"], seconds=SECONDS)
    try:
        return worker.pipe.recv()
    except EOFError:
        worker.process.join()
        return Outcome(worker.case.name, faults=[f"the process ended with {worker.process.exitcode}"])
