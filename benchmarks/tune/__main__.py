"""python -m benchmarks.tune: measures which tiles serve a step best on the GPU at hand, and writes its table.

Candidates are compiled side by side. Those that run and give the right result are timed on cold data, and the
three fastest take turns with what serves now, which is replaced only by what is more than 2 % faster. The
table is rewritten after each key, so a run that ends early loses nothing, and the next one starts with the
keys that this commit has not measured yet. lowrank_kernels finds the table by itself; `python -m
lowrank_kernels` says which one serves.

--dry needs no GPU: it compiles the candidates for --arch and says what would be timed. It times nothing and
writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from pathlib import Path

import torch
import triton

from lowrank_kernels.backends.triton import choose, tuned
from lowrank_kernels.backends.triton.tuned import Key

from .. import ceilings, dry, provenance
from . import candidates
from .candidates import Choice, label
from .compiling import NotCompiled, Pool, Task, compile_rereads, compile_task, tasks_of
from .contest import Lost, NoTime, Outcome, tune

DRY_MULTIPROCESSORS = 132
"""Of the H100 that a dry run stands for."""
LEAST_LEFT_S = 30
"""With less, a run is not begun anew after a candidate that took the GPU down."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole run (default 8)")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(candidates.RANKS), help="most important first (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one side, fp32 moments, and two rows of each launch")
    parser.add_argument("--out", type=Path, help="folder of the table (default: where lowrank_kernels looks for it)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that compile (default %(default)s)")
    parser.add_argument("--commit", help="what to record as the commit of a copy that has no git history")
    parser.add_argument("--without", action="append", default=[], metavar="CANDIDATE", help="leave one out, by the name in the log")
    parser.add_argument("--dry", action="store_true", help="without a GPU: compile and walk, time and write nothing")
    parser.add_argument("--arch", type=int, default=90, choices=dry.SHARED_LIMIT, help="what --dry compiles for (default 90, for sm_90)")
    settings = parser.parse_args(arguments)
    if dry.interpreted():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if not settings.dry and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --dry walks through all but the timing")
    if any(rank < 1 or rank % 16 for rank in settings.ranks):
        parser.error(f"ranks are multiples of 16, got {settings.ranks}")
    return settings


class Compilers:
    """All candidates of all keys, compiled in the order of the keys while earlier ones are timed."""

    def __init__(self, keys: Iterable[Key], arch: int, settings: argparse.Namespace, left: Callable[[], float]) -> None:
        self.pool, self.left = Pool(settings.workers), left
        self.rereads = self.pool.submit(compile_rereads, arch)
        self.choices = {
            key: [
                choice
                for choice in (*candidates.single_passes(key, settings.quick), *candidates.splits(key, settings.quick))
                if label(choice) not in settings.without
            ]
            for key in keys
        }
        tasks = dict.fromkeys(task for key, choices in self.choices.items() for choice in choices for task in tasks_of(key, choice))
        self.compiled: dict[Task, Future] = {task: self.pool.submit(compile_task, task, arch) for task in tasks}
        self.said: set[Task] = set()

    def compiling(self, key: Key) -> list[Choice]:
        """The key's candidates that compile. Waits for them."""
        return [choice for choice in self.choices[key] if all([self._compiles(task) for task in tasks_of(key, choice)])]

    def _compiles(self, task: Task) -> bool:
        name = f"{label(task.config)}, {task.kind}, {task.moments}, {task.side}"
        try:
            line, compiles = f"  compiled: {name}: {self.compiled[task].result(max(0.0, self.left()))}", True
        except NotCompiled as why:
            line, compiles = f"  left out: {name}: {why}", False
        except Late as error:
            raise NoTime from error
        if task not in self.said:
            print(line, flush=True)
        self.said.add(task)
        return compiles


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = parse(arguments)
    ends = time.monotonic() + 60 * settings.minutes

    def left() -> float:
        return ends - time.monotonic()

    try:
        return (walk if settings.dry else measure)(settings, left)
    except KeyboardInterrupt:
        print("interrupted: the table has the keys that were measured before", flush=True)
        return 130
    except Lost as lost:
        print(f"the GPU is lost by {lost}", flush=True)
        if left() < LEAST_LEFT_S:
            return 1
        again = [*arguments, "--minutes", f"{left() / 60:.2f}", "--without", str(lost)]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.tune", *again])


