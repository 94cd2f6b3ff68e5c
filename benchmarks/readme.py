"""python -m benchmarks readme: writes README's tables of figures, between markers, from the newest results of each device.

Every number comes from a file in benchmarks/results; what no file holds is said to be not measured yet. With --check nothing is
written, and the exit status is 1 where README is not what would be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from .iterations import CHECKPOINTED, DENSE, GALORE
from .provenance import RESULTS, short
from .records import OURS, Row, folders, newest, title
from .suites import SUITES
from .timing import VISIBLE

README = Path(__file__).parents[1] / "README.md"
EXPECTED = {"nvidia-h100": "H100"}
"""GPUs that the kernels are meant for, by how their results' folder begins: missing ones are named."""

ABOUT = {
    "step": "A step between refreshes over a model's projected weights: median ms, and the median over rounds of the time against ours.",
    "kernel": "Parts of a step on one bucket of equal matrices, without the host's time: median ms, and the time against ours.",
    "refresh": "A new basis, of one gradient or of each of several, at the default accuracy (`PyTorch version`: the same without the "
    "extension; `torch.svd_lowrank` with niter = 1): median ms, and the median over rounds of the time against ours.",
    "memory": "MB of optimizer state, and in parentheses the peak of a step beyond what was live.",
    "rso": "A training iteration, forward, backward and step, of a layer in → out and of a LLaMA block at batch × sequence tokens, between "
    "draws of P and refreshes: median ms, and the median over rounds of the time against ours. `this`: `SubspaceLinear` with `RSOAdamW`, "
    "with share=None without sharing Z; all others train `nn.Linear`.",
    "host": "What a step takes of the host's time, Python and launches, over small matrices of three shapes: median ms. Without a GPU "
    "everything is run but the driver's launches.",
}
HELD = (
    "MB that autograd saves / of gradients / of what stays beside the weights (optimizer states with bases, of RSO also P and the "
    "coordinates), and in parentheses the peak of an iteration beyond what was live, its input included. A single block is all "
    "that checkpointing computes again at a time, so its peak is not lower."
)
LARGEST = (
    "The largest batch of all of a model's blocks that fits the device, to an eighth, and in parentheses the tokens a second at that batch."
)
METHODS = {
    DENSE: "`torch.optim.AdamW`",
    CHECKPOINTED: "`torch.optim.AdamW`, blocks checkpointed",
    GALORE: "`GaLoreAdamW`, `I3SAdamW`",
    OURS: "`RSOAdamW`",
}
"""Contenders of the rso suite by what a user picks."""
HELD_COLUMNS = {
    "activations saved": "saved_mb",
    "gradients": "gradient_mb",
    "states, bases, P and B": "state_mb",
    "peak of an iteration": "peak_mb",
}
FIRST_COLUMN = {"step": "weights", "kernel": "part, matrices", "refresh": "matrix", "memory": "weights", "rso": "what", "host": "weights"}
LAST_COLUMN = {"refresh": "spectrum or dtype"}


def measured(results: Path) -> dict[str, dict[str, list[Row]]]:
    """Rows by suite by device, GPUs first."""
    found = {folder.name: suites for folder in folders(results) if (suites := newest(folder)) and set(suites) & set(SUITES)}
    return {device: found[device] for device in sorted(found, key=lambda name: (name.startswith("cpu"), name))}


def methods(results: Path = RESULTS) -> str:
    """What each method takes of memory and time, for the first block that the first device with any has measured."""
    for device, suites in measured(results).items():
        held = [row for row in suites.get("rso", ()) if "saved_mb" in row and " block at " in str(row["case"])]
        rows = {row["contender"]: row for row in held if row["case"] == held[0]["case"]}
        if not rows:
            continue
        what, rank, dtype = title(held[0])
        lines = [("optimizer", *HELD_COLUMNS, "time of an iteration, ms"), ("---",) * (len(HELD_COLUMNS) + 2)]
        for name, pretty in METHODS.items():
            if name in rows:
                lines.append((pretty, *(_megabytes(rows[name][key]) for key in HELD_COLUMNS.values()), short(rows[name]["p50_ms"])))
        return (
            f"Measured, MB: forward, backward and step of one {what}, r = {rank}, {dtype}, on `{device}` (`{held[0]['file']}`).\n\n"
            + "\n".join("| " + " | ".join(line) + " |" for line in lines)
        )
    return "Not measured yet."


def block(results: Path = RESULTS) -> str:
    """All tables, device by device."""
    parts = ["Generated from [benchmarks/results](benchmarks/results) by `python -m benchmarks readme`."]
    found = measured(results)
    for device, suites in found.items():
        parts += _device(device, suites)
    for prefix, name in EXPECTED.items():
        if not any(device.startswith(prefix) for device in found):
            parts.append(f"**{name}: not measured yet.**")
    return "\n\n".join(parts)


