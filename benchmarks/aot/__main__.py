"""python -m benchmarks.aot: see benchmarks/aot/__init__.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import dry
from . import cases, compiling, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description="Compile every row of tiles ahead of time.")
    parser.add_argument("--json", type=Path, help="write the reports to this file as JSON")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    parser.add_argument("--sample", action="store_true", help="a few cases instead of all")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="cases with all of these in their name")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if dry.interpreted():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    chosen = cases.sample() if arguments.sample else cases.cases()
    chosen = [case for case in chosen if all(text in case.name for text in arguments.only)]
    if not chosen:
        parser.error("no case is left")
    reports = compiling.compile_all(chosen, arguments.workers)
    if arguments.json:
        compiling.write(reports, arguments.json)
    text = table.text(reports)
    print(text, end="")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
