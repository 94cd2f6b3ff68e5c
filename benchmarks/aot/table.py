"""The table of reports, as benchmarks/results/aot keeps it."""

from __future__ import annotations

import re
from collections import Counter

import torch
import triton

from .. import dry, sass
from .report import Report

HEADER = """\
row: in the order of configs.py; N: its dtype in memory, - where it stays on the chip; CTAs: programs that a multiprocessor has room for
spills: accesses to local memory outside of loops, and in them; waits: copies under way after a wait, a loop each, - where it waits for none
W loop: asynchronous 16-byte copies, 16-byte loads, barriers; global: accesses by their width
gfx942: registers and spills as the compiler states them"""
COLUMNS = (
    "kernel", "target", "side", "dtype", "kind", "row", "shape", "options", "N",
    "regs", "shared", "CTAs", "spills", "waits", "W loop", "instr", "tensor cores", "global",
)  # fmt: skip


def versions() -> str:
    """Triton up to 3.5 has one ptxas for all architectures."""
    tools = [name for name in ("ptxas", "ptxas-blackwell", "cuobjdump") if (dry.TOOLS / name).exists()]
    found = {name: re.search(r"V[\d.]+", dry.tool(name, "--version")).group() for name in tools}
    blackwell = f" (sm_100 and later {found['ptxas-blackwell']})" if "ptxas-blackwell" in found else ""
    return f"torch {torch.__version__}, triton {triton.__version__}, ptxas {found['ptxas']}{blackwell}, cuobjdump {found['cuobjdump']}"


def text(reports: list[Report]) -> str:
    return f"{versions()}\n{HEADER}\n{table(reports)}\n"


def table(reports: list[Report]) -> str:
    lines = [COLUMNS, *map(_line, reports)]
    width = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(size) for cell, size in zip(line, width, strict=True)).rstrip() for line in lines)


def _line(report: Report) -> tuple[str, ...]:
    widths = Counter()
    for name, count in report.global_accesses.items():
        widths[sass.access_bits(name) // 8] += count
    loop = report.w_loop
    cells = (
        report.kernel, report.target, report.side, report.dtype, report.kind, report.row, report.shape,
        "+".join(report.options), report.normalised, str(report.registers), f"{report.shared_bytes / 1024:.0f}K",
        str(report.programs or ""), f"{report.cold_spills} {report.hot_spills}",
        "/".join("-" if each.waits is None else str(each.waits) for each in report.loops),
        f"{loop.copies} {loop.loads} {loop.barriers}" if loop else "", str(report.instructions), " ".join(report.tensor_cores),
        " ".join(f"{bytes_}B x{count}" for bytes_, count in sorted(widths.items())),
    )  # fmt: skip
    return tuple(cell or "-" for cell in cells)
