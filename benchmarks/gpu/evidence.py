"""Files that a run leaves: which there are, how long they may be, and the summary."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MACHINE, BENCHMARKS, TESTS, SANITIZER, FUZZ = "machine.txt", "benchmarks.txt", "tests.txt", "sanitizer.txt", "fuzz.txt"
ROWS, JUNIT, SUMMARY = "benchmarks.jsonl", "tests.xml", "summary.txt"
ALL_FILES = (MACHINE, BENCHMARKS, TESTS, SANITIZER, FUZZ, ROWS, JUNIT, SUMMARY)
MOST_FILES, MOST_BYTES = 8, 16 << 20
LINE = 160


class HasOutcome(Protocol):
    name: str
    state: str
    seconds: float
    headline: str


class Files:
    """<folder>/<date>-<commit>-<name>, so that runs stand beside each other."""

    def __init__(self, folder: Path, commit: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        self.folder, self.stem = folder, re.sub(r"[^A-Za-z0-9._-]+", "-", f"{today}-{commit}")
        for name in ALL_FILES:
            if name != ROWS:  # append-only
                self.path(name).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        return self.folder / f"{self.stem}-{name}"

    def trim(self) -> None:
        for name in ALL_FILES:
            if self.path(name).exists():
                trim(self.path(name), MOST_BYTES)

    def write_summary(self, outcomes: Sequence[HasOutcome]) -> None:
        self.path(SUMMARY).write_text(summary(outcomes) + "\n", encoding="utf-8")


def summary(outcomes: Sequence[HasOutcome]) -> str:
    lines = [("stage", "outcome", "s", "")]
    lines += [(each.name, each.state, f"{each.seconds:.0f}", each.headline) for each in outcomes]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    shown = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip() for line in lines]
    return "\n".join(line[: sum(widths) + LINE] for line in shown)


def trim(path: Path, most: int) -> None:
    """Keeps the head and the tail of what is longer, a half each, and says between them how much is gone."""
    size = path.stat().st_size
    if size <= most:
        return
    half = most // 2 - 100
    with path.open("rb") as file:
        head = file.read(half)
        file.seek(size - half)
        tail = file.read()
    path.write_bytes(head + f"\n\n[... {size - 2 * half} bytes are left out here ...]\n\n".encode() + tail)


def read_from(path: Path, begin: int) -> str:
    """The text from a place on; of much of it the end."""
    with path.open("rb") as file:
        file.seek(max(begin, path.stat().st_size - (1 << 20)))
        return file.read().decode(errors="replace")


def last_line(text: str) -> str:
    """… that is not a rule or a log's own heading; without the signs that pytest frames its last one with."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line) and not line.startswith("===== ")]
    return re.sub(r"^=+\s*|\s*=+$", "", lines[-1]) if lines else ""


def sanitizer_line(text: str) -> str:
    found = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", text, re.MULTILINE)
    return found[-1] if found else last_line(text)


class NewRows:
    """A headline of the results that were appended since the last one, or what was printed last where there
    are none."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, path.stat().st_size if path.exists() else 0

    def __call__(self, printed: str) -> str:
        if not self.path.exists():
            return last_line(printed)
        rows = [json.loads(line) for line in read_from(self.path, self.seen).splitlines() if line.startswith("{")]
        self.seen = self.path.stat().st_size
        return headline(rows) if rows else last_line(printed)


def headline(rows: list[dict]) -> str:
    """How many figures, what failed, and each time of ours against that of the strongest contender that is
    not."""
    measured = [row for row in rows if not {"failure", "skipped"} & set(row)]
    parts = [f"{len(measured)} figures"]
    if failures := [row for row in rows if "failure" in row]:
        parts.append(f"{len(failures)} FAILED, first {failures[0]['case']}: {failures[0]['contender']}: {failures[0]['failure']}")
    for row in measured:
        if row["contender"] == "lowrank_kernels" and "speedup" in row:
            parts.append(f"{row['case']} {row['p50_ms']:.3g} ms, {row['speedup']:.2f}× {row['strongest_baseline']}")
    return "; ".join(parts)


def commit() -> str:
    """As benchmarks/provenance.py has it, which needs torch."""
    run = dict(cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        return head + ("-dirty" if subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def gpu_name() -> str | None:
    """Of the first GPU, as results' folders are called; None without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
