"""python -m benchmarks readme: writes the tables of README and docs/, between markers.

Figures come from the newest results of each device in benchmarks/results. Figures that no file holds are
marked as not measured yet. Tables of group keys come from lowrank_kernels/optim/keys.py. With --check nothing
is written, and the exit status is 1 if a page is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowrank_kernels.optim import keys

from .iterations import CHECKPOINTED, DENSE, GALORE
from .provenance import RESULTS, short
from .records import OURS, Row, folders, newest, title
from .suites import SUITES
from .timing import VISIBLE

ROOT = Path(__file__).parents[1]
COLUMNS = 110
"""Width of prose. Lines of tables are as long as they have to be."""
EXPECTED = {"nvidia-h100": "H100"}
"""GPUs that the kernels are meant for, by how the name of their results' folder begins. A page names those
without results."""

ABOUT = {
    "step": "A step between refreshes over a model's projected weights: median ms, and the median over rounds of the time against ours.",
    "kernel": "Parts of a step on one bucket of equal matrices, without the host's time: median ms, and the time against ours.",
    "refresh": "A new basis, of one gradient or of each of several, at the default accuracy (`PyTorch version`: the same without the "
    "extension; `torch.svd_lowrank` with niter = 1): median ms, and the median over rounds of the time against ours.",
    "memory": "MB of optimizer state, and in parentheses the peak of a step beyond what was live.",
    "rso": "A training iteration, forward, backward and step, of a layer in → out and of a LLaMA block at batch × sequence tokens, between "
    "draws of P and refreshes: median ms, and the median over rounds of the time against ours. `this`: `SubspaceLinear` with `RSOAdamW`, "
    "with share=None without sharing Z; all others train `nn.Linear`.",
    "gradients": "Forward pass, backward pass and step of the linear layers of LLaMA blocks in two processes on one machine, which share "
    "its cores: median ms of a step between refreshes, and the time against compressed gradients (`this`).",
    "host": "What a step takes of the host's time, Python and launches, over small matrices of three shapes: median ms. Without a GPU "
    "everything is run but the driver's launches.",
}
HELD = (
    "MB that autograd saves / of gradients / of what stays beside the weights (optimizer states with bases, of RSO also P and the "
    "coordinates), and in parentheses the peak of an iteration beyond what was live, its input included. A single block is all "
    "that checkpointing computes again at a time, so its peak is not lower."
)
EXCHANGED = (
    "MB that a process sends in a step between refreshes / in a step with one, and in parentheses what it holds of gradients after the "
    "backward pass."
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
"""Contenders of the rso suite, keyed by the user's choice."""
HELD_COLUMNS = {
    "activations saved": "saved_mb",
    "gradients": "gradient_mb",
    "states, bases, P and B": "state_mb",
    "peak of an iteration": "peak_mb",
}
FIRST_COLUMN = {
    "step": "weights",
    "kernel": "part, matrices",
    "refresh": "matrix",
    "memory": "weights",
    "rso": "what",
    "gradients": "weights",
    "host": "weights",
}
LAST_COLUMN = {"refresh": "spectrum or dtype"}


@dataclass(frozen=True)
class Headline:
    """A line of README's table: one case, and the figure `key` of this package's row and of the contenders to
    compare with."""

    what: str
    case: str
    key: str
    others: tuple[str, ...]


FULL_RANK = f"{DENSE}, full rank"
_60M, _BLOCK = "60m r=128", "60m block at 8x256 tokens r=128"
HEADLINES = (
    Headline("optimizer state, MB", f"memory {_60M} float32", "state_mb", ("galore-torch", "AdamW, float32 states")),
    Headline("a step, ms", f"step {_60M} float32", "p50_ms", ("galore-torch", FULL_RANK)),
    Headline("a step, ms", f"step {_60M} bfloat16", "p50_ms", ("galore-torch", FULL_RANK)),
    Headline("a new basis, ms", "refresh 512x1376 r=128 noise", "p50_ms", ("torch.svd_lowrank", "torch.linalg.svd")),
    Headline(
        "sent by each of two processes in a step, MB", f"gradients 2 blocks of {_60M} float32", "sent_mb", ("DDP", "DDP, PowerSGD hook")
    ),
    Headline("RSO: activations saved, MB", f"rso {_BLOCK} float32", "saved_mb", (DENSE,)),
    Headline("RSO: a training iteration, ms", f"rso {_BLOCK} float32", "p50_ms", (DENSE,)),
)


def measured(results: Path) -> dict[str, dict[str, list[Row]]]:
    """Rows by device and suite, GPUs first."""
    found = {folder.name: suites for folder in folders(results) if (suites := newest(folder)) and set(suites) & set(SUITES)}
    return {device: found[device] for device in sorted(found, key=lambda name: (name.startswith("cpu"), name))}


def methods(results: Path = RESULTS) -> str:
    """Memory and time of each method, for the first block that the first device with any block has
    measured."""
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
        about = f"Measured, MB: forward, backward and step of one {what}, r = {rank}, {dtype}, on `{device}` (`{held[0]['file']}`)."
        return _wrapped(about) + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "Not measured yet."


