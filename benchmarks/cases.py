"""What a run covers: what the command line asks for, what fits, and what every suite is handed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from . import shapes
from .roofline import Machine


class Case(Protocol):
    @property
    def label(self) -> str:
        """Unique among all cases; two runs are compared by it."""


@dataclass(frozen=True)
class Selection:
    """What the command line asks for. None: the suite chooses."""

    quick: bool = False
    models: tuple[str, ...] | None = None
    ranks: tuple[int, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None

    @property
    def explicit(self) -> bool:
        return any((self.models, self.ranks, self.dtypes))

    def combinations(
        self, models: Sequence[str], ranks: Sequence[int], dtypes: Sequence[torch.dtype]
    ) -> Iterator[tuple[str, int, torch.dtype]]:
        """(model, rank, dtype): all of what was asked for, and of these where nothing was. Ranks above the narrowest side are left out."""
        for model in self.models or models:
            narrowest = min(min(shape) for shape in shapes.model_shapes(model))
            for rank in self.ranks or ranks:
                if rank > narrowest:
                    print(f"{model} r={rank} skipped: its narrowest matrix has {narrowest} directions")
                    continue
                for dtype in self.dtypes or dtypes:
                    yield model, rank, dtype


@dataclass(frozen=True)
class Context:
    """How a case is measured: `seconds` is its budget of time."""

    on_gpu: bool
    seconds: float
    machine: Machine

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"


class Unavailable(Exception):
    """A contender that cannot run here; the message is the reason and what would help."""


def skipped(label: str, what: str, reason: BaseException | str) -> None:
    """Says that a contender, or a whole case, is not measured, and why."""
    if isinstance(reason, Unavailable):
        reason = str(reason)
    elif isinstance(reason, BaseException):
        reason = f"{type(reason).__name__}: {(str(reason).splitlines() or ['no message'])[0]}"
    print(f"{label}: {what} skipped: {reason}")


def free_bytes(on_gpu: bool) -> int:
    if on_gpu:
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62  # unknown: nothing is refused


def fits(label: str, needed: int, on_gpu: bool) -> bool:
    """Whether `needed` bytes are free, or says that the case is skipped. A GPU's out-of-memory error can be caught, a CPU's cannot."""
    free = free_bytes(on_gpu)
    if needed > 0.9 * free:
        skipped(label, "the case", f"needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
        return False
    return True
