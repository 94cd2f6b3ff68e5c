"""python -m benchmarks.ir: see benchmarks/ir/__init__.py."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

KERNELS = ("single_pass", "project_moments", "back_project", "project", "moments", "residual", "residual_norm", "limiter", "scaling")


def main() -> int:
    from . import cases as all_cases
    from .pool import outcomes
    from .stages import STAGES, Outcome

    parser = argparse.ArgumentParser(prog="python -m benchmarks.ir", description="Execute every kernel from the compiler's IR, on a CPU.")
    parser.add_argument("--sample", action="store_true", help="a part of the cases, under two minutes")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="these alone")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="cases with all of these in their line")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="sanitize always runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the log to this file as well")
    parser.add_argument(
        "--journal", type=Path, help="keep what is done in this file, and do not do it again for the same kernels, versions and stages"
    )
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    cases = all_cases.sample() if arguments.sample else all_cases.cases()
    cases = [case for case in cases if arguments.kernels is None or case.kernel in arguments.kernels]
    cases = [case for case in cases if all(text in case.name for text in arguments.only)]
    if not cases:
        parser.error("no case is left")
    stages = tuple({"sanitize": None, **dict.fromkeys(arguments.stages)})
    subject = {"versions": versions(), "kernels": kernels_digest(), "stages": list(stages)}
    rows = read_journal(arguments.journal, subject)
    found = {row["name"]: Outcome(**row) for row in rows}
    for outcome in outcomes([case for case in cases if case.name not in found], stages, arguments.workers):
        found[outcome.name] = outcome
        print(line(outcome, stages), *(f"    {text}" for text in (*outcome.faults, *outcome.unsupported)), sep="\n", flush=True)
        if arguments.journal:
            arguments.journal.parent.mkdir(parents=True, exist_ok=True)
            with arguments.journal.open("a") as file:
                file.write(json.dumps(subject | {"outcome": dataclasses.asdict(outcome)}) + "\n")
    ordered = [found[case.name] for case in cases]
    summary = summarise(ordered)
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


def kernels_digest() -> str:
    """Of all sources that the kernels are made of."""
    from lowrank_kernels.backends import triton

    digest = hashlib.sha256()
    for path in sorted(Path(triton.__file__).parent.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def read_journal(path: Path | None, subject: dict[str, object]) -> list[dict[str, object]]:
    """The outcomes in it that are of this subject. A line that was cut off is left out."""
    found = []
    for text in path.read_text().splitlines() if path and path.exists() else ():
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if all(row.get(key) == value for key, value in subject.items()):
            found.append(row["outcome"])
    return found


def versions() -> str:
    from importlib.metadata import version

    import torch
    import triton

    python = ".".join(map(str, sys.version_info[:3]))
    return f"ttsem {version('ttsem')}, triton {triton.__version__}, torch {torch.__version__}, Python {python}"


def line(outcome, stages: tuple[str, ...]) -> str:
    results = (f"{stage} {outcome.stages.get(stage, '-')}" for stage in stages)
    return f"{outcome.name:100}  {'   '.join(results)}   {outcome.seconds:.0f} s"


def summarise(outcomes: list) -> str:
    faults = [(outcome.name, fault) for outcome in outcomes for fault in outcome.faults]
    unsupported = Counter(text for outcome in outcomes for text in outcome.unsupported)
    lines = [
        "",
        f"{len(outcomes)} cases in {sum(outcome.seconds for outcome in outcomes) / 60:.0f} minutes of a core, {len(faults)} faults",
    ]
    lines += [f"FAULT {name}: {fault}" for name, fault in faults]
    lines += [f"unsupported in {sum(unsupported.values())} places" + (":" if unsupported else "")]
    lines += [f"  {count} x {text}" for text, count in unsupported.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
