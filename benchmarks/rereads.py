"""The rate at which an L2 cache gives one small matrix to all programs, each of which reads the whole of it:
what the kernels of a step do with P."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
MATRIX_BYTES = 2 << 20
"""P of (4096, 256) in 16 bits."""
PROGRAMS = 16
"""Programs for each multiprocessor."""


@triton.jit
def _reread_kernel(matrix, blocks, found, BLOCK: tl.constexpr):
    """Loads bypass L1, as the asynchronous copies of the step's kernels do. The sum of bits keeps them from
    being dropped."""
    offs = tl.arange(0, BLOCK)
    seen = tl.zeros((BLOCK,), dtype=tl.int32)
    for _ in range(blocks):
        seen ^= tl.load(matrix + offs, cache_modifier=".cg")
        matrix += BLOCK
    tl.atomic_xor(found, tl.xor_sum(seen, 0))


def launch(matrix: Tensor, programs: int, found: Tensor) -> None:
    """matrix: int32, a multiple of BLOCK elements. found: one int32."""
    _reread_kernel[(programs,)](matrix, matrix.numel() // BLOCK, found, BLOCK, num_warps=WARPS, enable_fp_fusion=True)


def gb_per_s(seconds: float) -> float:
    """On the current GPU."""
    from .timing import interleave

    matrix = torch.randint(0, 1 << 30, (MATRIX_BYTES // 4,), dtype=torch.int32, device="cuda")
    found = torch.zeros(1, dtype=torch.int32, device="cuda")
    programs = PROGRAMS * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    timing = interleave({"rereads": lambda: launch(matrix, programs, found)}, True, seconds, device_only=True)["rereads"]
    return programs * matrix.nbytes / timing.p50 / 1e6
