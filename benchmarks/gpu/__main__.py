"""python -m benchmarks.gpu: builds, checks and times everything on the GPU at hand, in nine minutes that
always end with evidence.

Each stage is a process of its own with a limit of its own: whatever fails or hangs, the next one runs. Logs,
results and a summary, which is also printed last, go to --out as they come: eight files at most, of 16 MiB at
most. Installs nothing, and leaves the GPU's settings as they are.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import evidence, runner, stages
from .runner import Command


def parse(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, help="for all stages together (default 9, with --dry 1.8)")
    parser.add_argument(
        "--out", type=Path, help="folder of the files (default $OUT, else benchmarks/results/<gpu>; with --dry runs/gpu-dry)"
    )
    parser.add_argument("--stages", type=lambda text: text.split(","), help=f"some of {','.join(names)} (default all but tune,full)")
    parser.add_argument("--commit", help="what to record as the commit of a copy that has no git history")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of peers that are not installed, for the benchmarks")
    parser.add_argument("--dry", action="store_true", help="without a GPU: every stage on small sizes and the CPU, as far as it goes there")
    parser.add_argument(
        "--replace", action="append", default=[], metavar="STAGE=COMMAND", help="a shell command in the place of a stage's own: for trying"
    )
    settings = parser.parse_args(arguments)
    if settings.minutes is None:
        settings.minutes = 1.8 if settings.dry else 9.0
    replaced = [each.partition("=")[0] for each in settings.replace]
    for name in [*(settings.stages or ()), *replaced]:
        if name not in names:
            parser.error(f"there is no stage {name!r}: {', '.join(names)}")
    return settings


def default_folder(dry: bool) -> Path:
    if dry:
        return evidence.ROOT / "runs" / "gpu-dry"
    if folder := os.environ.get("OUT"):
        return Path(folder)
    return evidence.RESULTS / (evidence.gpu_name() or "no-gpu")


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse(arguments, stages.NAMES)
    files = evidence.Files((settings.out or default_folder(settings.dry)).resolve(), settings.commit or evidence.commit())
    plan = stages.all_stages(stages.Settings(files, settings.dry, settings.commit, settings.wheels))
    wanted = settings.stages or [name for name in stages.NAMES if name not in stages.LATER]
    plan = [stage for stage in plan if stage.name in wanted]
    for name, _, command in (each.partition("=") for each in settings.replace):
        plan = [replace(stage, commands=[Command(["sh", "-c", command])]) if stage.name == name else stage for stage in plan]
    print(f"{shlex.join(stage.name for stage in plan)} in {settings.minutes:g} minutes; files in {files.folder}", flush=True)
    outcomes = runner.run(plan, files, 60 * settings.minutes)
    print(evidence.summary(outcomes), flush=True)
    return 1 if any(outcome.bad for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
