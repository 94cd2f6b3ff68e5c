"""Tables as text: by rich where it is installed, in plain columns elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence

WIDTH = 160
"""The most columns of a table that rich lays out."""


def table(header: Sequence[str], lines: Sequence[Sequence[str]], ends: bool = False) -> str:
    """The lines as a table. The first column is aligned to the left, and the others, which are numbers, to
    the right; one whose header ends in a space is of words, and aligned to the left too. ends: whether the
    last line is a total, and set apart."""
    try:
        return _by_rich(header, lines, ends)
    except ImportError:
        return _plain(header, lines, ends)


def _by_rich(header: Sequence[str], lines: Sequence[Sequence[str]], ends: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, left in zip(header, _left(header), strict=True):
        found.add_column(Text(name.rstrip()), justify="left" if left else "right", overflow="fold")
    for index, line in enumerate(lines):
        found.add_row(*map(Text, line), end_section=ends and index == len(lines) - 2)
    text = io.StringIO()
    Console(file=text, width=WIDTH, force_terminal=False).print(found)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())


def _plain(header: Sequence[str], lines: Sequence[Sequence[str]], ends: bool) -> str:
    rows = [[name.rstrip() for name in header], *map(list, lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    left = _left(header)

    def text(row: Sequence[str]) -> str:
        cells = (cell.ljust(width) if first else cell.rjust(width) for cell, width, first in zip(row, widths, left, strict=True))
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    found = [text(rows[0]), rule, *map(text, rows[1:])]
    if ends and len(lines) > 1:
        found.insert(len(found) - 1, rule)
    return "\n".join(found)


def _left(header: Sequence[str]) -> list[bool]:
    return [index == 0 or name.endswith(" ") for index, name in enumerate(header)]


def gib(count: float) -> str:
    """Bytes in GiB (2³⁰), MiB or KiB, with three digits: "13.5 GiB", "0" for none."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{short(count / size)} {unit}"
    return f"{count:.0f} B" if count else "0"


def short(value: float) -> str:
    """The value with three digits."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
