"""The registry of parameter lists and cases. A model is a list of (rows, columns), one entry for each projected weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LLAMA = {  # hidden, intermediate, layers: the configurations of the GaLore paper's LLaMA models
    "60m": (512, 1376, 8),
    "130m": (768, 2048, 12),
    "350m": (1024, 2736, 24),
    "1b": (2048, 5461, 24),
    "7b": (4096, 11008, 32),
}


def model_shapes(name: str) -> list[tuple[int, int]]:
    """Projected weights of a LLaMA, or of "28x512": 28 square matrices of width 512."""
    if name == "28x512":
        return [(512, 512)] * 28
    hidden, intermediate, layers = LLAMA[name]
    layer = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return layer * layers


@dataclass(frozen=True)
class StepCase:
    """One optimizer step over a whole model's projected weights, between refreshes."""

    model: str
    rank: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"step {self.model} r={self.rank} {str(self.dtype).removeprefix('torch.')}"

    def bytes_moved(self) -> int:
        """Fewest bytes a low-rank step moves: G read, W read and written, M and V read and written in fp32, P read once."""
        itemsize = self.dtype.itemsize
        total = 0
        for shape in model_shapes(self.model):
            m, n = sorted(shape)
            rank = min(self.rank, m)
            total += 3 * m * n * itemsize + 16 * rank * n + m * rank * itemsize
        return total

    def flops(self) -> int:
        """Two products: 4·m·n·r."""
        return sum(4 * rows * columns * min(self.rank, rows, columns) for rows, columns in model_shapes(self.model))


@dataclass(frozen=True)
class RefreshCase:
    """A new basis for one gradient."""

    rows: int
    columns: int
    rank: int

    @property
    def label(self) -> str:
        return f"refresh {self.rows}x{self.columns} r={self.rank}"


def cases(on_gpu: bool, quick: bool) -> list[StepCase | RefreshCase]:
    half, single = torch.bfloat16, torch.float32
    if on_gpu:
        models = ("60m", "350m") if quick else ("60m", "130m", "350m", "1b", "7b")
        steps = [StepCase(model, rank, half) for model in models for rank in (128, 256)]
        return [*steps, StepCase("350m", 256, single), RefreshCase(1024, 2736, 256), RefreshCase(4096, 11008, 128)]
    models = ("28x512",) if quick else ("28x512", "60m", "130m")
    steps = [StepCase(model, 128, dtype) for model in models for dtype in (single, half)]
    refreshes = [RefreshCase(512, 1376, 128)] if quick else [RefreshCase(512, 1376, 128), RefreshCase(1024, 2736, 256)]
    return [*steps, *refreshes]
