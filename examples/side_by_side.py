"""The same training in one process, in two that hold copies of the model (DDP), and in two that hold parts of
it (FSDP2): losses side by side, and what a process holds.

    python examples/side_by_side.py --steps 100 --optimizer i3s rso

Arguments are those of pretrain.py, which this runs three times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from methods import METHODS
from rich.console import Console
from rich.table import Table

SCRIPT = Path(__file__).with_name("pretrain.py")
PROCESSES = 2
RUNS = {
    "1 process": [],
    f"{PROCESSES}, DDP": ["--parallel", "ddp"],
    f"{PROCESSES}, FSDP2": ["--parallel", "fsdp2"],
}
DEFAULTS = ["--steps", "100", "--eval-every", "25", "--eval-sequences", "64", "--threads", "1"]
HELD = {"weight_bytes": "weights", "gradient_bytes": "gradients", "state_bytes": "optimizer state"}


def main() -> int:
    arguments = sys.argv[1:]
    if "--optimizer" not in arguments:
        arguments = ["--optimizer", "adamw", "i3s", "rso", *arguments]
    console = Console(width=None if sys.stdout.isatty() else 120)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, own in RUNS.items():
            console.print(f"{name} …")
            directory = Path(folder) / name.replace(" ", "")
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"] if own else []
            command = [sys.executable, *launcher, str(SCRIPT), *DEFAULTS, *arguments, *own, "--out", str(directory)]
            # Processes that share the cores take one thread each.
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if done.returncode:
                console.print(done.stdout + done.stderr, markup=False)
                return done.returncode
            for method in METHODS:
                if (path := directory / f"{method}.jsonl").exists():
                    found[method, name] = [json.loads(line) for line in path.read_text().splitlines()]
    for method in dict.fromkeys(method for method, _ in found):
        console.print(table(method, {name: found[method, name] for name in RUNS}))
    return 0


def table(method: str, runs: dict[str, list[dict]]) -> Table:
    result = Table(title=f"{METHODS[method].title}: held-out loss, and what one process holds")
    result.add_column("")
    for name in runs:
        result.add_column(name, justify="right")
    evals = [[row for row in rows if row["event"] == "eval"] for rows in runs.values()]
    for each in zip(*evals, strict=True):
        result.add_row(f"step {each[0]['step']}", *(f"{row['val_loss']:.4f}" for row in each))
    result.add_section()
    for key, what in HELD.items():
        result.add_row(f"{what}, MB", *(f"{rows[-1][key] / 1e6:.3f}" for rows in runs.values()))
    return result


if __name__ == "__main__":
    sys.exit(main())
