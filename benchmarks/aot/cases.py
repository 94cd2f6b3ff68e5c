"""Which launches are compiled: every row of builtin.py on both sides, with the options of its kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from lowrank_kernels.backends.triton import builtin, configs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHITECTURES = (80, 90, 100)
"""Those that have rows of their own."""
SMALL_TILE_TARGETS = (80, 90, 100, 120)
"""Targets of the rows for unknown architectures and narrow accesses."""
AMD = "gfx942"
AHEAD = configs.SinglePassConfig(64, 4, 64, 64, 64, 4, 3)
"""A row with the next tile of W in registers, a candidate for tuning that no table has."""
SHAPES = {"wide": (4096, 4096), "narrow": (1001, 1001), "ragged": (2048, 5461)}
"""m and n. wide: every access may move 16 bytes. narrow: none may. ragged: on the right side W, G and P keep
their 16 bytes, and the moments have none."""
OPTIONS = ("8-bit", "stochastic", "lr on device", "R from memory", "R to memory", "squares of G", "whole")
"""The last three are of lifts: what Fira and APOLLO ask of the launch with the moments, and one ratio of
norms for a matrix."""


@dataclass(frozen=True)
class Case:
    """One launch to compile. `config` is the row that it is meant to reach; rank and kind are chosen so that
    it does.

    options: a subset of OPTIONS. normalised: the dtype in which N passes through memory, and that of R for
        the launch that updates the moments alone. given: no look-up gives the row; the launcher is handed it.
    """

    kernel: str
    arch: int | str
    dtype: str
    kind: str
    config: configs.Config
    rank: int
    right: bool = False
    shape: str = "wide"
    options: tuple[str, ...] = ()
    normalised: str = "-"
    given: bool = False

    def has(self, option: str) -> bool:
        return option in self.options

    @property
    def target(self) -> str:
        return f"sm_{self.arch}" if isinstance(self.arch, int) else self.arch

    @property
    def side(self) -> str:
        return "-" if self.kernel in ("moments", "limiter") else "right" if self.right else "left"

    @property
    def numbers(self) -> str:
        """The row in the order of configs.py; - where it leaves a choice out."""
        return "/".join("-" if value is None else str(value) for value in vars(self.config).values())

    @property
    def name(self) -> str:
        options = "+".join(self.options) or "-"
        return f"{self.kernel} {self.target} {self.side} {self.dtype} {self.kind} {self.numbers} {self.shape} {options} {self.normalised}"


@dataclass(frozen=True)
class Row:
    """A row with its place in the tables. arch: None for the rows of unknown architectures. last: it serves
    every larger rank, too. eight_bit: it stands in the table for 8-bit moments; None where that does not
    decide."""

    kernel: str
    arch: int | None
    kind: str
    config: configs.Config
    last: bool
    eight_bit: bool | None = None

    @property
    def dtype(self) -> str:
        return "bf16" if self.kind == "16bit" else "fp32"


def rows() -> Iterator[Row]:
    """All rows of the kernels with a dot."""
    for arch, kinds in builtin.SINGLE_PASS.items():
        for (kind, moments), found in kinds.items():
            for config in found:
                yield Row("single_pass", arch, kind, config, False, moments == "8-bit")
    tables = {
        "project_moments": builtin.PROJECT_MOMENTS, "back_project": builtin.BACK_PROJECT, "project": builtin.PROJECT,
        "residual": builtin.RESIDUAL,
    }  # fmt: skip
    for kernel, table in tables.items():
        for arch, kinds in table.items():
            for key, found in kinds.items():
                kind, moments = key if isinstance(key, tuple) else (key, None)
                for config in found:
                    yield Row(kernel, arch, kind, config, config is found[-1], None if moments is None else moments == "8-bit")


def cases() -> list[Case]:
    """What takes longest goes first."""
    return [*_single_pass(), *_project_moments(), *_back_project(), *_project(), *_moments(), *_lifts(), *_amd()]


def sample() -> list[Case]:
    """Of the cases for sm_90, and one for gfx942: one for each kernel and kind of dot, for narrow and ragged
    shapes, for 8-bit moments, for R from and to memory, and for sums of squares. Each is the case with the
    most options and the smallest tile. Sides take turns."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases():
        if case.arch == 90:
            key = (
                case.kernel,
                case.kind if case.shape == "wide" else case.shape,
                case.has("8-bit"),
                *(case.has(option) for option in OPTIONS[3:]),
            )
            groups.setdefault(key, []).append(case)
    found = []
    for group in groups.values():
        turn = [case for case in group if case.right == bool(len(found) % 2)] or group
        found.append(max(turn, key=lambda case: (len(case.options), case.normalised != "fp32", -case.rank)))
    return [*found, min(_amd(), key=lambda case: (case.kernel != "project_moments", case.rank))]


