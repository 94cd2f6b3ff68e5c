"""Which row serves a launch: one that was measured on a device of this name (tuned.py), or a built-in one.
Nothing is tuned within a step, because the kernels work in place."""

from __future__ import annotations

import functools

import torch
import triton

from ..bucket import Bucket
from . import builtin, table, tuned
from .configs import (
    BackProjectConfig,
    LimiterConfig,
    MomentsConfig,
    ProjectConfig,
    ProjectMomentsConfig,
    ScalingConfig,
    SinglePassConfig,
    SplitConfig,
)
from .dots import dot_of


def architecture(device: torch.device) -> int | str | None:
    """Triton's name of the device's architecture: 90 for sm_90, "gfx942"; None under the interpreter."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target().arch


@functools.cache
def device_name(device: torch.device) -> str | None:
    """The name by which a GPU's table is called; None for other devices, which have no table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def measured(bucket: Bucket, aligned: bool) -> SinglePassConfig | SplitConfig | None:
    """The row that was measured for buckets like this one. None leaves the bucket to the built-in rows.

    Measured are steps that compute R from G, on W, G and P of one dtype, with accesses of 16 bytes, and with
    enough programs to fill the device.
    """
    weight, basis = bucket.weights[0], bucket.bases[0]
    device = basis.device
    name = device_name(device)
    if name is None or not tuned.rows_of(name) or bucket.grads is None or not weight.dtype == basis.dtype == bucket.grads[0].dtype:
        return None
    if not (aligned and table.wide(weight, basis, bucket.grads[0])):
        return None
    kind = dot_of(basis.dtype, basis.dtype, architecture(device)).kind
    moments, side = "8-bit" if "exp_avg_scale" in bucket.states else "fp32", "right" if bucket.right else "left"
    _, n, rank = bucket.extents
    row = _measured(name, kind, moments, side, rank, tuned.waves(n, len(bucket), multiprocessors(device)))
    return None if isinstance(row, SplitConfig) and n % 16 else row  # N is row-major, (r, n)


@functools.cache
def _measured(name: str, kind: str, moments: str, side: str, rank: int, waves: str | None) -> SinglePassConfig | SplitConfig | None:
    if waves is None:
        return None
    row = tuned.look_up(tuned.rows_of(name), tuned.Key(kind, moments, side, rank, waves))
    return row and row.config


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


def limiter() -> LimiterConfig:
    return builtin.LIMITER


def moments(eight_bit: bool) -> MomentsConfig:
    return builtin.MOMENTS_8BIT if eight_bit else builtin.MOMENTS


def _of(table: dict, arch: int | str | None, wide: bool) -> dict:
    return table.get(arch if wide else None, table[None])
