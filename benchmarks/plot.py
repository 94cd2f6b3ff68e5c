"""python -m benchmarks plot [FILES]: PNGs from results; without FILES, from the newest files of each device.

roofline.png   achieved TFLOP/s over flops per byte, under the ceilings measured in the same run, by rank
speedup.png    time of each baseline over ours, case by case; below 1, where the baseline is faster, in red
memory.png     optimizer state, and the peak of a step beyond it
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .provenance import RESULTS
from .records import Row, folders, is_ours, newest, read, suite_of
from .roofline import Machine
from .shapes import DTYPES, dtype_name

OUT = Path("runs") / "benchmarks"


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def roofline(rows: list[Row], path: Path) -> Path | None:
    """Timed rows of this package whose bytes and flops are known: their TFLOP/s under the ceilings, and their
    share of the ceilings, by rank."""
    shown = [row for row in rows if is_ours(row) and row.get("gb_per_s") and row.get("tflop_per_s")]
    if not shown:
        return None
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5))
    intensity = {id(row): 1e3 * row["tflop_per_s"] / row["gb_per_s"] for row in shown}
    ends = [min(intensity.values()) / 4, max(intensity.values()) * 4]
    machine = Machine.measured(shown[-1], on_gpu=not str(shown[-1]["device"]).startswith("cpu"))
    for (name, dtype), style in zip(DTYPES.items(), ("--", "-", ":"), strict=True):
        if dtype in machine.matmul_tflop_per_s and any(_dtype(row) == dtype_name(dtype) for row in shown):
            rate = machine.matmul_tflop_per_s[dtype]
            xs = sorted([*ends, min(max(1e3 * rate / machine.copy_gb_per_s, ends[0]), ends[1])])
            left.plot(
                xs, [min(rate, x * machine.copy_gb_per_s / 1e3) for x in xs], style, color="black", label=f"ceiling, {name}", linewidth=1
            )
    for rank in sorted({_rank(row) for row in shown}):
        mine = [row for row in shown if _rank(row) == rank]
        left.scatter([intensity[id(row)] for row in mine], [row["tflop_per_s"] for row in mine], label=f"r = {rank}", s=24)
    for suite in dict.fromkeys(suite_of(row) for row in shown):
        mine = [row for row in shown if suite_of(row) == suite and "percent_of_ceiling" in row]
        right.scatter([_rank(row) for row in mine], [row["percent_of_ceiling"] for row in mine], label=suite, s=24)
    left.set(xscale="log", yscale="log", xlabel="flops per byte from memory", ylabel="TFLOP/s")
    right.set_xscale("log", base=2)
    right.set(xlabel="rank", ylabel="% of ceiling: predicted time over median time", ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.suptitle(f"Achieved and possible: {_device(shown)}")
    return _saved(figure, path)


def speedup(rows: list[Row], path: Path) -> Path | None:
    """Bars of ratio_to_ours for every timed row that is not of this package."""
    shown = [row for row in rows if "p50_ms" in row and not is_ours(row)]
    if not shown:
        return None
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.24 * len(shown)))
    places = range(len(shown))
    ratios = [row["ratio_to_ours"] for row in shown]
    axes.barh(places, [ratio - 1 for ratio in ratios], left=1, color=["tab:red" if ratio < 1 else "tab:blue" for ratio in ratios])
    axes.set_yticks(places, [f"{row['case']} · {row['contender']}" for row in shown], fontsize=7)
    for place, ratio in zip(places, ratios, strict=True):
        axes.annotate(f" {ratio:.2f}×", (max(ratio, 1), place), va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="time over ours (red: faster than this package)", title=_device(shown))
    axes.set_xlim(min(*ratios, 0.5) / 1.2, max(*ratios, 2) * 1.6)
    return _saved(figure, path)


def memory(rows: list[Row], path: Path) -> Path | None:
    """Bars of state, with a step's peak on top."""
    shown = [row for row in rows if "step_peak_mb" in row]
    if not shown:
        return None
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.3 * len(shown)))
    places = range(len(shown))
    axes.barh(places, [row["state_mb"] for row in shown], label="optimizer state")
    axes.barh(places, [row["step_peak_mb"] for row in shown], left=[row["state_mb"] for row in shown], label="peak of a step beyond it")
    axes.set_yticks(places, [f"{row['case']} · {row['contender']}" for row in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="MB", title=_device(shown))
    axes.legend(fontsize=8)
    return _saved(figure, path)


def _device(rows: list[Row]) -> str:
    return ", ".join(dict.fromkeys(f"{row['device']}, {row['commit']}" for row in rows))


def _rank(row: Row) -> int:
    return int(next(word[2:] for word in str(row["case"]).split() if word.startswith("r=")))


def _dtype(row: Row) -> str:
    """The dtype of a row. Older rows have it only at the end of the label, or were fp32."""
    last = str(row["case"]).split()[-1]
    return str(row.get("dtype") or (last if last.startswith(("float", "bfloat")) else "float32"))


def _saved(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    _pyplot().close(figure)
    return path


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Draws all three pictures, from one device's rows. Pictures with nothing to show are left out."""
    drawings = {"roofline.png": roofline, "speedup.png": speedup, "memory.png": memory}
    return [path for name, drawing in drawings.items() if (path := drawing(rows, folder / name))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder, with one for each device in it (default {OUT})")
    settings = parser.parse_args(arguments)
    rows = (
        read(settings.files)
        if settings.files
        else [row for folder in folders(RESULTS) for suite in newest(folder).values() for row in suite]
    )
    rows = [row for row in rows if suite_of(row) and "device" in row]
    for device in dict.fromkeys(str(row["device"]) for row in rows):
        for path in draw([row for row in rows if row["device"] == device], settings.out / device):
            print(path)
    return 0
