"""python -m benchmarks: times the step and the refresh against what a user could pick instead, on the GPU if there is one.

Prints a table and appends every figure to benchmarks/results/<device>/<date>-<commit>.jsonl. Each step and each basis is checked
against fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

import torch

from . import contenders, shapes, timing
from .provenance import RESULTS, append, print_table, provenance, results_file

UPDATE_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest relative error of the update ΔW. N is close to the sign of R, so where |R| is under its rounding error δ (1e-7 of its size in
fp32, 4e-3 in bf16) N is off by its own size, which is a share δ of all elements: sqrt(1e-7) = 3e-4 of the norm in fp32, less than the
rounding of the weights in bf16."""
FIGURES = ("gb_per_s", "tflop_per_s", "percent_of_matmul", "update_error", "captured_energy", "defect", "peak_mb", "sketch_mb")
"""Shown beside the times, where a row has them. peak_mb: allocated in one refresh; sketch_mb: (m + n)·l numbers in fp32."""


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


def run_refresh(case: shapes.RefreshCase, on_gpu: bool, seconds: float, ceilings: dict[str, float]) -> list[dict]:
    single = isinstance(case.model, tuple)
    grads = contenders.make_gradients(case, "cuda" if on_gpu else "cpu")
    best = contenders.best_energies(grads, case.rank)
    runs = contenders.refresh_contenders(grads, case.rank, exact=single)
    found = {}
    for name, run in runs.items():
        if on_gpu:
            run()  # the first call makes workspaces that stay
        bases, peak = contenders.peak_bytes(run, on_gpu)
        defect, energy = contenders.check_bases(bases, grads, best)
        if name in contenders.CHECKED and not (defect <= contenders.ORTHONORMAL and energy >= contenders.ENERGY):
            raise SystemExit(f"{case.label}: the basis of {name} has ‖PᵀP − I‖ = {defect:.2g} and energy {energy:.4g}; not timed")
        found[name] = {"captured_energy": energy, "defect": defect, "peak_mb": peak / 1e6}
        del bases
    rows = _rows(case, timing.interleave(runs, on_gpu, seconds, least_rounds=3))
    rows = [row | found[row["contender"]] for row in rows]
    rows[0] |= {"sketch_mb": case.sketch_bytes() / 1e6, "tflop_per_s": case.flops() / rows[0]["p50_ms"] / 1e9}
    if rate := ceilings.get(f"matmul_tflop_per_s_{str(case.dtype).removeprefix('torch.')}"):
        rows[0]["percent_of_matmul"] = 100 * rows[0]["tflop_per_s"] / rate
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


def print_rows(rows: list[dict]) -> None:
    header = ("case", "contender", "ms p20", "p50", "p80", "× ours", "")
    lines = [
        (
            row["case"],
            row["contender"],
            *(f"{row[key]:.2f}" for key in ("p20_ms", "p50_ms", "p80_ms", "ratio_to_ours")),
            ", ".join(f"{key} {row[key]:.4g}" for key in FIGURES if key in row),
        )
        for row in rows
    ]
    print_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120, help="time to measure, over all cases (default 120)")
    parser.add_argument("--quick", action="store_true", help="the smallest cases only")
    parser.add_argument("--suite", choices=["step", "refresh"], help="one of the two suites (both)")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results, or '-' to write none")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    on_gpu = torch.cuda.is_available()
    suites = {"step": shapes.StepCase, "refresh": shapes.RefreshCase}
    selected = [case for case in shapes.cases(on_gpu, arguments.quick) if isinstance(case, suites.get(arguments.suite, object))]
    ceilings = timing.ceilings(on_gpu)
    origin = provenance(on_gpu) | ceilings
    print(json.dumps(origin, indent=1))
    if not on_gpu:
        print("No GPU: the Triton kernels are not timed here; these are the CPU paths.")
    path = None if str(arguments.out) == "-" else results_file(arguments.out / origin["device"], origin)
    rows = []
    for case in selected:
        seconds = arguments.seconds / len(selected)
        if isinstance(case, shapes.StepCase):
            found = run_step(case, on_gpu, seconds)
        else:
            found = run_refresh(case, on_gpu, seconds, ceilings)
        if path is not None:  # after each case: what is measured stays, whatever the next one does
            append(path, [origin | row for row in found])
        rows += found
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    print_rows(rows)
    if path is not None:
        print(f"appended {len(rows)} rows to {path}")


if __name__ == "__main__":
    main()
