"""A report as three tables."""

from __future__ import annotations

import dataclasses
import math

from ..tables import gib, table
from .rows import Bytes, Report

COLUMNS = tuple(field.name for field in dataclasses.fields(Bytes))


def text(report: Report) -> str:
    columns = [name for name in COLUMNS if getattr(report.bytes, name) or getattr(report.adamw, name)]
    names = list(dict.fromkeys(each.optimizer for each in report.parameters if each.optimizer is not None))
    title = f"{', '.join(names) or 'no optimizer'}: {report.elements:,} parameters"
    notes = []
    if report.is_estimated:
        notes.append("States are those to come: not every parameter has had its first step.")
    if report.unknown:
        notes.append(f"The states of {', '.join(report.unknown)} are known after its first step and are not counted.")
    if report.is_sharded:
        notes.append("Bytes are those of this process's parts.")
    return "\n\n".join(filter(None, (title, _groups(report, columns), _unprojected(report), _bytes(report, columns), "\n".join(notes))))


def _groups(report: Report, columns: list[str]) -> str:
    several = len({each.optimizer_index for each in report.groups}) > 1
    lines = [
        [
            f"{f'{each.optimizer_index}: ' if several else ''}{each.optimizer}, group {each.group}",
            f"{each.parameters}",
            _percent(each.share),
            each.side,
            _range(each.ranks),
            *_cells(each.bytes, columns),
            "the coming step" if each.next_refresh == 1 else f"in {each.next_refresh} steps",
            "-" if math.isnan(each.overlap) else f"{each.overlap:.3f}",
        ]
        for each in report.groups
    ]
    if not lines:
        return "Nothing is projected."
    return table(["projected", "parameters", "share", "side ", "rank", *columns, "next refresh", "overlap"], lines)


def _unprojected(report: Report) -> str:
    lines = [
        [
            each.reason,
            f"{each.parameters}",
            _percent(each.share),
            gib(each.bytes.weights),
            gib(each.bytes.states),
            f"{each.largest} {each.largest_shape}",
        ]
        for each in report.unprojected
    ]
    return table(["not projected", "parameters", "share", "weights", "states", "the largest "], lines) if lines else ""


def _bytes(report: Report, columns: list[str]) -> str:
    share = _percent(report.bytes.total / report.adamw.total) if report.adamw.total else "-"
    lines = [
        ["here", *_cells(report.bytes, columns), gib(report.bytes.total), share],
        ["AdamW, moments in fp32", *_cells(report.adamw, columns), gib(report.adamw.total), _percent(1.0)],
    ]
    return table(["bytes", *columns, "total", "of AdamW's"], lines)


def _cells(count: Bytes, columns: list[str]) -> list[str]:
    return [gib(getattr(count, name)) for name in columns]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(ranks: tuple[int, int]) -> str:
    return str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]} to {ranks[1]}"