def _sides(found: Iterator[Row], kernel: str) -> Iterator[tuple[Row, bool]]:
    return itertools.product([row for row in found if row.kernel == kernel], (False, True))


def _targets(row: Row, right: bool) -> list[tuple[int, str]]:
    """(architecture, shape) of a row on a side. The rows for unknown architectures serve wide shapes where
    there are no others, and narrow ones everywhere; there the sides, which differ in strides alone, take
    turns."""
    if row.arch is not None:
        return [(row.arch, "wide")]
    wide = [(target, "wide") for target in SMALL_TILE_TARGETS if target not in ARCHITECTURES]
    return wide + [(target, "narrow") for index, target in enumerate(SMALL_TILE_TARGETS) if right == bool(index % 2)]


def _single_pass() -> list[Case]:
    """fp32 moments without options and with all others that the dtype has, 8-bit ones with all others. On
    sm_90 also R from memory, and the largest row of r = 128 with each option alone and in fp16."""
    found = []
    for row, right in _sides(rows(), "single_pass"):
        if row.arch is None:
            continue  # for the interpreter alone
        others = ("stochastic", "lr on device") if row.kind == "16bit" else ("lr on device",)
        case = Case("single_pass", row.arch, row.dtype, row.kind, row.config, row.config.rank_covered, right)
        if row.eight_bit:
            found.append(replace(case, options=("8-bit", *others)))
        else:
            found.append(case)
            found += [replace(case, options=others)] * (row.kind == "16bit")
        moments = ("8-bit",) if row.eight_bit else ()
        if right and row.kind == "16bit" and (row.arch == 90 or row.config.rank_covered == 128):
            found.append(replace(case, shape="ragged", options=(*moments, *others)))
        if row.arch == 90 and (row.kind == "16bit" or not right):
            found.append(replace(case, options=(*moments, *others, "R from memory")))
        if (row.arch, row.kind, row.eight_bit, right, row.config.rank_covered) == (90, "16bit", False, False, 128):
            found += [replace(case, options=(option,)) for option in others]
            found.append(replace(case, dtype="fp16"))
    found += [Case("single_pass", 90, "bf16", "16bit", AHEAD, AHEAD.rank_covered, right, given=True) for right in (False, True)]
    return list(dict.fromkeys(found))


def _project_moments() -> list[Case]:
    """Both kinds of moments. On the rows of sm_90 also N of fp16, and the ragged shape."""
    found = []
    for row, right in _sides(rows(), "project_moments"):
        for target, shape in _targets(row, right):
            rank = row.config.rank_covered - (shape == "narrow")
            case = Case("project_moments", target, row.dtype, row.kind, row.config, rank, right, shape, normalised=row.dtype)
            for options in [(), ("8-bit",)] if row.eight_bit is None else [("8-bit",) if row.eight_bit else ()]:
                found.append(replace(case, options=options))
                if row.arch == 90 and right and row.kind == "16bit":
                    found.append(replace(case, options=options, shape="ragged"))
    return found


