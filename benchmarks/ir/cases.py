"""Which launches the lane executes: every row of builtin.py, found in its tables, on the smallest shapes that
reach every edge."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from benchmarks.aot import cases as aot
from lowrank_kernels.backends.triton import builtin, configs


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch. The shape is W' (m, n) and r, chosen so that the launcher takes the row `config` for it.

    A row for 16-byte accesses is only taken where the extents along memory are multiples of 16. Its ragged
    edges lie there on those, and anywhere on the others.
    options: a subset of those of benchmarks/aot/cases.py. normalised: dtype of N in memory, and of R for the
        launch that updates the moments alone.
    """

    kernel: str
    arch: int
    dtype: str
    kind: str
    config: configs.Config
    right: bool
    m: int
    n: int
    rank: int
    normalised: str = "-"
    options: tuple[str, ...] = ()

    def has(self, option: str) -> bool:
        return option in self.options

    @property
    def validated(self) -> bool:
        """On sm_90 and sm_100. Where a case can be rounded stochastically, that one is; its modules hold the
        other one's code, too."""
        either = self.kernel in ("single_pass", "back_project") and self.kind == "16bit"
        return self.arch in (90, 100) and (not either or self.has("stochastic"))

    @property
    def name(self) -> str:
        side = "-" if self.kernel in ("moments", "limiter") else "right" if self.right else "left"
        numbers = "/".join("-" if value is None else str(value) for value in vars(self.config).values())
        shape = f"{self.m}x{self.n}x{self.rank}"
        return f"{self.kernel} sm_{self.arch} {side} {self.dtype} {self.kind} {numbers} {shape} {'+'.join(self.options) or '-'}"


def cases() -> list[Case]:
    """Every row × side × what its kernel can do; what takes longest first."""
    return [
        *single_pass_cases(), *project_moments_cases(), *back_project_cases(), *project_cases(), *moments_cases(), *lifts_cases(),
    ]  # fmt: skip


