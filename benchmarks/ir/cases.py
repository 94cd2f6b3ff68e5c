"""Which launches the lane executes: every row of configs.py, found in its tables, on the smallest shapes that
reach every edge."""

from __future__ import annotations

import dataclasses
import itertools

from benchmarks.aot import SMALL_TILE_TARGETS, TABLES
from lowrank_kernels.backends.triton import configs


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch. The shape is W' (m, n) and r, chosen so that the launcher takes the row `config` for it.

    A row for wide accesses is only taken where every extent is a multiple of 16, so its ragged edges lie
    there; others have odd extents.
    options: "8-bit" moments, "stochastic" rounding, counts and learning rate "on device". normalised: dtype
        of N in memory.
    """

    kernel: str
    arch: int
    dtype: str
    kind: str
    config: object
    right: bool
    m: int
    n: int
    rank: int
    normalised: str = "fp32"
    options: tuple[str, ...] = ()

    @property
    def validated(self) -> bool:
        """On sm_90 and sm_100. Where a case can be rounded stochastically, that one is; its modules hold the
        other one's code, too."""
        either = self.kernel in ("single_pass", "back_project") and self.kind == "16bit"
        return self.arch in (90, 100) and (not either or "stochastic" in self.options)

    @property
    def name(self) -> str:
        side = "-" if self.kernel == "moments" else "right" if self.right else "left"
        numbers = "/".join(str(value) for name, value in vars(self.config).items() if name != "enable_fp_fusion")
        shape = f"{self.m}x{self.n}x{self.rank}"
        return f"{self.kernel} sm_{self.arch} {side} {self.dtype} {self.kind} {numbers} {shape} {'+'.join(self.options) or '-'}"


def cases() -> list[Case]:
    """Every row × side × what its kernel can do; what takes longest first."""
    return [*single_pass_cases(), *back_project_cases(), *project_cases(), *moments_cases()]


def sample() -> list[Case]:
    """On sm_90 the smallest row of each kernel and kind of options, and on sm_100 one."""
    found = {}
    for case in cases():
        if case.arch == 90 and case.kind != "ieee":
            key = case.kernel, case.kind, case.options
            if key not in found or _size(case.config) < _size(found[key].config):
                found[key] = case
    smallest = min((case for case in cases() if (case.kernel, case.arch) == ("single_pass", 100)), key=lambda case: _size(case.config))
    return [smallest, *found.values()]


def _size(config) -> int:
    return sum(value for value in vars(config).values() if isinstance(value, int))


def single_pass_cases() -> list[Case]:
    """{32, 8 bits} × {nearest, stochastic}; stochastic rounding, which is for bf16 alone, with counts and
    learning rate on the device."""
    found = []
    for arch, kinds in configs.SINGLE_PASS.items():
        for (kind, moments), rows in kinds.items() if arch else ():  # the None rows serve the interpreter alone
            coded = ("8-bit",) if moments == "8-bit" else ()
            for row, right in itertools.product(rows, (False, True)):
                rank, n = row.BLOCK_R - 16, row.BLOCK_N + 16
                m = max(row.BLOCK_K * (row.num_stages + 1), 2 * row.BLOCK_M) + 16
                case = Case("single_pass", arch, _dtype(kind), kind, row, right, m, n, rank, "-", coded)
                if kind == "16bit":
                    found += [case, dataclasses.replace(case, options=(*coded, "stochastic", "on device"))]
                else:
                    found.append(dataclasses.replace(case, options=(*coded, "on device")) if coded else case)
    return found


def project_cases() -> list[Case]:
    """The last row of a table serves larger ranks, too, by more programs."""
    found = []
    for arch, kind, row, last, right in _rows("project"):
        ragged = 16 if arch is not None else 1
        rank, n = row.BLOCK_R + (ragged if last else -ragged), row.BLOCK_N + ragged
        m = row.BLOCK_K * (row.num_stages + 1) + ragged
        found += [Case("project", target, _dtype(kind), kind, row, right, m, n, rank, "-") for target in _targets(arch)]
    return found


def back_project_cases() -> list[Case]:
    """N as the bases have it and in fp32; stochastic rounding with counts and learning rate on the device.
    The last row loops over r."""
    found = []
    for arch, kind, row, last, right in _rows("back_project"):
        ragged = 16 if arch is not None else 1
        rank = row.BLOCK_K * (row.num_stages + 1) + ragged if last else row.BLOCK_K - ragged
        m, n, dtype = row.BLOCK_M + ragged, row.BLOCK_N + ragged, _dtype(kind)
        for target in _targets(arch):
            case = Case("back_project", target, dtype, kind, row, right, m, n, rank, dtype)
            found.append(case)
            if kind == "16bit":
                found.append(dataclasses.replace(case, normalised="fp32", options=("stochastic", "on device")))
    return found


def moments_cases() -> list[Case]:
    """32 bits over one long row; 8 bits with a ragged row and a ragged block. N in fp32, and in bf16 with
    counts on the device."""
    found = []
    for arch in configs.PROJECT:
        for normalised, options in (("fp32", ()), ("bf16", ("on device",))) if arch else ():
            case = Case("moments", arch, "fp32", "elementwise", configs.MOMENTS, False, 0, 80, 48, normalised, options)
            rows, columns = 2 * configs.MOMENTS_8BIT.ROWS - 1, configs.MOMENTS_8BIT.COLUMNS + 80
            coded = dataclasses.replace(case, config=configs.MOMENTS_8BIT, rank=rows, n=columns, options=("8-bit", *options))
            found += [case, coded]
    return found


def _rows(kernel: str):
    """(architecture or None, kind, row, whether it is the last of its table, side)."""
    for arch, kinds in TABLES[kernel].items():
        for kind, rows in kinds.items():
            for row, right in itertools.product(rows, (False, True)):
                yield arch, kind, row, row is rows[-1], right


def _targets(arch: int | None) -> tuple[int, ...]:
    return SMALL_TILE_TARGETS if arch is None else (arch,)


def _dtype(kind: str) -> str:
    return "bf16" if kind == "16bit" else "fp32"
