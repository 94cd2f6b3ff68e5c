"""All cases in worker processes, their reports as JSON, and the whole in a process of its own."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import ROOT, report
from .cases import Case
from .report import Loop, Report


def compile_all(chosen: list[Case], workers: int = 2) -> list[Report]:
    """Compiles the cases afresh. The cache of compiled kernels is a folder that is removed after the call."""
    with tempfile.TemporaryDirectory() as cache:
        if workers == 1:
            _worker(cache)
            return [report.of(case) for case in chosen]
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn, initializer=_worker, initargs=(cache,)) as pool:
            return list(pool.map(report.of, chosen, chunksize=4))


def _worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def compile_in_subprocess(*options: str) -> list[Report]:
    """The reports of `python -m benchmarks.aot`, run in a process of its own, because this one may have
    imported the kernels for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reports.json")
        command = [sys.executable, "-m", "benchmarks.aot", "--json", str(path), *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-8000:]}")
        return read(path)


def read(path: Path) -> list[Report]:
    """The reports that --json wrote."""
    return [Report(**{**fields, "loops": [Loop(**loop) for loop in fields["loops"]]}) for fields in json.loads(path.read_text())]


def write(reports: list[Report], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(each) for each in reports]))
