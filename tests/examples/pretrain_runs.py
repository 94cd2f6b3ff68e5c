"""What the tests of the example share: where it is, a run small enough for a test, and how to read what it
wrote."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain.py"
MICRO = [
    "--steps",
    "6",
    "--batch-size",
    "2",
    "--seq-len",
    "32",
    "--rank",
    "4",
    "--update-proj-gap",
    "2",
    "--rso-rank",
    "8",
    "--inner-steps",
    "2",
    "--eval-every",
    "3",
    "--eval-sequences",
    "4",
    "--threads",
    "1",
    "--device",
    "cpu",
]
PROSE = "".join(f"{n} bottles of beer on the wall, take one down, pass it around, {n - 1} left.\n" for n in range(400, 0, -1))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def arithmetic(found: list[dict]) -> list[dict]:
    """The rows without what a clock or the memory counter put there: what is left is bit-identical whenever
    the arithmetic is."""
    return [{key: value for key, value in row.items() if key not in ("optimizer_ms", "wall_s", "peak_bytes")} for row in found]


def trajectory(path: Path) -> list[dict]:
    return arithmetic(rows(path))
