"""What is tried: keys in order of importance, shapes of the buckets that a key is measured on, and rows.

The candidates were chosen by what they compile to for sm_90. The built-in rows of every architecture are
tried as well. What does not fit a device is left out by its compiler.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch

from lowrank_kernels.backends.triton import builtin, choose, tuned
from lowrank_kernels.backends.triton.configs import BackProjectConfig, Config, ProjectMomentsConfig, SinglePassConfig, SplitConfig
from lowrank_kernels.backends.triton.tuned import Key

Choice = SinglePassConfig | SplitConfig
DTYPES = {"16bit": torch.bfloat16, "tf32": torch.float32}
"""What W, G and P are of, by kind of dot. fp16 has the rows of bf16."""
RANKS = (128, 256, 64, 512, 1024)

SINGLE_PASS = {
    "16bit": (
        SinglePassConfig(64, 2, 64, 64, 64, 4, 3),
        SinglePassConfig(64, 2, 64, 64, 64, 4, 4, W_STAGES=3),
        SinglePassConfig(64, 4, 128, 64, 64, 8, 3, W_STAGES=3, maxnreg=128),
        SinglePassConfig(128, 4, 128, 64, 64, 8, 3),
        SinglePassConfig(128, 4, 128, 64, 64, 8, 3, W_STAGES=3),
        SinglePassConfig(128, 4, 128, 64, 64, 8, 4, W_STAGES=4),
        SinglePassConfig(128, 4, 128, 64, 64, 16, 3, W_STAGES=3),
        SinglePassConfig(128, 8, 128, 64, 64, 8, 3, maxnreg=128),
        SinglePassConfig(128, 8, 64, 64, 64, 4, 3, W_STAGES=3),
        SinglePassConfig(128, 4, 64, 64, 64, 4, 3, W_STAGES=3),
        SinglePassConfig(128, 4, 128, 128, 64, 8, 2, W_STAGES=3),
        SinglePassConfig(256, 16, 128, 32, 64, 8, 3),
        SinglePassConfig(256, 16, 128, 32, 64, 8, 4, W_STAGES=3),
        SinglePassConfig(256, 8, 128, 32, 64, 16, 4),
        SinglePassConfig(256, 8, 128, 32, 64, 16, 4, W_STAGES=3),
        SinglePassConfig(256, 16, 128, 32, 64, 16, 4, W_STAGES=3),
        SinglePassConfig(256, 4, 128, 64, 64, 16, 2, W_STAGES=3),
        SinglePassConfig(512, 16, 64, 32, 64, 8, 2),
    ),
    "tf32": (),
}
PROJECT_MOMENTS = {
    "16bit": (
        ProjectMomentsConfig(64, 4, 128, 64, 4, 4),
        ProjectMomentsConfig(128, 8, 128, 64, 8, 3),
        ProjectMomentsConfig(256, 16, 128, 64, 8, 3),
        ProjectMomentsConfig(256, 16, 128, 64, 8, 4),
    ),
    "tf32": (),
}
BACK_PROJECT = {
    "16bit": (
        BackProjectConfig(64, 128, 64, 4, 3),
        BackProjectConfig(128, 128, 64, 8, 3),
        BackProjectConfig(128, 256, 64, 8, 3),
        BackProjectConfig(128, 128, 64, 8, 4),
    ),
    "tf32": (),
}
FEWEST = 2
"""Rows of each launch that `quick` leaves."""


@dataclass(frozen=True)
class Shape:
    """`count` matrices W' of (m, n)."""

    count: int
    m: int
    n: int

    def __str__(self) -> str:
        return f"{self.count} x {self.m} x {self.n}"