def _device(device: str, suites: dict[str, list[Row]]) -> list[str]:
    parts = [f"**`{device}`**"]
    for suite in SUITES:
        if suite in suites:
            parts += [f"{ABOUT[suite]} {_origin(suites[suite])}", *tables(suite, suites[suite])]
    missing = [f"`{suite}`" for suite in SUITES if suite not in suites]
    return [*parts, f"Not measured yet on this device: {', '.join(missing)}."] if missing else parts


def _origin(rows: list[Row]) -> str:
    """File, versions of what was measured, and ceilings."""
    row = rows[-1]
    shown = [str(row["contender"]) for row in rows] + (["triton"] if not str(row["device"]).startswith("cpu") else [])
    found = {"torch": row["torch"]} | {
        name: version for name, version in row.get("versions", {}).items() if any(contender.startswith(name) for contender in shown)
    }
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    rates = [
        f"{name} products {row[key]:.3g} TFLOP/s"
        for name, key in (("fp32", "matmul_tflop_per_s_float32"), ("bf16", "matmul_tflop_per_s_bfloat16"))
        if key in row
    ]
    return f"File `{row['file']}`; {versions}; measured ceilings: copy {row['copy_gb_per_s']:.3g} GB/s, {', '.join(rates)}."


def tables(suite: str, rows: list[Row]) -> list[str]:
    """What a suite measured; of iterations also what they hold and the largest batches, each with a line that says so."""
    batches = [row for row in rows if "largest_batch" in row]
    found = [table(suite, timed)] if (timed := [row for row in rows if "largest_batch" not in row]) else []
    if held := [row for row in rows if "saved_mb" in row]:
        found += [HELD, table(suite, held, _held_cell)]
    return [*found, LARGEST, table(suite, batches, _batch_cell)] if batches else found


def table(suite: str, rows: list[Row], cell: Callable[[Row], str] | None = None) -> str:
    """Markdown: a line a case, a column a contender, those of this package first. Without `cell` times, or states and peaks of steps."""
    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    contenders = sorted(dict.fromkeys(str(row["contender"]) for row in rows), key=lambda name: not name.startswith(OURS))
    by_key = {(row["case"], row["contender"]): row for row in rows}
    with_ceiling = cell is None and any("percent_of_ceiling" in row for row in rows if row["contender"] == OURS)
    write = cell or _cell
    header = [
        FIRST_COLUMN[suite],
        "r",
        LAST_COLUMN.get(suite, "dtype"),
        *("this" + name[len(OURS) :] if name.startswith(OURS) else name for name in contenders),
    ]
    if with_ceiling:
        header += ["this, % of ceiling", "predicted ms"]
    lines = []
    for case in cases:
        found = [by_key.get((case, contender)) for contender in contenders]
        line = [*title({"case": case}), *("–" if row is None else write(row) for row in found)]
        if with_ceiling:
            ours = by_key.get((case, OURS), {})
            line += [short(ours[key]) if key in ours else "–" for key in ("percent_of_ceiling", "predicted_ms")]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def _cell(row: Row) -> str:
    if "step_peak_mb" in row:
        return f"{_megabytes(row['state_mb'])} ({_megabytes(row['step_peak_mb'])})"
    ratio = "" if row["contender"] == OURS else f" ({row['ratio_to_ours']:.{1 if row['ratio_to_ours'] >= 10 else 2}f}×)"
    return short(row["p50_ms"]) + ratio + (" with launches" if row.get("launches") == VISIBLE else "")


def _held_cell(row: Row) -> str:
    return " / ".join(_megabytes(row[key]) for key in ("saved_mb", "gradient_mb", "state_mb")) + f" ({_megabytes(row['peak_mb'])})"


def _batch_cell(row: Row) -> str:
    return f"{row['largest_batch']} ({row['tokens_per_s']:.3g})"


def _megabytes(value: float) -> str:
    return short(value) if value >= 0.01 else "0"


def replaced(text: str, name: str, generated: str) -> str:
    """README with the block between the markers of that name exchanged. ValueError where they do not stand there once, in order."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README needs one {begin} and one {end} after it")
    return text.partition(begin)[0] + f"{begin}\n\n{generated}\n\n{end}" + text.partition(end)[2]


BLOCKS: dict[str, Callable[[Path], str]] = {"methods": methods, "benchmarks": block}
"""By the name in their markers."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether README is what the results say")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args(arguments)
    text = settings.readme.read_text()
    wanted = text
    for name, generate in BLOCKS.items():
        wanted = replaced(wanted, name, generate(settings.results))
    if text == wanted:
        print(f"{settings.readme} is what the results say")
        return 0
    if settings.check:
        print(f"{settings.readme} is not what the results say: run python -m benchmarks readme", file=sys.stderr)
        return 1
    settings.readme.write_text(wanted)
    print(f"wrote {settings.readme}")
    return 0
