"""The origin that every result carries, where results are kept, and how a table is shown."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import lowrank_kernels as lrk
from lowrank_kernels.environment import tile_shapes

RESULTS = Path(__file__).parent / "results"
PEERS = ("triton", "galore-torch", "apollo-torch", "bitsandbytes", "transformers")


def device_name(on_gpu: bool) -> str:
    name = torch.cuda.get_device_name() if on_gpu else f"cpu {_cpu_model()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
        return f"{model['model name']} family {model['cpu family']} model {model['model']}"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of HEAD, with "-dirty" where tracked files differ from it, or "unknown" outside a
    repository."""
    root = Path(__file__).parent
    try:
        run = dict(cwd=root, capture_output=True, text=True, check=True)
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        return head + ("-dirty" if subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(on_gpu: bool) -> dict[str, object]:
    return {
        "device": device_name(on_gpu),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "lowrank_kernels": lrk.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {name: version for name in PEERS if (version := _version(name))},
        **({"tile_shapes": tile_shapes()} if on_gpu else {}),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def results_file(folder: Path, origin: dict[str, object]) -> Path:
    """<folder>/<date>-<commit>.jsonl, for a result of `provenance`."""
    return folder / f"{str(origin['time'])[:10]}-{origin['commit']}.jsonl"


def append(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def short(value: float) -> str:
    """The value with three digits."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def print_table(header: Sequence[str], lines: Sequence[Sequence[str]], title: str | None = None, rules: bool = True) -> None:
    """Prints with rich where it is installed, because a GPU machine may have nothing but torch. With `rules`,
    a rule separates lines where the first column changes."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join("\t".join(line) for line in ([title] if title else [], header, *lines) if line))
        return
    table = Table(*header, title=title)
    for index, line in enumerate(lines):
        last = index + 1 == len(lines) or lines[index + 1][0] != line[0]
        table.add_row(*line, end_section=last and rules)
    Console(width=170).print(table)