def sample() -> list[Case]:
    """On sm_90 the smallest row of each kernel and kind of options, and on sm_100 one. Sides take turns. tf32
    dots come without options."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases():
        if case.arch == 90 and (case.kind in ("16bit", "elementwise") or (case.kind == "tf32" and not case.options)):
            groups.setdefault((case.kernel, case.kind, case.options), []).append(case)
    found = [min((case for case in cases() if (case.kernel, case.arch) == ("single_pass", 100)), key=lambda case: _size(case.config))]
    for group in groups.values():
        turn = [case for case in group if case.right == bool(len(found) % 2)] or group
        found.append(min(turn, key=lambda case: _size(case.config)))
    return found


def _size(config: configs.Config) -> int:
    return sum(value for value in vars(config).values() if isinstance(value, int))


def single_pass_cases() -> list[Case]:
    """{32, 8 bits} × {nearest, stochastic}; stochastic rounding, which is for bf16 alone, with the learning
    rate on the device. On sm_90 also with R from memory. On the right side n is ragged, on the left side it
    must be a multiple of 16."""
    found = []
    for row, right in _sides("single_pass"):
        if row.arch is None:
            continue  # the interpreter's
        config = row.config
        n = config.BLOCK_N + (5 if right else 16)
        stages = max(config.num_stages, config.W_STAGES or 0)
        m = max(config.BLOCK_K, config.BLOCK_M) * (stages + 1) + 16
        moments = ("8-bit",) if row.eight_bit else ()
        case = Case("single_pass", row.arch, row.dtype, row.kind, config, right, m, n, config.BLOCK_R - 3, "-", moments)
        everything = (*moments, *(["stochastic"] if row.kind == "16bit" else []), "lr on device")
        found.append(case)
        if row.kind == "16bit" or row.eight_bit:
            found.append(dataclasses.replace(case, options=everything))
        if row.arch == 90 and row.kind == "16bit":
            found.append(dataclasses.replace(case, options=(*everything, "R from memory")))
    return found


def project_moments_cases() -> list[Case]:
    """Both kinds of moments. The last row of a table serves larger ranks, too, by more programs."""
    found = []
    for row, right in _sides("project_moments"):
        config = row.config
        n = config.BLOCK_N + (5 if right or row.arch is None else 16)
        m = config.BLOCK_K * (config.num_stages + 1) + _ragged(row)
        rank = config.BLOCK_R + (3 if row.last else -3)
        for target, options in itertools.product(_targets(row, right), ((), ("8-bit",)) if row.eight_bit is None else _moments_of(row)):
            found.append(Case("project_moments", target, row.dtype, row.kind, config, right, m, n, rank, row.dtype, options))
    return found


def project_cases() -> list[Case]:
    """The last row of a table serves larger ranks, too, by more programs."""
    found = []
    for row, right in _sides("project"):
        config, ragged = row.config, _ragged(row)
        rank, n = config.BLOCK_R + (3 if row.last else -3), config.BLOCK_N + ragged
        m = config.BLOCK_K * (config.num_stages + 1) + ragged
        found += [Case("project", target, row.dtype, row.kind, config, right, m, n, rank) for target in _targets(row, right)]
    return found


def back_project_cases() -> list[Case]:
    """16 bits also with stochastic rounding and the learning rate on the device. The last row loops over
    r."""
    found = []
    for row, right in _sides("back_project"):
        config, ragged = row.config, _ragged(row)
        rank = config.BLOCK_K * (config.num_stages + 1) + 3 if row.last else config.BLOCK_K - 3
        m, n = config.BLOCK_M + ragged, config.BLOCK_N + ragged
        for target in _targets(row, right):
            case = Case("back_project", target, row.dtype, row.kind, config, right, m, n, rank, row.dtype)
            found.append(case)
            if row.kind == "16bit":
                found.append(dataclasses.replace(case, options=("stochastic", "lr on device")))
    return found


def moments_cases() -> list[Case]:
    """32 bits over one long row; 8 bits with a ragged row and a ragged block. R and N in fp32, and in
    bf16."""
    found = []
    for arch, (normalised, options) in itertools.product(aot.ARCHITECTURES, (("fp32", ()), ("bf16", ("R from memory",)))):
        case = Case("moments", arch, "fp32", "elementwise", builtin.MOMENTS, False, 48, 80, 48, normalised, options)
        rows, columns = 2 * builtin.MOMENTS_8BIT.ROWS - 1, builtin.MOMENTS_8BIT.COLUMNS + 80
        coded = dataclasses.replace(case, config=builtin.MOMENTS_8BIT, rank=rows, n=columns, options=("8-bit", *options))
        found += [case, coded]
    return found


def lifts_cases() -> list[Case]:
    """Fira's two launches by each of their rows; the limiter by columns and for a whole matrix; APOLLO's move
    of the weights."""
    found = []
    for row, right in _sides("residual"):
        config, ragged = row.config, _ragged(row)
        m, n, rank = config.BLOCK_M + ragged, config.BLOCK_N + ragged, config.BLOCK_K * (config.num_stages + 1) + 3
        for target in _targets(row, right):
            case = Case("residual", target, row.dtype, row.kind, config, right, m, n, rank, row.dtype)
            found += [case, dataclasses.replace(case, kernel="residual_norm")]
            if row.kind == "16bit":
                found.append(dataclasses.replace(case, options=("stochastic", "lr on device")))
    for arch in aot.ARCHITECTURES:
        limiter = Case("limiter", arch, "fp32", "elementwise", builtin.LIMITER, False, 48, builtin.LIMITER.BLOCK + 80, 48)
        found += [limiter, dataclasses.replace(limiter, options=("whole",))]
        for right in (False, True):
            shape = builtin.SCALING.ROWS + 5, builtin.SCALING.COLUMNS + 16
            m, n = reversed(shape) if right else shape
            case = Case("scaling", arch, "bf16", "elementwise", builtin.SCALING, right, m, n, 48)
            found += [case, dataclasses.replace(case, options=("stochastic", "lr on device"))]
    return found


def _sides(kernel: str) -> Iterator[tuple[aot.Row, bool]]:
    return itertools.product([row for row in aot.rows() if row.kernel == kernel], (False, True))


def _targets(row: aot.Row, right: bool) -> tuple[int, ...]:
    """The sides of a row for unknown architectures take turns."""
    if row.arch is not None:
        return (row.arch,)
    return aot.SMALL_TILE_TARGETS[right ^ (row.config.rank_covered == 64) :: 2]


def _moments_of(row: aot.Row) -> tuple[tuple[str, ...], ...]:
    return (("8-bit",),) if row.eight_bit else ((),)


def _ragged(row: aot.Row) -> int:
    """How far an extent along memory reaches over the edge of a tile."""
    return 16 if row.arch is not None else 1