def headlines(results: Path = RESULTS) -> str:
    """README's table. For each case in HEADLINES it takes the figures of the first device that measured
    it."""
    found = measured(results)
    lines = [_headline(headline, rows) for headline in HEADLINES if (rows := _rows_of(headline, found))]
    if not lines:
        return "Not measured yet."
    header = ("what", "of", "this", "others", "hardware", "commit")
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ("---",) * len(header), *lines))


def _rows_of(headline: Headline, found: dict[str, dict[str, list[Row]]]) -> dict[str, Row]:
    """Rows by contender, of the first device that has a row of this package."""
    for suites in found.values():
        rows = [row for suite in suites.values() for row in suite if row["case"] == headline.case and headline.key in row]
        if by_contender := {str(row["contender"]): row for row in rows if OURS in {other["contender"] for other in rows}}:
            return by_contender
    return {}


def _headline(headline: Headline, rows: dict[str, Row]) -> tuple[str, ...]:
    mine = rows[OURS]
    what, rank, rest = title(mine)
    others = [f"{name} {short(rows[name][headline.key])}" for name in headline.others if name in rows]
    link = f"[{mine['commit']}](benchmarks/results/{mine['device']}/{mine['file']})"
    return headline.what, f"{what}, r = {rank}, {rest}", short(mine[headline.key]), "; ".join(others), f"`{mine['device']}`", link


def block(results: Path = RESULTS) -> str:
    """All tables, device by device."""
    parts = ["Generated from the files in `benchmarks/results` by `python -m benchmarks readme`."]
    found = measured(results)
    for device, suites in found.items():
        parts += _device(device, suites)
    for prefix, name in EXPECTED.items():
        if not any(device.startswith(prefix) for device in found):
            parts.append(f"**{name}: not measured yet.**")
    return "\n\n".join(part if part.startswith("|") else _wrapped(part) for part in parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, COLUMNS, break_long_words=False, break_on_hyphens=False)


def _device(device: str, suites: dict[str, list[Row]]) -> list[str]:
    parts = [f"**`{device}`**"]
    for suite in SUITES:
        if suite in suites:
            parts += [f"{ABOUT[suite]} {_origin(suites[suite])}", *tables(suite, suites[suite])]
    missing = [f"`{suite}`" for suite in SUITES if suite not in suites]
    return [*parts, f"Not measured yet on this device: {', '.join(missing)}."] if missing else parts


def _origin(rows: list[Row]) -> str:
    """The file, the versions of the measured software, and the ceilings."""
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
    """The tables of one suite. For iterations there are also tables of the bytes they hold and of the largest
    batches, each with a line that says so."""
    batches = [row for row in rows if "largest_batch" in row]
    found = [table(suite, timed)] if (timed := [row for row in rows if "largest_batch" not in row]) else []
    if held := [row for row in rows if "saved_mb" in row]:
        found += [HELD, table(suite, held, _held_cell)]
    if exchanged := [row for row in rows if "sent_mb" in row]:
        found += [EXCHANGED, table(suite, exchanged, _exchanged_cell)]
    return [*found, LARGEST, table(suite, batches, _batch_cell)] if batches else found


def table(suite: str, rows: list[Row], cell: Callable[[Row], str] | None = None) -> str:
    """A Markdown table: a line for each case, a column for each contender, those of this package first.
    Without `cell` the cells are times, or states and peaks of steps."""
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


def _exchanged_cell(row: Row) -> str:
    return f"{_megabytes(row['sent_mb'])} / {_megabytes(row['refresh_sent_mb'])} ({_megabytes(row['gradient_mb'])})"


def _batch_cell(row: Row) -> str:
    return f"{row['largest_batch']} ({row['tokens_per_s']:.3g})"


def _megabytes(value: float) -> str:
    return short(value) if value >= 0.01 else "0"


def replaced(text: str, name: str, generated: str, page: Path) -> str:
    """The page's text, with the part between the markers of that name replaced. Raises ValueError if the
    markers are not there exactly once, in order."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} needs one {begin} and one {end} after it")
    return text.partition(begin)[0] + f"{begin}\n\n{generated}\n\n{end}" + text.partition(end)[2]


PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"results": headlines},
    "docs/benchmarks.md": {"benchmarks": block},
    "docs/rso.md": {"methods": methods, "keys": lambda _: keys.table(keys.RSO)},
    "docs/group-keys.md": {
        "low-rank keys": lambda _: keys.table(keys.LOW_RANK),
        "adafactor keys": lambda _: keys.table(keys.ADAFACTOR),
        "adamw keys": lambda _: keys.table((*keys.ADAMW, keys.CAPTURABLE)),
    },
}
"""The generated parts, by page and by the name in its markers. Each is a function of the folder of
results."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the pages are what they should be")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args(arguments)
    differing = 0
    for name, blocks in PAGES.items():
        page = settings.root / name
        text = wanted = page.read_text()
        for marker, generate in blocks.items():
            wanted = replaced(wanted, marker, generate(settings.results), page)
        if text == wanted:
            print(f"{page} is what the results and declarations say")
        elif settings.check:
            differing += 1
            print(f"{page} is not what the results and declarations say: run python -m benchmarks readme", file=sys.stderr)
        else:
            page.write_text(wanted)
            print(f"wrote {page}")
    return min(differing, 1)
