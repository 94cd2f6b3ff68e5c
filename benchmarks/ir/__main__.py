"""python -m benchmarks.ir: see benchmarks/ir/__init__.py."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

KERNELS = ("single_pass", "project_moments", "back_project", "project", "moments", "residual", "residual_norm", "limiter", "scaling")


def main() -> int:
    from . import cases as all_cases
    from .pool import outcomes
    from .stages import STAGES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.ir", description="Execute every kernel from the compiler's IR, on a CPU.")
    parser.add_argument("--sample", action="store_true", help="a part of the cases, under two minutes")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="these alone")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="cases with all of these in their line")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="sanitize always runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the log to this file as well")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    cases = all_cases.sample() if arguments.sample else all_cases.cases()
    cases = [case for case in cases if arguments.kernels is None or case.kernel in arguments.kernels]
    cases = [case for case in cases if all(text in case.name for text in arguments.only)]
    if not cases:
        parser.error("no case is left")
    stages, start, found = tuple({"sanitize": None, **dict.fromkeys(arguments.stages)}), time.perf_counter(), {}
    for outcome in outcomes(cases, stages, arguments.workers):
        found[outcome.name] = outcome
        print(line(outcome, stages), *(f"    {text}" for text in (*outcome.faults, *outcome.unsupported)), sep="\n", flush=True)
    ordered = [found[case.name] for case in cases]
    summary = summarise(ordered, time.perf_counter() - start, arguments.workers)
    print(summary)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join([versions(), HEADER, *(line(outcome, stages) for outcome in ordered), summary, ""]))
    return any(outcome.faults for outcome in ordered)


HEADER = """\
kernel, architecture, side, dtype, kind of dot, row in the order of configs.py, m x n x r, options
sanitize: no access out of bounds, no race between programs, results within their bounds of the reference in fp64
validate: modules that agree with these results, of the different ones, of the passes that receive one; ~ those within rounding
races: pairs of operations on one place without a barrier between warps, in how many accesses and with how many barriers
"""


def versions() -> str:
    from importlib.metadata import version

    import torch
    import triton

    python = ".".join(map(str, sys.version_info[:3]))
    return f"ttsem {version('ttsem')}, triton {triton.__version__}, torch {torch.__version__}, Python {python}"


def line(outcome, stages: tuple[str, ...]) -> str:
    results = (f"{stage} {outcome.stages.get(stage, '-')}" for stage in stages)
    return f"{outcome.name:100}  {'   '.join(results)}   {outcome.seconds:.0f} s"


def summarise(outcomes: list, seconds: float, workers: int) -> str:
    faults = [(outcome.name, fault) for outcome in outcomes for fault in outcome.faults]
    unsupported = Counter(text for outcome in outcomes for text in outcome.unsupported)
    lines = ["", f"{len(outcomes)} cases in {seconds / 60:.0f} minutes on {workers} workers, {len(faults)} faults"]
    lines += [f"FAULT {name}: {fault}" for name, fault in faults]
    lines += [f"unsupported in {sum(unsupported.values())} places" + (":" if unsupported else "")]
    lines += [f"  {count} x {text}" for text, count in unsupported.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
