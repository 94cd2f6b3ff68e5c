"""The registry: models as lists of (rows, columns), one entry for each projected weight; ranks; dtypes."""

from __future__ import annotations

from collections import Counter

import torch

LLAMA = {  # hidden, intermediate, layers: the configurations of the GaLore paper's LLaMA models, and LLaMA 13B
    "60m": (512, 1376, 8),
    "130m": (768, 2048, 12),
    "350m": (1024, 2736, 24),
    "1b": (2048, 5461, 24),
    "7b": (4096, 11008, 32),
    "13b": (5120, 13824, 40),
}
RANKS = (64, 128, 256, 512, 1024)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as results spell it: "float32"."""
    return str(dtype).removeprefix("torch.")


def model_shapes(name: str) -> list[tuple[int, int]]:
    """Projected weights of a LLaMA, or of "28x512": 28 square matrices of width 512."""
    if name in LLAMA:
        hidden, intermediate, layers = LLAMA[name]
        layer = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
        return layer * layers
    count, _, width = name.partition("x")
    if not (count.isdecimal() and width.isdecimal()):
        raise ValueError(f"unknown model {name!r}: it is one of {', '.join(LLAMA)}, or like 28x512 for 28 square matrices of width 512")
    return [(int(width), int(width))] * int(count)


def buckets(name: str) -> list[tuple[int, int, int]]:
    """(count, rows, columns) of each shape in a model."""
    return [(count, *shape) for shape, count in Counter(model_shapes(name)).items()]


def is_right(rows: int, columns: int) -> bool:
    """Whether the default rule projects the right side. It projects the shorter side, and the right side of a
    square matrix."""
    return rows >= columns


def elements(name: str) -> int:
    return sum(rows * columns for rows, columns in model_shapes(name))