def keys(ranks: Sequence[int] = RANKS, quick: bool = False) -> list[Key]:
    """In order of importance. quick: one side of 16-bit steps with fp32 moments."""
    if quick:
        return [Key("16bit", "fp32", "right", rank, "many") for rank in ranks]
    groups = [("16bit", "fp32", "many"), ("16bit", "fp32", "few"), ("16bit", "8-bit", "many"), ("tf32", "fp32", "many")]
    groups += [("16bit", "8-bit", "few"), ("tf32", "fp32", "few")]
    found = itertools.product(groups, ranks, ("right", "left"))
    return [Key(kind, moments, side, rank, waves) for (kind, moments, waves), rank, side in found if waves == "many" or rank <= 256]


def shapes(key: Key, multiprocessors: int) -> list[Shape]:
    """Buckets as LLaMA 7B and 1B have them, or of more matrices where a device is so large that they would be
    few; for few waves as many matrices of 512² as fill the device twice with tiles of 64 columns."""
    if key.waves == "few":
        return [Shape(-(-2 * 64 * multiprocessors // 512), 512, 512)]
    many = Shape(32, 4096, 4096), Shape(12, 4096, 11008), Shape(48, 2048, 2048)
    return [Shape(max(each.count, -(-4 * multiprocessors // -(-each.n // 128))), each.m, each.n) for each in many]


def single_passes(key: Key, quick: bool = False) -> list[SinglePassConfig]:
    """Those whose tile is the smallest that covers the rank."""
    built_in = [row for rows in builtin.SINGLE_PASS.values() for row in rows.get((key.kind, key.moments), ())]
    return _few(quick, (row for row in (*SINGLE_PASS[key.kind], *built_in) if row.BLOCK_R == _block(key.rank)))


def splits(key: Key, quick: bool = False) -> list[SplitConfig]:
    """All pairs of rows. A first launch reads G again for every BLOCK_R directions, so short ones are left
    out for large ranks."""
    block = _block(key.rank)
    first = [row for row in _with_built_in(PROJECT_MOMENTS, builtin.PROJECT_MOMENTS, key) if min(128, block) <= row.BLOCK_R <= block]
    second = [row for row in _with_built_in(BACK_PROJECT, builtin.BACK_PROJECT, key) if row.BLOCK_K <= block]
    return [SplitConfig(*pair) for pair in itertools.product(_few(quick, first), _few(quick, second))]


def serving(key: Key, shape: Shape, arch: int, rows: Iterable[tuned.Row], multiprocessors: int) -> Choice:
    """What the library takes at present: a row of the table, else a built-in one."""
    if found := tuned.look_up(rows, key):
        return found.config
    row = choose.single_pass(arch, key.kind, key.rank, True, key.moments == "8-bit")
    if row is not None and row.programs(shape.n, shape.count) >= multiprocessors:
        return row
    return SplitConfig(choose.project_moments(arch, key.kind, key.rank, True), choose.back_project(arch, key.kind, key.rank, True))


def label(choice: Choice | Config) -> str:
    """single_pass 128/4/128/64/64/16/3 W_STAGES=3."""
    if isinstance(choice, SplitConfig):
        return f"split {_numbers(choice.project_moments)} + {_numbers(choice.back_project)}"
    names = {SinglePassConfig: "single_pass", ProjectMomentsConfig: "project_moments", BackProjectConfig: "back_project"}
    return f"{names[type(choice)]} {_numbers(choice)}"


def _numbers(config: Config) -> str:
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    optional = [f"{name}={values.pop(name)}" for name in ("W_STAGES", "maxnreg") if values.get(name) is not None]
    return " ".join(["/".join(str(value) for value in values.values() if value is not None), *optional])


def _block(rank: int) -> int:
    return max(64, 1 << (rank - 1).bit_length())


def _with_built_in(more: dict, table: dict, key: Key) -> list[Config]:
    return [*more[key.kind], *(row for kinds in table.values() for row in kinds[key.kind])]


def _few(quick: bool, rows: Iterable[Config]) -> list[Config]:
    found = list(dict.fromkeys(rows))
    return found[:FEWEST] if quick else found