def walk(settings: argparse.Namespace, left: Callable[[], float]) -> int:
    """Everything but the GPU."""
    keys = candidates.keys(settings.ranks, settings.quick)
    compilers = Compilers(keys, settings.arch, settings, left)
    walked = 0
    try:
        print(f"P re-reads from L2: compiled: {compilers.rereads.result()}", flush=True)
        for key in keys:
            choices = compilers.compiling(key)
            shapes = candidates.shapes(key, DRY_MULTIPROCESSORS)
            serving = candidates.serving(key, shapes[0], settings.arch, (), DRY_MULTIPROCESSORS)
            print(f"{' '.join(map(str, key))}: would check and time {len(choices)} candidates on {shapes[0]}", flush=True)
            print(f"  and the best three in turn with {label(serving)} on {', '.join(map(str, shapes))}")
            walked += 1
    except NoTime:
        print("no time to compile the rest")
    finally:
        compilers.pool.end()
    print(f"{walked} of {len(keys)} keys walked for sm_{settings.arch}; nothing was timed and no table was written")
    return 0


def measure(settings: argparse.Namespace, left: Callable[[], float]) -> int:
    device = torch.device("cuda", torch.cuda.current_device())
    name, arch, multiprocessors = choose.device_name(device), choose.architecture(device), choose.multiprocessors(device)
    if not isinstance(arch, int):
        raise SystemExit(f"candidates are compiled for NVIDIA's architectures, and this is {arch}")
    path = settings.out / tuned.file_name(name) if settings.out else tuned.target(name)
    rows = _rows_so_far(path, name)
    origin = provenance.provenance(on_gpu=True)
    commit = settings.commit or str(origin["commit"])
    versions = {"lowrank_kernels": origin["lowrank_kernels"], "torch": str(torch.__version__), "triton": triton.__version__}
    done = {row.key for row in rows if (row.commit, row.versions) == (commit, versions)}
    keys = sorted(candidates.keys(settings.ranks, settings.quick), key=done.__contains__)
    compilers = Compilers(keys, arch, settings, left)
    try:
        measured = ceilings.measure(on_gpu=True) | {"l2_rereads_gb_per_s": ceilings.rereads_gb_per_s()}
        print(json.dumps(origin | measured | {"multiprocessors": multiprocessors, "table": str(path)}, indent=1), flush=True)
        outcome = _tune(settings, left, keys, path, rows, {"commit": commit, "versions": versions}, compilers, arch, multiprocessors)
    finally:
        compilers.pool.end()
    if path.exists():
        print(path.read_text(encoding="utf-8"), end="")
    print(f"{outcome.measured} of {len(keys)} keys measured, {outcome.replaced} rows new, {outcome.failed} keys failed: {path}")
    return 1 if outcome.failed or not outcome.measured else 0


def _tune(
    settings: argparse.Namespace, left: Callable[[], float], keys: list[Key], path: Path, rows: tuple[tuned.Row, ...], origin: dict,
    compilers: Compilers, arch: int, multiprocessors: int,
) -> Outcome:  # fmt: skip
    from .bench import Bench  # imports the kernels

    return tune(
        keys, path, rows, origin, left, choices=compilers.compiling,
        bench=lambda key, shape: Bench(key, shape, without=settings.without),
        shapes=lambda key: candidates.shapes(key, multiprocessors),
        serving=lambda key, table: candidates.serving(key, candidates.shapes(key, multiprocessors)[0], arch, table, multiprocessors),
        say=lambda line: print(line, flush=True),
    )  # fmt: skip


def _rows_so_far(path: Path, name: str) -> tuple[tuned.Row, ...]:
    """Of the file that is to be rewritten, or else of the one that serves. A broken file is not written
    over."""
    found = path if path.exists() else tuned.find(name)
    try:
        return tuned.read(found) if found else ()
    except ValueError as error:
        raise SystemExit(f"{error}. Mend the file or remove it.") from None


if __name__ == "__main__":
    sys.exit(main())