def _back_project() -> list[Case]:
    """16 bits also with everything else."""
    found = []
    for row, right in _sides(rows(), "back_project"):
        for target, shape in _targets(row, right):
            rank = row.config.rank_covered - (shape == "narrow")
            case = Case("back_project", target, row.dtype, row.kind, row.config, rank, right, shape, normalised=row.dtype)
            found.append(case)
            if row.kind == "16bit":
                found.append(replace(case, options=("stochastic", "lr on device")))
            if (row.arch, row.kind) == (90, "16bit"):
                found.append(replace(case, dtype="fp16", normalised="fp16"))
    return found


def _project() -> list[Case]:
    found = []
    for row, right in _sides(rows(), "project"):
        for target, shape in _targets(row, right):
            rank = row.config.rank_covered - (shape == "narrow")
            case = Case("project", target, row.dtype, row.kind, row.config, rank, right, shape)
            found.append(case)
            if (row.arch, row.kind) == (90, "16bit"):
                found.append(replace(case, dtype="fp16"))
    return found


def _lifts() -> list[Case]:
    """Fira's two launches by each of their rows; the launch with the moments as Fira and APOLLO ask for it;
    the limiter; APOLLO's move of the weights."""
    found = []
    for row, right in _sides(rows(), "residual"):
        for target, shape in _targets(row, right):
            rank = row.config.rank_covered - (shape == "narrow")
            case = Case("residual", target, row.dtype, row.kind, row.config, rank, right, shape, normalised=row.dtype)
            found += [case, replace(case, kernel="residual_norm")]
            found += [replace(case, options=("stochastic", "lr on device"))] * (row.kind == "16bit")
    for row, right in _sides(rows(), "project_moments"):
        if row.arch is not None and row.kind == "16bit" and row.config.rank_covered == 128:
            case = Case("project_moments", row.arch, row.dtype, row.kind, row.config, 128, right, normalised=row.dtype)
            moments = ("8-bit",) if row.eight_bit else ()
            found += [replace(case, options=(*moments, "R to memory")), replace(case, options=(*moments, "squares of G"))]
    for target in ARCHITECTURES:
        limiter = Case("limiter", target, "fp32", "elementwise", builtin.LIMITER, 128)
        found += [limiter, replace(limiter, options=("whole",))]
        for right in (False, True):
            case = Case("scaling", target, "bf16", "elementwise", builtin.SCALING, 128, right)
            found += [case, replace(case, options=("stochastic", "lr on device"))]
    return found


def _moments(targets: tuple[int | str, ...] = ARCHITECTURES) -> list[Case]:
    """R and N in fp32, as a composed step has them, and in bf16."""
    found = []
    for target, normalised in itertools.product(targets, ("fp32", "bf16")):
        case = Case("moments", target, "fp32", "elementwise", builtin.MOMENTS, 128, normalised=normalised)
        coded = replace(case, config=builtin.MOMENTS_8BIT, options=("8-bit",))
        found += [case, coded, replace(coded, shape="narrow")]
    return found


def _amd() -> list[Case]:
    """Every kernel for gfx942, both sides, both kinds of moments, as the smallest and the largest row there
    have it. No look-up gives the single pass there; its row is only compiled."""
    found = []
    for row, right in itertools.product(rows(), (False, True)):
        if row.arch is not None or row.kind == "tf32":  # which AMD does not have
            continue
        if row.kernel == "single_pass" and (row.kind != "16bit" or row.config.rank_covered != 64):
            continue
        moments = ((), ("8-bit",)) if row.kernel == "project_moments" else (("8-bit",),) if row.eight_bit else ((),)
        normalised = "-" if row.kernel in ("single_pass", "project") else row.dtype
        given = row.kernel == "single_pass"
        case = Case(row.kernel, AMD, row.dtype, row.kind, row.config, row.config.rank_covered, right, normalised=normalised, given=given)
        found += [replace(case, options=options) for options in moments]
    return [*found, *_moments((AMD,))]
