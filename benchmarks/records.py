"""Rows of results: how a suite's figures become rows, how rows are shown, and how files of them are read
back.

A row is one contender in one case. The rows of a run share its provenance and ceilings.

Timed rows have p20_ms, p50_ms, p80_ms, rounds and ratio_to_ours (time over that of the case's first
contender, median over rounds). If the cost of the work is known, they also have predicted_ms (roofline.py on
the ceilings measured in the same run), percent_of_ceiling (predicted / p50), gb_per_s and tflop_per_s. Timed
rows of this package also have strongest_baseline and speedup, the p50 of that baseline over the row's own.

Memory rows have state_mb, step_peak_mb and theory_mb.

Rows of the rso suite also have medians of an iteration's parts, forward_ms, backward_ms and step_ms, and
tokens_per_s. Their bytes are saved_mb, gradient_mb and state_mb (with whatever else stays beside the
weights), each with …_theory_mb where there is a formula, and peak_mb of an iteration. Some rows have, instead
of times and bytes, largest_batch, tokens_per_s, and ratio_to_ours of the batch.

Rows of the gradients suite also have sent_mb, what a process sends in a step between refreshes;
refresh_sent_mb, in a step with one; and gradient_mb, what it holds of gradients after the backward pass.

If times are those of a GPU alone, `launches` says how the host's times are kept out (timing.py).

What was not measured has a row as well. It holds nothing but the reason, as `failure` (a wrong result, an
exception) or `skipped` (something missing, no time, no room). Its contender is ALL for a whole case.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from .provenance import RESULTS, print_table, short
from .roofline import Machine, Work, total
from .shapes import DTYPES, LLAMA, dtype_name
from .timing import Timing

OURS = "lowrank_kernels"
ALL = "all"
"""The contender in a row that stands for a whole case."""
DTYPE_NAMES = [dtype_name(dtype) for dtype in DTYPES.values()]
Row = dict[str, object]


def is_ours(row: Row) -> bool:
    """Whether the row is of this package, in one of its forms. The package's formulas in plain PyTorch count
    as a baseline."""
    return str(row["contender"]).startswith(OURS)


def suite_of(row: Row) -> str:
    return str(row["case"]).partition(" ")[0]


def is_measured(row: Row) -> bool:
    return not {"failure", "skipped"} & set(row)


def failed(rows: Iterable[Row]) -> list[Row]:
    """The rows of this package, or of whole cases, that ended neither in figures nor in a reason to skip
    them."""
    return [row for row in rows if "failure" in row and (is_ours(row) or row["contender"] == ALL)]


def timed_rows(
    label: str, dtype: torch.dtype, timings: Mapping[str, Timing], works: Mapping[str, Work], machine: Machine, **fields: object
) -> list[Row]:
    """One row for each contender. `works` holds the contenders whose work is known, `fields` what all rows
    carry."""
    baselines = {name: timing for name, timing in timings.items() if not is_ours({"contender": name})}
    strongest = min(baselines, key=lambda name: baselines[name].p50, default=None)
    rows = []
    for name, timing in timings.items():
        row: Row = {"case": label, **fields, "dtype": dtype_name(dtype), "contender": name}
        row |= {"p20_ms": timing.p20, "p50_ms": timing.p50, "p80_ms": timing.p80, "rounds": timing.rounds, "ratio_to_ours": timing.ratio}
        row |= {"launches": timing.launches} if timing.launches else {}
        if work := works.get(name):
            cost = total(work)
            row |= {"bytes_moved": cost.bytes_moved, "flops": cost.flops}
            row |= {"gb_per_s": cost.bytes_moved / timing.p50 / 1e6, "tflop_per_s": cost.flops / timing.p50 / 1e9}
            if predicted := machine.predicted_ms(work, dtype):
                row |= {"predicted_ms": predicted, "percent_of_ceiling": 100 * predicted / timing.p50}
        if strongest and is_ours(row):
            row |= {"strongest_baseline": strongest, "speedup": baselines[strongest].p50 / timing.p50}
        rows.append(row)
    return rows


TIMED = {
    "ms p20": ("p20_ms", ""),
    "p50": ("p50_ms", ""),
    "p80": ("p80_ms", ""),
    "× ours": ("ratio_to_ours", ".2f"),
    "predicted": ("predicted_ms", ""),
    "% of ceiling": ("percent_of_ceiling", ".0f"),
    "GB/s": ("gb_per_s", ".3g"),
    "TFLOP/s": ("tflop_per_s", ".3g"),
}
COUNTED = {
    "state MB": ("state_mb", ".2f"),
    "by the formula": ("theory_mb", ".2f"),
    "× ours": ("ratio_to_ours", ".2f"),
    "a step's peak MB": ("step_peak_mb", ".2f"),
}
ITERATION = {
    "forward ms": ("forward_ms", ""),
    "backward": ("backward_ms", ""),
    "step": ("step_ms", ""),
    "tokens/s": ("tokens_per_s", ".0f"),
    "MB saved": ("saved_mb", ".2f"),
    "formula": ("saved_theory_mb", ".2f"),
    "gradients": ("gradient_mb", ".2f"),
    " formula": ("gradient_theory_mb", ".2f"),
    "states": ("state_mb", ".2f"),
    "formula ": ("state_theory_mb", ".2f"),
    "peak": ("peak_mb", ".2f"),
}
EXCHANGE = {
    "MB sent a step": ("sent_mb", ".2f"),
    "with a refresh": ("refresh_sent_mb", ".2f"),
    "MB of gradients": ("gradient_mb", ".2f"),
    "ms p50": ("p50_ms", ""),
}
LARGEST = {"largest batch": ("largest_batch", "d"), "× ours": ("ratio_to_ours", ".2f"), "tokens/s": ("tokens_per_s", ".0f")}
"""Columns: the key of a row and how it is written, by default with three digits."""
NOTES = {
    "error": "error",
    "update_error": "error",
    "captured_energy": "energy",
    "defect": "defect",
    "peak_mb": "peak MB",
    "sketch_mb": "sketch MB",
}
"""peak MB: allocated in one refresh; sketch MB: (m + n)·l numbers in fp32."""


def print_rows(rows: list[Row]) -> None:
    kinds = (
        (TIMED, NOTES, "p50_ms"),
        (ITERATION, {}, "saved_mb"),
        (COUNTED, {}, "step_peak_mb"),
        (LARGEST, {}, "largest_batch"),
        (EXCHANGE, {}, "sent_mb"),
    )
    for columns, notes, key in kinds:
        lines = [
            (
                str(row["case"]),
                str(row["contender"]),
                *((format(row[name], form) if form else short(row[name])) if name in row else "" for name, form in columns.values()),
                *([_notes(row, notes)] if notes else ()),
            )
            for row in rows
            if key in row
        ]
        if lines:
            print_table(("case", "contender", *columns, *([""] if notes else ())), lines)
    if missing := [row for row in rows if not is_measured(row)]:
        reasons = Counter((str(row["contender"]), _reason(row)) for row in missing)
        lines = [(contender, f"{count} ×", reason) for (contender, reason), count in reasons.items()]
        print_table(("not measured", "cases", "why"), lines)


def _notes(row: Row, notes: Mapping[str, str]) -> str:
    shown = [f"{what} {row[name]:.3g}" for name, what in notes.items() if name in row]
    return ", ".join(shown + {"graph": ["in a graph"], "visible": ["with the host's launches"]}.get(str(row.get("launches")), []))


def _reason(row: Row) -> str:
    return f"FAILED in {row['case']}: {row['failure']}" if "failure" in row else str(row["skipped"])


def read(paths: Iterable[Path], measured: bool = True) -> list[Row]:
    """The rows of the files in order: rows with figures if `measured`, else rows with a reason. If a file has
    a row twice, only the last one counts."""
    found: list[Row] = []
    for path in paths:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        latest = {(row.get("device"), row["case"], row["contender"]): row | {"file": path.name} for row in rows if "case" in row}
        found += [row for row in latest.values() if is_measured(row) == measured]
    return found


def folders(results: Path = RESULTS) -> list[Path]:
    """One folder for each device."""
    return sorted(folder for folder in results.iterdir() if folder.is_dir() and any(folder.glob("*.jsonl"))) if results.exists() else []


def newest(folder: Path) -> dict[str, list[Row]]:
    """Rows by suite, each suite's from the file that measured it last. Runs with --quick do not count, nor do
    runs of code that is in no commit."""
    by_suite: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = [row for row in read([path]) if not row.get("quick") and not str(row["commit"]).endswith("-dirty")]
        for suite in {suite_of(row) for row in rows}:
            mine = [row for row in rows if suite_of(row) == suite]
            if suite not in by_suite or max(str(row["time"]) for row in mine) > max(str(row["time"]) for row in by_suite[suite]):
                by_suite[suite] = mine
    return by_suite


PRETTY = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "noise": "Gaussian noise", "1/i": "σᵢ ∝ 1/i"}


def title(row: Row) -> tuple[str, str, str]:
    """(what, rank, dtype or spectrum) of a row's case in words for people, from its label: ("LLaMA 60M",
    "128", "fp32")."""
    suite, *words = str(row["case"]).split()
    place = next((index for index, word in enumerate(words) if word.startswith("r=")), len(words))
    rank, rest = "".join(words[place : place + 1])[2:], words[place + 1 :]
    of_model = suite in ("step", "memory") or (suite == "refresh" and rest and rest[0] in DTYPE_NAMES)
    what = " ".join(map(_model if of_model else _word, words[:place]))
    return what, rank, " ".join(PRETTY.get(word, word) for word in rest)


def _model(name: str) -> str:
    return f"LLaMA {name.upper()}" if name in LLAMA else f"{name.replace('x', ' × ')}²"


def _word(word: str) -> str:
    name = word.rstrip(":")
    return _model(name) + word[len(name) :] if name in LLAMA else re.sub(r"(?<=\d)x(?=\d)", " × ", word)
