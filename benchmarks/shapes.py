"""The registry of parameter lists and cases. A model is a list of (rows, columns), one entry for each projected weight."""

from __future__ import annotations

from collections import Counter
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
    if "x" in name:
        count, width = map(int, name.split("x"))
        return [(width, width)] * count
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


OVERSAMPLE, POWER_ITERS = 8, 1
"""What the refresh suite asks every randomized method for, and what its floating-point operations are counted with."""
CHUNK_BYTES = 2**31
"""Of gradients in one call: what a randomized method allocates grows with it."""


@dataclass(frozen=True)
class RefreshCase:
    """A new basis for one gradient, or for each one of a model in as many calls as there are chunks of equal shape."""

    model: str | tuple[int, int]
    rank: int
    dtype: torch.dtype = torch.float32
    spectrum: str = "1/i"
    """ "noise": Gaussian elements, a flat spectrum; "1/i": σᵢ falls so, over noise of a hundredth, which is steep."""

    @property
    def label(self) -> str:
        if isinstance(self.model, str):
            return f"refresh {self.model} r={self.rank} {str(self.dtype).removeprefix('torch.')}"
        return f"refresh {self.model[0]}x{self.model[1]} r={self.rank} {self.spectrum}"

    def chunks(self) -> list[tuple[int, int, int]]:
        """(count, rows, columns) of the gradients that go into one call; (1, rows, columns) for a single matrix."""
        found = []
        for (rows, columns), left in Counter([self.model] if isinstance(self.model, tuple) else model_shapes(self.model)).items():
            most = max(1, CHUNK_BYTES // (rows * columns * self.dtype.itemsize))
            while left:
                found.append((min(left, most), rows, columns))
                left -= found[-1][0]
        return found

    def flops(self) -> int:
        """The products with G: 2·m·n·l each, two and two more for each power iteration."""
        columns = self.rank + OVERSAMPLE
        return sum(count * (2 + 2 * POWER_ITERS) * 2 * rows * n * columns for count, rows, n in self.chunks())

    def sketch_bytes(self) -> int:
        """(m + n)·l·4 of the largest call: what a range finder needs at least, the fp32 sketches on both sides of G."""
        return max(count * (rows + n) * (self.rank + OVERSAMPLE) * 4 for count, rows, n in self.chunks())


def cases(on_gpu: bool, quick: bool) -> list[StepCase | RefreshCase]:
    half, single = torch.bfloat16, torch.float32
    if on_gpu:
        models = ("60m", "350m") if quick else ("60m", "130m", "350m", "1b", "7b")
        steps = [StepCase(model, rank, half) for model in models for rank in (128, 256)]
        matrices = [RefreshCase((1024, 2736), 256), RefreshCase((4096, 11008), 128)]
        return [*steps, StepCase("350m", 256, single), *matrices, RefreshCase("60m" if quick else "7b", 128, half)]
    models = ("28x512",) if quick else ("28x512", "60m", "130m")
    steps = [StepCase(model, 128, dtype) for model in models for dtype in (single, half)]
    matrices = {(512, 1376): 128, (1024, 2736): 256} | ({} if quick else {(2048, 5461): 512})
    refreshes = [RefreshCase(shape, rank, spectrum=spectrum) for shape, rank in matrices.items() for spectrum in ("noise", "1/i")]
    return [*steps, *refreshes] if quick else [*steps, *refreshes, RefreshCase("28x512", 128)]
