"""The scope of a run: what the command line asks for, what fits, and what every suite receives."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from . import shapes
from .records import ALL, Row, is_ours
from .roofline import Machine


class Case(Protocol):
    @property
    def label(self) -> str:
        """Unique among all cases. Comparing two runs matches their cases by it."""


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
        """(model, rank, dtype) in all combinations. The suite's own `models`, `ranks`, `dtypes` stand in for
        what the command line leaves open. Ranks above the narrowest side are left out."""
        for model in self.models or models:
            narrowest = min(min(shape) for shape in shapes.model_shapes(model))
            for rank in self.ranks or ranks:
                if rank > narrowest:
                    print(f"{model} r={rank} skipped: its narrowest matrix has {narrowest} directions")
                    continue
                for dtype in self.dtypes or dtypes:
                    yield model, rank, dtype


class Budget:
    """The seconds of a whole run. Set-ups, checks and compilations count as well as measurements."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.perf_counter() + seconds
        self.longest: dict[tuple[str, str], float] = {}
        """The longest set-up of a contender so far, in seconds, by (suite, contender)."""

    def left(self) -> float:
        return self.ends - time.perf_counter()


@dataclass(frozen=True)
class Context:
    """How a case is measured. `seconds` is the case's share of the run's budget, from now on, set-up
    included."""

    on_gpu: bool
    seconds: float
    machine: Machine
    budget: Budget = field(default_factory=lambda: Budget(math.inf))
    started: float = field(default_factory=lambda: time.perf_counter())

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    @contextlib.contextmanager
    def setting_up(self, suite: str, contender: str) -> Iterator[None]:
        """Times a set-up. Raises Unavailable if an earlier set-up of this contender took longer than the run
        has left. For contenders that others wrote, also raises it if that took longer than a case's share."""
        longest, left = self.budget.longest, self.budget.left()
        before = longest.get((suite, contender), 0.0)
        if left <= before:
            took = f", and setting it up took {before:.0f} s before" if before else ""
            raise Unavailable(f"no time: {max(left, 0):.0f} s of --seconds are left{took}")
        if not is_ours({"contender": contender}) and before > self.seconds and math.isfinite(left):
            raise Unavailable(f"no time: setting it up took {before:.1f} s before, and a case has {self.seconds:.1f} s of --seconds")
        start = time.perf_counter()
        try:
            yield
        finally:
            longest[suite, contender] = max(before, time.perf_counter() - start)

    def measuring_s(self) -> float:
        """The seconds of the case's share that are left for measuring. It is at least a quarter of the share,
        as far as the run still has that much."""
        left = self.started + self.seconds - time.perf_counter()
        return max(0.0, min(max(left, self.seconds / 4), self.budget.left()))


class Unavailable(Exception):
    """A contender or a case cannot run here. The message is the reason and what would help."""


def not_measured(label: str, contender: str, why: BaseException | str) -> Row:
    """The row, without figures, of a contender, or of a whole case (contender ALL). It has `skipped` where
    something is missing, else `failure`. Prints the row.

    A missing library is a reason to skip what others wrote, never this package.
    """
    theirs = contender != ALL and not is_ours({"contender": contender})
    missing = isinstance(why, (str, Unavailable, torch.OutOfMemoryError)) or (isinstance(why, ImportError) and theirs)
    key = "skipped" if missing else "failure"
    text = str(why)
    if isinstance(why, BaseException) and not isinstance(why, Unavailable):
        text = f"{type(why).__name__}: {(text.splitlines() or ['no message'])[0]}"
    print(f"{label}: {contender} {'skipped' if key == 'skipped' else 'FAILED'}: {text}", flush=True)
    if key == "failure" and isinstance(why, BaseException):
        traceback.print_exception(why, limit=-6)
    return {"case": label, "suite": label.partition(" ")[0], "contender": contender, key: text}


def free_bytes(on_gpu: bool) -> int:
    if on_gpu:
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62  # unknown: refuse nothing


def require_room(needed: int, on_gpu: bool) -> None:
    """Raises Unavailable unless `needed` bytes are free. A GPU's out-of-memory error can be caught, a CPU's
    cannot."""
    free = free_bytes(on_gpu)
    if needed > 0.9 * free:
        raise Unavailable(f"needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
