"""python -m benchmarks compare A B: what changed from results file A to B, by case and contender.

A change is how much more B needs than A. For this package it is measured in speed relative to the baselines
that both files timed in the same rounds: the median over these baselines of their time over ours. A machine
that is slower today, or one baseline that jumps, then does not count. Without a baseline in common, and for
the baselines themselves, the figure is the median time. For memory it is the bytes.

The exit status is 1 if this package needs more than the threshold allows, or fails in B in what A measured.
If the files come from different machines, it only shows the differences, which are no regressions. Cases that
only one file has are listed and never fail.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .provenance import print_table, short
from .records import ALL, Row, failed, is_ours, read

Key = tuple[str, str]
BYTES = ("state_mb", "step_peak_mb", "saved_mb", "gradient_mb", "peak_mb")


@dataclass(frozen=True)
class Change:
    """`share`: B over A, less 1. `counts`: whether the threshold applies to it."""

    case: str
    contender: str
    figure: str
    before: float
    after: float
    share: float
    counts: bool


def by_key(rows: list[Row]) -> dict[Key, Row]:
    return {(str(row["case"]), str(row["contender"])): row for row in rows}


def changes(before: dict[Key, Row], after: dict[Key, Row]) -> Iterator[Change]:
    """One change for each figure of each row that both have, in A's order."""
    for key in before:
        if key not in after:
            continue
        old, new = before[key], after[key]
        for figure in BYTES:
            if old.get(figure) is not None and new.get(figure) is not None:
                yield Change(*key, figure, old[figure], new[figure], _share(old[figure], new[figure]), is_ours(old))
        if "p50_ms" not in old or "p50_ms" not in new:
            continue
        absolute = _share(old["p50_ms"], new["p50_ms"])
        relative = _against_baselines(key, before, after) if is_ours(old) else None
        figure = "ms" if relative is None else "ms, change to baselines"
        yield Change(*key, figure, old["p50_ms"], new["p50_ms"], absolute if relative is None else relative, is_ours(old))


def _against_baselines(key: Key, before: dict[Key, Row], after: dict[Key, Row]) -> float | None:
    """The median over common baselines of (ours / theirs in B) / (ours / theirs in A), less 1."""
    case, _ = key
    common = [other for other in before if other in after and other[0] == case and not is_ours(before[other])]
    ours = _relative(before[key]), _relative(after[key])
    found = [ours[1] / _relative(after[other]) / (ours[0] / _relative(before[other])) for other in common]
    return median(found) - 1 if found else None


def _relative(row: Row) -> float:
    """Time over the case's first contender, from the rounds in which both ran."""
    return float(row.get("ratio_to_ours") or row["p50_ms"])


def _share(before: float, after: float) -> float:
    return after / before - 1 if before else float(after > 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument("--threshold", type=float, default=0.1, help="share by which this package may need more (default 0.1)")
    settings = parser.parse_args(arguments)
    before, after = (by_key(read([path])) for path in (settings.before, settings.after))
    same_machine = _print_origins(before, after)
    found = list(changes(before, after))
    lines = []
    for change in found:
        worse = change.counts and change.share > settings.threshold
        verdict = "WORSE" if worse else "better" if change.counts and change.share < -settings.threshold else ""
        figures = (short(change.before), short(change.after), f"{100 * change.share:+.1f} %")
        lines.append((change.case, change.contender, change.figure, *figures, verdict))
    if lines:
        print_table(("case", "contender", "figure", "A", "B", "change", ""), lines)
    for name, here, there in (("A", before, after), ("B", after, before)):
        for case, contender in here:
            if (case, contender) not in there:
                print(f"only in {name}: {case}: {contender}")
    broken = [row for row in failed(read([settings.after], measured=False)) if any(_stands_for(row, key) for key in before)]
    for row in broken:
        print(f"failed in B: {row['case']}: {row['contender']}: {row['failure']}")
    worse = [change for change in found if change.counts and change.share > settings.threshold]
    if not found:
        print("nothing in common")
    elif not same_machine:
        print("not judged: the machines differ")
    else:
        print(f"{len(worse)} of {sum(change.counts for change in found)} figures of this package need over {settings.threshold:.0%} more")
    return 1 if broken or (worse and same_machine) else 0


def _stands_for(row: Row, key: Key) -> bool:
    return row["case"] == key[0] and row["contender"] in (key[1], ALL)


def _print_origins(before: dict[Key, Row], after: dict[Key, Row]) -> bool:
    """Prints what differs between the two runs. Returns True if both ran on the same machine."""
    rows = [next(iter(side.values()), {}) for side in (before, after)]
    for key in ("device", "commit", "torch", "python", "threads", "versions"):
        old, new = (row.get(key) for row in rows)
        if old != new and None not in (old, new):
            print(f"{'different machines' if key == 'device' else key}: {old} → {new}")
    return rows[0].get("device") == rows[1].get("device")
