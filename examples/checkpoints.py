"""Files that survive a kill at any moment: checkpoints appear whole or not at all, and metrics never outrun them on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a neighbour, force it to the disk, then rename over `path`: a reader finds the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class Metrics:
    """One JSON object a line. `position` is stored in each checkpoint; opening at a position forgets what came after it."""

    def __init__(self, path: Path, position: int = 0):
        size = path.stat().st_size if path.exists() else 0
        if size < position:
            raise RuntimeError(
                f"{path} holds {size} bytes but its checkpoint was written at {position}: "
                "it was changed since, and the run cannot be resumed"
            )
        self._file = open(path, "ab")
        self._file.truncate(position)

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def position(self) -> int:
        """Bytes written, all of them on the disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; none if it is not there. A line cut short by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load(path: Path) -> dict[str, Any] | None:
    """On the CPU; `load_state_dict` moves each part to its parameters' device. None if there is none yet."""
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None
