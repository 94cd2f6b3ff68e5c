"""Tile shapes: a table per architecture and kind of dot. No autotuning, because the kernels work in place.

None of the rows has been timed yet. Each row compiles clean for its architecture: no spill, shared memory
within the limit, tensor cores where there are any, 16-byte global accesses. tests/kernels/test_aot.py
enforces that.
"""

import itertools
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
    """A program owns ROWS x COLUMNS of M, V, R and N. It sees fp32 moments as one long row, and 8-bit moments
    in blocks of 64 columns."""

    ROWS: int
    COLUMNS: int
    num_warps: int
    enable_fp_fusion: bool = True


@dataclass(frozen=True)
class SinglePassConfig:
    """A program owns BLOCK_N columns of a matrix and up to BLOCK_R directions.

    It sums R over BLOCK_K rows of P and G' at a time. It advances the moments in SLICES parts of BLOCK_R /
    SLICES directions. Then it updates W', BLOCK_M rows at a time.
    """

    BLOCK_R: int
    SLICES: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_M: int
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True

    @property
    def rank_covered(self) -> int:
        return self.BLOCK_R

    def programs(self, n: int, count: int) -> int:
        """Programs of one launch for `count` matrices with n columns."""
        return triton.cdiv(n, self.BLOCK_N) * count


# Rows are sorted by the rank they cover. The last row serves every larger rank too, by looping or by more
# programs. Programs that share a strip of G run side by side, so a rank above BLOCK_R reads G again from L2.
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

# Keyed by kind of dot and by dtype of the moments, because decoding and encoding 8-bit moments takes
# registers. A row covers every rank up to its BLOCK_R. The last row covers the largest rank that fits on the
# chip. Every program reads P twice from L2. That is 4·r bytes a row, beside 6·BLOCK_N bytes of G and W in 16
# bits, so a wide BLOCK_N pays. The None rows serve only the interpreter.
SINGLE_PASS = {
    80: {
        ("16bit", "fp32"): (
            SinglePassConfig(64, 2, 128, 64, 64, 8, 3),
            SinglePassConfig(128, 4, 128, 64, 64, 8, 3),
            SinglePassConfig(256, 8, 64, 64, 64, 8, 3),
        ),
        ("tf32", "fp32"): (
            SinglePassConfig(32, 1, 64, 32, 64, 4, 3),
            SinglePassConfig(64, 2, 64, 32, 64, 4, 3),
            SinglePassConfig(128, 2, 64, 32, 64, 8, 3),
        ),
    },
    90: {
        ("16bit", "fp32"): (
            SinglePassConfig(32, 1, 64, 64, 64, 4, 3),
            SinglePassConfig(64, 2, 64, 64, 64, 4, 3),
            SinglePassConfig(128, 4, 128, 64, 64, 8, 3),
            SinglePassConfig(256, 16, 128, 32, 64, 8, 3),
            SinglePassConfig(512, 16, 64, 32, 64, 8, 2),
        ),
        ("16bit", "8-bit"): (
            SinglePassConfig(32, 1, 64, 64, 64, 4, 3),
            SinglePassConfig(64, 2, 64, 64, 64, 4, 3),
            SinglePassConfig(128, 4, 128, 64, 64, 8, 3),
            SinglePassConfig(256, 8, 64, 64, 64, 8, 3),
            SinglePassConfig(512, 16, 64, 32, 64, 8, 2),
        ),
        ("tf32", "fp32"): (
            SinglePassConfig(32, 1, 64, 32, 64, 4, 3),
            SinglePassConfig(64, 2, 64, 32, 64, 4, 3),
            SinglePassConfig(128, 4, 128, 32, 64, 8, 3),
        ),
    },
    100: {
        ("16bit", "fp32"): (
            SinglePassConfig(32, 1, 64, 64, 64, 4, 3),
            SinglePassConfig(64, 2, 128, 64, 64, 8, 3),
            SinglePassConfig(128, 4, 128, 64, 64, 8, 3),
            SinglePassConfig(256, 16, 128, 32, 64, 8, 3),
        ),
        ("16bit", "8-bit"): (
            SinglePassConfig(32, 1, 64, 64, 64, 4, 3),
            SinglePassConfig(64, 2, 128, 64, 64, 8, 3),
            SinglePassConfig(128, 4, 128, 64, 64, 8, 3),
            SinglePassConfig(256, 8, 64, 64, 64, 8, 3),
        ),
    },
    None: {
        ("16bit", "fp32"): (
            SinglePassConfig(16, 1, 64, 16, 16, 4, 2),
            SinglePassConfig(64, 2, 128, 32, 16, 4, 2),
            SinglePassConfig(128, 8, 64, 32, 32, 4, 2),
        ),
    },
}
SINGLE_PASS[80]["16bit", "8-bit"] = SINGLE_PASS[80]["16bit", "fp32"]
SINGLE_PASS[80]["tf32", "8-bit"] = SINGLE_PASS[80]["tf32", "fp32"]
SINGLE_PASS[90]["tf32", "8-bit"] = SINGLE_PASS[90]["tf32", "fp32"]
SINGLE_PASS[100]["tf32", "fp32"] = SINGLE_PASS[100]["tf32", "8-bit"] = SINGLE_PASS[90]["tf32", "fp32"]
SINGLE_PASS[None] = dict.fromkeys(itertools.product(("16bit", "ieee"), ("fp32", "8-bit")), SINGLE_PASS[None]["16bit", "fp32"])

MOMENTS = MomentsConfig(ROWS=1, COLUMNS=1024, num_warps=4)
MOMENTS_8BIT = MomentsConfig(ROWS=2, COLUMNS=256, num_warps=4)


def architecture(device: torch.device) -> int | str | None:
    """Triton's name of the device's architecture: 90 for sm_90, "gfx942"; None under the interpreter."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target().arch


def _first_that_covers(rows, rank: int):
    return next((row for row in rows if row.rank_covered >= rank), rows[-1])


def project_config(arch: int | str | None, kind: str, rank: int, wide: bool) -> ProjectConfig:
    """The row for a rank.

    Unknown architectures get small tiles (the None rows). So do shapes whose accesses are narrower than 16
    bytes, because the addresses and masks of a large tile would not fit the registers then.
    """
    return _first_that_covers(PROJECT.get(arch if wide else None, PROJECT[None])[kind], rank)


def back_project_config(arch: int | str | None, kind: str, rank: int, wide: bool) -> BackProjectConfig:
    """The row for a rank; as project_config."""
    return _first_that_covers(BACK_PROJECT.get(arch if wide else None, BACK_PROJECT[None])[kind], rank)


def single_pass_config(arch: int | str | None, kind: str, rank: int, wide: bool, eight_bit: bool) -> SinglePassConfig | None:
    """The first row that covers the rank. None leaves the bucket to two passes.

    The result is None for larger ranks, for fp32 dots without tf32, for unknown architectures, and on a GPU
    for shapes whose accesses are narrower than 16 bytes (see project_config).
    """
    if arch is not None and not wide:
        return None
    rows = SINGLE_PASS.get(arch, {}).get((kind, "8-bit" if eight_bit else "fp32"), ())
    return next((row for row in rows if row.rank_covered >= rank), None)
