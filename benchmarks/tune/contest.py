"""Which candidate serves a key. A row is replaced only by what is more than 2 % faster, so that noise does
not move a table."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from lowrank_kernels.backends.triton import tuned
from lowrank_kernels.backends.triton.tuned import Key

from ..cases import Unavailable
from ..gpu.lost import is_lost
from ..timing import Timing
from .candidates import Choice, Shape, label

MARGIN = 0.02
FINALISTS = 3
HEAT_S, FINAL_S = 0.05, 0.15
"""Seconds of timing for each candidate on the first shape, and for each finalist on each shape."""
SERVING = "what serves now"


class Tested(Protocol):
    """bench.Bench."""

    bytes_moved: float

    def check(self, choice: Choice) -> None: ...
    def times(self, choices: Mapping[str, Choice], seconds: float) -> dict[str, Timing]: ...


OpenBench = Callable[[Key, Shape], Tested]
Say = Callable[[str], None]


class Lost(Exception):
    """The GPU is lost to this process. The message is the label of the candidate that did it."""


class NoTime(Exception):
    """The time is over."""


@dataclass(frozen=True)
class Won:
    choice: Choice
    gb_per_s: float
    replaced: bool


def contest(
    key: Key, shapes: Sequence[Shape], serving: Choice, choices: Iterable[Choice], bench: OpenBench, say: Say = print
) -> Won | None:
    """Times all candidates on the first shape, then the three fastest in turn with what serves now on every
    shape. None: nothing is right."""
    everything = {SERVING: serving} | {label(choice): choice for choice in choices if choice != serving}
    tested = bench(key, shapes[0])
    right = _right(tested, everything, say)
    times = tested.times(right, HEAT_S * len(right)) if right else {}
    for name in sorted(times, key=lambda name: times[name].p50):
        say(f"  {times[name].p50:8.4f} ms  {name if name != SERVING else f'{label(serving)}, {SERVING}'}")
    fastest = [name for name in sorted(times, key=lambda name: times[name].p50) if name != SERVING][:FINALISTS]
    finalists = {name: right[name] for name in (SERVING, *fastest) if name in right}
    ratios: dict[str, list[float]] = {name: [] for name in finalists}
    spent = dict.fromkeys(finalists, 0.0)
    moved = 0.0
    for number, shape in enumerate(shapes):
        if number:
            tested = None  # its memory is needed
            try:
                tested = bench(key, shape)
            except (Unavailable, torch.OutOfMemoryError) as why:
                say(f"  {shape} is left out: {why}")
                continue
            for name in finalists.keys() - _right(tested, finalists, say).keys():
                del finalists[name]
        if not finalists:
            break
        found = tested.times(finalists, FINAL_S * len(finalists))
        moved += tested.bytes_moved
        for name, timing in found.items():
            ratios[name].append(timing.ratio)
            spent[name] += timing.p50
        say(f"  {shape}: " + ", ".join(f"{name} {timing.p50:.4f} ms" for name, timing in found.items()))
    if not finalists:
        return None
    mean = {name: math.exp(sum(map(math.log, ratios[name])) / len(ratios[name])) for name in finalists}
    best = min(mean, key=mean.get)
    if SERVING in finalists and mean[best] >= 1 - MARGIN:
        best = SERVING
    return Won(finalists[best], moved / spent[best] / 1e6, best != SERVING)


def _right(tested: Tested, choices: Mapping[str, Choice], say: Say) -> dict[str, Choice]:
    """Those that run and give the right result."""
    found = {}
    for name, choice in choices.items():
        try:
            tested.check(choice)
            found[name] = choice
        except Exception as error:
            if is_lost(error):
                raise Lost(label(choice)) from error
            say(f"  left out: {name}: {type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}")
    return found


@dataclass
class Outcome:
    measured: int = 0
    replaced: int = 0
    failed: int = 0


def tune(
    keys: Sequence[Key], path: Path, rows: Iterable[tuned.Row], origin: Mapping[str, object], left: Callable[[], float], *,
    shapes: Callable[[Key], Sequence[Shape]], serving: Callable[[Key, Iterable[tuned.Row]], Choice],
    choices: Callable[[Key], Iterable[Choice]], bench: OpenBench, say: Say = print,
) -> Outcome:  # fmt: skip
    """Measures keys in order while there is time, and rewrites the table after each of them. origin: `commit`
    and `versions` of the new rows. left: seconds. A key that fails leaves its row as it was."""
    table = {row.key: row for row in rows}
    outcome, longest = Outcome(), 0.0
    for key in keys:
        if left() <= longest:
            say(f"no time for {' '.join(map(str, key))} and the keys after it")
            break
        started = time.perf_counter()
        say(f"{' '.join(map(str, key))}: {left():.0f} s are left")
        try:
            found = list(choices(key))
            began = time.perf_counter()  # waiting for compilers is no measure of what a key takes
            won = contest(key, shapes(key), serving(key, table.values()), found, bench, say)
        except NoTime:
            say("no time to compile the rest")
            break
        except Lost:
            raise
        except Exception as error:
            outcome.failed += 1
            say(f"  FAILED after {time.perf_counter() - started:.1f} s: {type(error).__name__}: {error}")
            traceback.print_exc(limit=-4)
            if is_lost(error):
                break
            continue
        longest = max(longest, time.perf_counter() - began)
        if won is None:
            outcome.failed += 1
            say("  nothing is right here; its row stays")
            continue
        table[key] = tuned.Row(key, won.choice, won.gb_per_s, **origin)
        tuned.write(path, list(table.values()))
        outcome.measured += 1
        outcome.replaced += won.replaced
        say(f"  {'NEW' if won.replaced else 'kept'}: {label(won.choice)}, {won.gb_per_s:.0f} GB/s")
    return outcome
