"""Builds the extension's CUDA part against a CUDA build of PyTorch, loads it, and checks it without a GPU.

    python -m benchmarks.cuda_build --out FILE

`make cuda-build` runs it with a Python that has such a torch. Every step is a process of its own, and its
output goes to build/cuda/. A step that fails does not stop the others, but the whole fails. The library stays
in build/cuda/, so that the one in the package is not touched.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cuda"
LIBRARY = FOLDER / "lowrank_kernels" / "_C.so"
REPORTS = FOLDER / "aot.json"
ARCHITECTURES = (80, 90, 100)
EXTENSION_TESTS = "test_extension.py test_philox.py test_range_finder.py test_ops.py subspaces csrc".split()
PROOF = r"""
import re, torch, lowrank_kernels
from lowrank_kernels import extension
KEYS = ("CPU", "CUDA")
for key in KEYS:
    assert not extension.missing(key), f"no {key} kernel of {extension.missing(key)}: {extension.status()}"
for name in extension.OPERATORS:
    dump = torch._C._dispatch_dump(f"lowrank_kernels::{name}")
    places = [re.search(rf"^{key}: registered at .*?(csrc/\S+)", dump, re.MULTILINE).group(1) for key in KEYS]
    print(f"{name:18}", *(f"{key} {place}" for key, place in zip(KEYS, places)))
"""


class Step(NamedTuple):
    """`kept` is a pattern for the lines of its output that the summary repeats. None: all lines."""

    name: str
    command: list[str]
    environment: dict[str, str]
    kept: str | None = r"\b\d+ passed|launches compiled|^torch "


def steps(workers: int) -> list[Step]:
    python, built = sys.executable, {"LOWRANK_KERNELS_LIBRARY": str(LIBRARY)}
    pytest, parallel = [python, "-m", "pytest", "--all", "-q"], ["-n", str(workers), "--dist", "worksteal"]
    table = f"benchmarks/results/aot/triton-{version('triton')}.txt"
    build = [python, "setup.py", "--quiet", "build_ext", "--build-lib", str(FOLDER)]
    compile_rows = [python, "-m", "benchmarks.aot", "--workers", str(workers), "--json", str(REPORTS), "--out", table]
    dry = [*pytest, *parallel, "-p", "tests.dry_lane"]
    return [
        Step("build", build, {"LOWRANK_KERNELS_BUILD": "cuda"}, kept="^$"),
        Step("report", [python, "-m", "lowrank_kernels"], built, kept=None),
        Step("tests of the extension", [*pytest, *parallel, *(f"tests/{name}" for name in EXTENSION_TESTS)], built),
        Step("every row of kernels, compiled", compile_rows, built),
        Step("their budgets", [*pytest, "tests/kernels/test_aot.py"], built | {"AOT_REPORTS": str(REPORTS)}),
        *(Step(f"dry lane, sm_{arch}", [*dry, f"--dry-arch={arch}"], built) for arch in ARCHITECTURES),
        Step("what the dispatcher has", [python, "-c", PROOF], built, kept=None),
    ]


def run(step: Step) -> tuple[bool, list[str]]:
    """Whether the step succeeded, and lines about it: the outcome, the seconds, and the kept lines of its
    output. After a failure they are the end of the output."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "LOWRANK_KERNELS_BUILD")}
    start = time.monotonic()
    command = {"cwd": ROOT, "env": inherited | {"OMP_NUM_THREADS": "1"} | step.environment}
    done = subprocess.run(step.command, **command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.monotonic() - start
    (FOLDER / f"{re.sub('[^a-z0-9_]+', '-', step.name)}.log").write_text(done.stdout)
    output = done.stdout.replace(f"{ROOT}/", "").strip().splitlines()
    if done.returncode:
        return False, [f"{step.name}: FAILED with {done.returncode} after {seconds:.0f} s", *(f"  {line}" for line in output[-25:])]
    kept = [line for line in output if step.kept is None or re.search(step.kept, line)]
    return True, [f"{step.name}: {seconds:.0f} s", *(f"  {line}" for line in kept)]


def versions() -> str:
    release = re.search(r"V([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    nvcc = release.group(1) if release else "unknown"
    return f"Python {platform.python_version()}, torch {torch.__version__}, Triton {version('triton')}, nvcc {nvcc}, {os.cpu_count()} cores"


def report(lines: list[str], path: Path | None) -> None:
    text = "\n".join(lines) + "\n"
    print(text, end="", flush=True)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_build", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="append what is printed to this file as well")
    parser.add_argument("--steps", nargs="+", metavar="TEXT", help="those with one of these in their name (default all)")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in steps(arguments.workers) if not arguments.steps or any(text in step.name for text in arguments.steps)]
    if not chosen:
        parser.error(f"no step is called like {', '.join(arguments.steps)}")
    all_succeeded = True
    report([versions()], arguments.out)
    for step in chosen:
        succeeded, found = run(step)
        all_succeeded &= succeeded
        report(found, arguments.out)
    return 0 if all_succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
