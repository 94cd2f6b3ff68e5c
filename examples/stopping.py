"""Ctrl-C ends a run between two steps, not within one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Yields a list. The first Ctrl-C (or SIGTERM) appends its signal to it; the second one acts as usual."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        for each, previous in before.items():
            signal.signal(each, previous)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
