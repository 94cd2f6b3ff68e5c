"""python -m benchmarks: times the step and the refresh against what a user could pick instead, on the GPU if there is one.

Prints a table and appends every figure to benchmarks/results/<device>/<date>-<commit>.jsonl. Each step is checked against fp64
before it is timed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import re
import subprocess
from pathlib import Path

import torch

import lowrank_kernels as lrk

from . import contenders, shapes, timing

RESULTS = Path(__file__).parent / "results"
UPDATE_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest relative error of the update ΔW. N is close to the sign of R, so where |R| is under its rounding error δ (1e-7 of its size in
fp32, 4e-3 in bf16) N is off by its own size, which is a share δ of all elements: sqrt(1e-7) = 3e-4 of the norm in fp32, less than the
rounding of the weights in bf16."""


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
    """Short hash of HEAD, with "-dirty" where tracked files differ from it, or "unknown" outside a repository."""
    root = Path(__file__).parent
    try:
        run = dict(cwd=root, capture_output=True, text=True, check=True)
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        return head + ("-dirty" if subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_step(case: shapes.StepCase, on_gpu: bool, seconds: float) -> list[dict]:
    device = "cuda" if on_gpu else "cpu"
    model = shapes.model_shapes(case.model)
    error = contenders.check_step(model, case.rank, case.dtype, device)
    if not error <= UPDATE_ERROR[case.dtype]:
        raise SystemExit(f"{case.label}: the update is off by {error:.2g} from fp64; not timed")
    params = contenders.make_params(model, case.dtype, device)
    runs = {}
    for name, build in contenders.STEP_CONTENDERS.items():
        try:
            step = build(params, case.rank)
            step()  # states are allocated in the first step
            runs[name] = step
        except (ImportError, torch.OutOfMemoryError) as missing:
            print(f"{case.label}: {name} skipped: {type(missing).__name__}: {str(missing).splitlines()[0]}")
    if next(iter(runs), None) != "lowrank_kernels":
        return []
    rows = _rows(case, timing.interleave(runs, on_gpu, seconds))
    rows[0] |= {"update_error": error, "gb_per_s": case.bytes_moved() / rows[0]["p50_ms"] / 1e6}
    rows[0]["tflop_per_s"] = case.flops() / rows[0]["p50_ms"] / 1e9
    return rows


def run_refresh(case: shapes.RefreshCase, on_gpu: bool, seconds: float) -> list[dict]:
    grad = torch.randn(case.rows, case.columns, device="cuda" if on_gpu else "cpu")
    runs = contenders.refresh_contenders(grad, case.rank)
    rows = _rows(case, timing.interleave(runs, on_gpu, seconds, least_rounds=3))
    best = torch.linalg.svdvals(grad)[: case.rank].square().sum()
    rows[0]["captured_energy"] = ((lrk.ops.range_finder(grad, case.rank)[0].mT @ grad).square().sum() / best).item()
    return rows


def _rows(case: shapes.StepCase | shapes.RefreshCase, timings: dict[str, timing.Timing]) -> list[dict]:
    return [
        {
            "case": case.label,
            "contender": name,
            "p20_ms": t.p20,
            "p50_ms": t.p50,
            "p80_ms": t.p80,
            "rounds": t.rounds,
            "ratio_to_ours": t.ratio,
        }
        for name, t in timings.items()
    ]


def append(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def print_table(rows: list[dict]) -> None:
    """With rich where it is installed; a GPU machine may have nothing but torch."""
    header = ("case", "contender", "ms p20", "p50", "p80", "× ours", "")
    cells = [
        (
            row["case"],
            row["contender"],
            *(f"{row[key]:.2f}" for key in ("p20_ms", "p50_ms", "p80_ms", "ratio_to_ours")),
            ", ".join(f"{key} {row[key]:.3g}" for key in ("gb_per_s", "tflop_per_s", "update_error", "captured_energy") if key in row),
        )
        for row in rows
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join("\t".join(line) for line in (header, *cells)))
        return
    table = Table(*header)
    for index, line in enumerate(cells):
        last = index + 1 == len(cells) or cells[index + 1][0] != line[0]
        table.add_row(*line, end_section=last)
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120, help="time to measure, over all cases (default 120)")
    parser.add_argument("--quick", action="store_true", help="the smallest cases only")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results, or '-' to write none")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    on_gpu = torch.cuda.is_available()
    selected = shapes.cases(on_gpu, arguments.quick)
    now = datetime.datetime.now(datetime.timezone.utc)
    provenance = {
        "device": device_name(on_gpu),
        "time": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "lowrank_kernels": lrk.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **timing.ceilings(on_gpu),
    }
    print(json.dumps(provenance, indent=1))
    if not on_gpu:
        print("No GPU: the Triton kernels are not timed here; these are the CPU paths.")
    folder = None if str(arguments.out) == "-" else arguments.out / provenance["device"]
    rows = []
    for case in selected:
        run = run_step if isinstance(case, shapes.StepCase) else run_refresh
        found = run(case, on_gpu, arguments.seconds / len(selected))
        if folder is not None:  # after each case: what is measured stays, whatever the next one does
            append(folder / f"{now:%Y-%m-%d}-{provenance['commit']}.jsonl", [provenance | row for row in found])
        rows += found
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    print_table(rows)
    if folder is not None:
        print(f"appended {len(rows)} rows to a file in {folder}")


if __name__ == "__main__":
    main()
