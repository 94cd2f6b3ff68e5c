"""Tile shapes: a table per architecture and kind of dot. No autotuning, because the kernels work in place.

Nothing here was timed yet. Each row compiles clean (no spill, shared memory within the limit, tensor cores where there are any,
16-byte global accesses) for its architecture, which tests/kernels/test_aot.py holds it to.
"""

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class ProjectConfig:
    """A program accumulates BLOCK_R x BLOCK_N of R over BLOCK_K rows of P and G' at a time."""

    BLOCK_R: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True

    @property
    def rank_covered(self) -> int:
        return self.BLOCK_R


@dataclass(frozen=True)
class BackProjectConfig:
    """A program owns BLOCK_M x BLOCK_N of W' and sums over BLOCK_K directions at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True

    @property
    def rank_covered(self) -> int:
        return self.BLOCK_K


@dataclass(frozen=True)
class MomentsConfig:
    """A program owns BLOCK consecutive elements of M, V, R and N."""

    BLOCK: int
    num_warps: int
    enable_fp_fusion: bool = True


# Rows rise in the rank they cover; the last one serves every larger rank by looping or by more programs. Programs that share a
# strip of G run side by side, so a rank above BLOCK_R re-reads it from L2.
PROJECT = {
    80: {
        "16bit": (
            ProjectConfig(32, 64, 64, 4, 3),
            ProjectConfig(64, 64, 64, 4, 3),
            ProjectConfig(128, 128, 64, 8, 3),
            ProjectConfig(256, 64, 64, 8, 3),
        ),
        "tf32": (ProjectConfig(32, 64, 32, 4, 3), ProjectConfig(64, 64, 32, 4, 3), ProjectConfig(128, 128, 32, 8, 3)),
        "ieee": (ProjectConfig(32, 64, 16, 4, 3), ProjectConfig(64, 64, 16, 4, 3), ProjectConfig(128, 64, 16, 8, 3)),
    },
    90: {
        "16bit": (
            ProjectConfig(32, 128, 64, 4, 4),
            ProjectConfig(64, 128, 64, 4, 4),
            ProjectConfig(128, 128, 64, 8, 3),
            ProjectConfig(256, 128, 64, 8, 3),
        ),
        "tf32": (ProjectConfig(32, 128, 32, 4, 3), ProjectConfig(64, 128, 32, 4, 3), ProjectConfig(128, 128, 32, 8, 3)),
        "ieee": (ProjectConfig(32, 64, 16, 4, 3), ProjectConfig(64, 64, 16, 8, 3), ProjectConfig(128, 64, 16, 8, 3)),
    },
    None: {
        "16bit": (ProjectConfig(32, 64, 32, 4, 2), ProjectConfig(64, 64, 32, 4, 2)),
        "tf32": (ProjectConfig(32, 64, 32, 4, 2), ProjectConfig(64, 64, 32, 4, 2)),
        "ieee": (ProjectConfig(32, 64, 16, 4, 2), ProjectConfig(64, 64, 16, 8, 2)),
    },
}
PROJECT[100] = PROJECT[90]

BACK_PROJECT = {
    80: {
        "16bit": (BackProjectConfig(128, 128, 32, 8, 3), BackProjectConfig(128, 128, 64, 8, 3)),
        "tf32": (BackProjectConfig(128, 128, 32, 8, 2),),
        "ieee": (BackProjectConfig(64, 64, 16, 4, 2),),
    },
    90: {
        "16bit": (BackProjectConfig(128, 128, 32, 8, 3), BackProjectConfig(128, 128, 64, 8, 3)),
        "tf32": (BackProjectConfig(128, 128, 32, 8, 3),),
        "ieee": (BackProjectConfig(64, 64, 16, 4, 2),),
    },
    None: {
        "16bit": (BackProjectConfig(64, 64, 32, 4, 2),),
        "tf32": (BackProjectConfig(64, 64, 32, 4, 2),),
        "ieee": (BackProjectConfig(64, 64, 16, 4, 2),),
    },
}
BACK_PROJECT[100] = BACK_PROJECT[90]

MOMENTS = MomentsConfig(BLOCK=1024, num_warps=4)


def architecture(device: torch.device) -> int | str | None:
    """Triton's name of the device's architecture: 90 for sm_90, "gfx942"; None under the interpreter."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target().arch


def _first_that_covers(rows, rank: int):
    return next((row for row in rows if row.rank_covered >= rank), rows[-1])


def project_config(arch: int | str | None, kind: str, rank: int, wide: bool) -> ProjectConfig:
    """The row for a rank. Small tiles (the None rows) serve unknown architectures, and shapes whose accesses are narrower than 16
    bytes: the addresses and masks of a large tile would not fit the registers then.
    """
    return _first_that_covers(PROJECT.get(arch if wide else None, PROJECT[None])[kind], rank)


def back_project_config(arch: int | str | None, kind: str, rank: int, wide: bool) -> BackProjectConfig:
    """As project_config."""
    return _first_that_covers(BACK_PROJECT.get(arch if wide else None, BACK_PROJECT[None])[kind], rank)
