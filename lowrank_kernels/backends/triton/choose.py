"""Which row serves a launch. Nothing is tuned within a step, because the kernels work in place."""

from __future__ import annotations

import torch
import triton

from . import builtin
from .configs import BackProjectConfig, MomentsConfig, ProjectConfig, ProjectMomentsConfig, ScalingConfig, SinglePassConfig


def architecture(device: torch.device) -> int | str | None:
    """Triton's name of the device's architecture: 90 for sm_90, "gfx942"; None under the interpreter."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target().arch


def _first_that_covers(rows, rank: int):
    return next((row for row in rows if row.rank_covered >= rank), rows[-1])


def project(arch: int | str | None, kind: str, rank: int, wide: bool) -> ProjectConfig:
    """The row for a rank.

    Unknown architectures get small tiles (the None rows). So do shapes whose accesses are narrower than 16
    bytes, because the addresses and masks of a large tile would not fit the registers then.
    """
    return _first_that_covers(_of(builtin.PROJECT, arch, wide)[kind], rank)


def project_moments(arch: int | str | None, kind: str, rank: int, wide: bool) -> ProjectMomentsConfig:
    """The row for a rank; as project."""
    return _first_that_covers(_of(builtin.PROJECT_MOMENTS, arch, wide)[kind], rank)


def back_project(arch: int | str | None, kind: str, rank: int, wide: bool) -> BackProjectConfig:
    """The row for a rank; as project."""
    return _first_that_covers(_of(builtin.BACK_PROJECT, arch, wide)[kind], rank)


def single_pass(arch: int | str | None, kind: str, rank: int, wide: bool, eight_bit: bool) -> SinglePassConfig | None:
    """The first row that covers the rank. None leaves the bucket to the split.

    The result is None for larger ranks, for fp32 dots without tf32, for unknown architectures, and on a GPU
    for shapes whose accesses are narrower than 16 bytes (see project).
    """
    if arch is not None and not wide:
        return None
    table = builtin.SINGLE_PASS.get(arch, {}).get((kind, "8-bit" if eight_bit else "fp32"), ())
    return next((row for row in table if row.rank_covered >= rank), None)


def residual(arch: int | str | None, kind: str, rank: int, wide: bool) -> BackProjectConfig:
    """The row for a rank; as project."""
    return _first_that_covers(_of(builtin.RESIDUAL, arch, wide)[kind], rank)


def scaling() -> ScalingConfig:
    return builtin.SCALING


def moments(eight_bit: bool) -> MomentsConfig:
    return builtin.MOMENTS_8BIT if eight_bit else builtin.MOMENTS


def _of(table: dict, arch: int | str | None, wide: bool) -> dict:
    return table.get(arch if wide else None, table[None])
