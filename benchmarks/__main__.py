"""python -m benchmarks: times and weighs this package against what a user could pick instead.

It runs on the GPU if there is one. It prints tables and appends every figure to
benchmarks/results/<device>/<date>-<commit>.jsonl. What could not be measured gets the reason in its place.
Everything of this package is checked against fp64 before it is timed. The exit status is 1 if any of it is
wrong or fails. Cases that no longer fit into --seconds are left out. The run may end late by at most one
set-up, and by one round of what is timed last.

Also: python -m benchmarks plot | compare | readme (each with --help), python -m benchmarks.roofline.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

from . import ceilings, compare, plot, readme, shapes, wheels
from .cases import Budget, Case, Context, Selection, not_measured
from .provenance import RESULTS, append, provenance, results_file
from .records import ALL, Row, failed, print_rows
from .roofline import Machine
from .suites import SUITES

COMMANDS = {"plot": plot.main, "compare": compare.main, "readme": readme.main}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.partition("\n")[0],
        epilog="Cases are all combinations of --models, --ranks and --dtypes where one of them is given, else the suites' own choice.",
    )
    parser.add_argument("--suite", action="append", choices=SUITES, help="repeatable; all suites where there is none")
    parser.add_argument("--models", nargs="+", help=f"{', '.join(shapes.LLAMA)}, or like 28x512 for 28 matrices of 512²")
    parser.add_argument("--ranks", nargs="+", type=int, help=f"such as {' '.join(map(str, shapes.RANKS))}")
    parser.add_argument("--dtypes", nargs="+", choices=shapes.DTYPES)
    parser.add_argument("--quick", action="store_true", help="the smallest cases only; not for README")
    parser.add_argument("--seconds", type=float, help="of the whole run, set-ups and checks included (default 240, with --quick 30)")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results, or '-' to write none")
    parser.add_argument("--file", type=Path, help="file of results, in the place of one in --out")
    parser.add_argument("--commit", help="what to record as the commit of a copy that has no git history")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of peers that are not installed, for a machine without a network")
    settings = parser.parse_args(arguments)
    for model in settings.models or ():
        try:
            shapes.model_shapes(model)
        except ValueError as unknown:
            parser.error(str(unknown))
    if settings.seconds is None:
        settings.seconds = 30 if settings.quick else 240
    return settings


def run(settings: argparse.Namespace) -> list[Row]:
    """Measures, prints and appends. Rows already measured are kept, whatever a later case does."""
    budget = Budget(settings.seconds)
    start = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.wheels:
        wheels.install(settings.wheels)
    on_gpu = torch.cuda.is_available()
    dtypes = tuple(shapes.DTYPES[name] for name in settings.dtypes) if settings.dtypes else None
    selection = Selection(settings.quick, *(tuple(given) if given else None for given in (settings.models, settings.ranks)), dtypes)
    work = [(SUITES[name], case) for name in dict.fromkeys(settings.suite or SUITES) for case in SUITES[name].cases(selection, on_gpu)]
    origin = provenance(on_gpu) | ({"commit": settings.commit} if settings.commit else {})
    origin |= ceilings.measure(on_gpu, seconds=min(1.0, settings.seconds / 10))
    print(json.dumps(origin, indent=1))
    origin["quick"] = settings.quick
    if not on_gpu:
        print("No GPU: these are the CPU paths. The Triton kernels, single_pass and split of the kernel suite among them, need one.")
    path = None if str(settings.out) == "-" else results_file(settings.out / str(origin["device"]), origin)
    path = settings.file or path
    machine = Machine.measured(origin, on_gpu)
    rows: list[Row] = []
    gc.freeze()  # exempt the imports from collection, so that collections after each case need not walk through them
    for number, (suite, case) in enumerate(work):
        share = max(0.0, budget.left()) / (len(work) - number)
        print(f"[{time.perf_counter() - start:4.0f} s] {case.label}", flush=True)
        found = measure(suite, case, Context(on_gpu, share, machine, budget))
        if path is not None:
            append(path, [origin | row for row in found])
        rows += found
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    gc.unfreeze()
    print_rows(rows)
    if path is not None:
        print(f"appended {len(rows)} rows to {path}")
    return rows


def measure(suite: ModuleType, case: Case, context: Context) -> list[Row]:
    """The case's rows. If the case raises an exception or has no time left, a single row says so."""
    if context.budget.left() <= 0:
        return [not_measured(case.label, ALL, "no time: the cases before it took all of --seconds")]
    try:
        return suite.run(case, context)
    except Exception as why:
        return [not_measured(case.label, ALL, why)]


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        raise SystemExit(COMMANDS[arguments[0]](arguments[1:]))
    rows = run(parse(arguments))
    if wrong := failed(rows):
        raise SystemExit(f"{len(wrong)} of this package's figures could not be measured, because something failed")


if __name__ == "__main__":
    main()
