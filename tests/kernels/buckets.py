"""Buckets of random matrices in every memory layout that a launcher accepts, each in a frame of NaN.

The frame is what a missing mask would read or write: reading it makes a NaN of the result, writing it is what
`frames_intact` sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_kernels.backends.triton import choose
from lowrank_kernels.backends.triton.dots import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("rows", "columns", "strided")

# (m, n, r): a tile is 64 or less on either side, so these cross its edges, and a rank block is 32 or 64.
SHAPES = (
    (1, 70, 1),
    (70, 1, 1),
    (67, 130, 65),
    (130, 65, 33),
    (5, 200, 5),
    (200, 3, 3),
    (20, 30, 45),
    (48, 96, 16),
)


def framed(values: Tensor, layout: str = "rows", pad: int = 3) -> Tensor:
    """The values as a view into a larger buffer of NaN: row-major, column-major, or with no unit stride at
    all.

    pad: elements of the frame on each side. With a multiple of 16, extents that are multiples of 16 keep
        their 16-byte accesses.
    """
    rows, columns = values.shape
    if layout == "columns":
        return framed(values.T, "rows", pad).T
    step = 2 if layout == "strided" else 1
    buffer = torch.full((rows + 2 * pad, step * (columns + 2 * pad)), float("nan"), dtype=values.dtype, device=DEVICE)
    view = buffer[pad : pad + rows, step * pad : step * (pad + columns) : step]
    view.copy_(values)
    return view


def frames_intact(views: list[Tensor]) -> bool:
    """Nothing but NaN around the views."""
    return all(int((~view._base.isnan()).sum()) == int((~view.isnan()).sum()) for view in views)


def matrices(
    count: int, rows: int, columns: int, dtype: torch.dtype, layout: str = "rows", scale: float = 1.0, pad: int = 3
) -> list[Tensor]:
    return [framed((scale * torch.randn(rows, columns, dtype=torch.float64)).to(dtype), layout, pad) for _ in range(count)]


def stored(
    count: int, m: int, n: int, right: bool, dtype: torch.dtype, layout: str = "rows", scale: float = 1.0, pad: int = 3
) -> list[Tensor]:
    """Weights or gradients as stored: (m, n), (n, m) on the right side."""
    return matrices(count, *((n, m) if right else (m, n)), dtype, layout, scale, pad)


def orient(matrix: Tensor, right: bool) -> Tensor:
    """As stored → (m, n)."""
    return matrix.T if right else matrix


def guarded(values: Tensor, guard: int = 2048) -> Tensor:
    """The values, row-major, with more NaN before and after them than a tile overruns."""
    buffer = torch.full((values.numel() + 2 * guard,), float("nan"), dtype=values.dtype, device=DEVICE)
    view = buffer[guard : guard + values.numel()].view(values.shape)
    view.copy_(values)
    return view


def states(count: int, r: int, n: int, scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """exp_avgs and exp_avg_sqs, row-major, of the size that gradients of size `scale` would have given
    them."""
    exp_avgs = [guarded((scale * torch.randn(r, n, dtype=torch.float64)).float()) for _ in range(count)]
    exp_avg_sqs = [guarded((scale**2 * (0.1 + torch.rand(r, n, dtype=torch.float64))).float()) for _ in range(count)]
    return exp_avgs, exp_avg_sqs


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that compare by bit pattern, NaN and −0 included."""
    return [tensor.clone().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32) for tensor in tensors]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


OVER = {False: (3, 5, 7), True: (16, 16, 16)}
"""How far m, n and r reach over the edge of a tile, by whether the shape should allow 16-byte accesses; the
first is also the frame."""


def rows_of_this_machine(tables: dict) -> list[tuple[object, object, bool]]:
    """(kind, row, wide) of configs' tables: of all architectures in the interpreter, else of this GPU and of
    unknown ones.

    wide: whether shapes for the row should allow 16-byte accesses. A GPU's own rows serve no others; compiled
    for narrow accesses, their large tiles would take many seconds each.
    """
    archs = list(tables) if INTERPRETED else [choose.architecture(torch.device("cuda")), None]
    rows = {
        (kind, row, arch is not None and not INTERPRETED) for arch in archs for kind, rows in tables.get(arch, {}).items() for row in rows
    }
    return sorted(rows, key=str)


def tf32_unit(dtype: torch.dtype) -> float:
    """What rounding to tf32 adds where fp32 dots run in tf32."""
    return 2.0**-11 if dtype == torch.float32 and not INTERPRETED and torch.get_float32_matmul_precision() != "highest" else 0.0
