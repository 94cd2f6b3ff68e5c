"""Shapes of tiles: what a row of the tables says. builtin.py holds the rows, and choose.py takes one for a
launch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import triton


@dataclass(frozen=True)
class Config:
    """A row: the constexprs and options of a launch, by the names under which Triton takes them."""

    def launch_options(self) -> dict[str, Any]:
        """All of them, but for a limit on registers that is not set, which only NVIDIA's compiler knows.
        Products and sums are fused, whatever a version of Triton does by default."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if name != "maxnreg" or value is not None} | {"enable_fp_fusion": True}


@dataclass(frozen=True)
class ProjectConfig(Config):
    """A program accumulates BLOCK_R x BLOCK_N of R over BLOCK_K rows of P and G' at a time."""

    BLOCK_R: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    @property
    def rank_covered(self) -> int:
        return self.BLOCK_R


@dataclass(frozen=True)
class ProjectMomentsConfig(Config):
    """As ProjectConfig. The program then advances the moments of its tile in SLICES parts, each of BLOCK_R /
    SLICES directions."""

    BLOCK_R: int
    SLICES: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def rank_covered(self) -> int:
        return self.BLOCK_R


@dataclass(frozen=True)
class BackProjectConfig(Config):
    """A program owns BLOCK_M x BLOCK_N of W' and sums over BLOCK_K directions at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    @property
    def rank_covered(self) -> int:
        return self.BLOCK_K


@dataclass(frozen=True)
class MomentsConfig(Config):
    """A program owns ROWS x COLUMNS of M, V, R and N. It sees fp32 moments as one long row, and 8-bit moments
    in blocks of 64 columns."""

    ROWS: int
    COLUMNS: int
    num_warps: int


@dataclass(frozen=True)
class ScalingConfig(Config):
    """A program owns ROWS x COLUMNS of W as it is stored."""

    ROWS: int
    COLUMNS: int
    num_warps: int


@dataclass(frozen=True)
class SinglePassConfig(Config):
    """A program owns BLOCK_N columns of a matrix and up to BLOCK_R directions.

    It sums R over BLOCK_K rows of P and G' at a time, in a pipeline of num_stages. It advances the moments in
    SLICES parts of BLOCK_R / SLICES directions. Then it updates W', BLOCK_M rows at a time, in a pipeline of
    W_STAGES; None: one tile of W ahead in registers, P in num_stages. maxnreg: the most registers a thread
    gets, so that two programs share a multiprocessor.
    """

    BLOCK_R: int
    SLICES: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_M: int
    num_warps: int
    num_stages: int
    W_STAGES: int | None = None
    maxnreg: int | None = None

    @property
    def rank_covered(self) -> int:
        return self.BLOCK_R

    def programs(self, n: int, count: int) -> int:
        """Programs of one launch for `count` matrices with n columns."""
        return triton.cdiv(n, self.BLOCK_N) * count


@dataclass(frozen=True)
class SplitConfig:
    """A row for each launch of the split. Both serve every rank."""

    project_moments: ProjectMomentsConfig
    back_project: BackProjectConfig
