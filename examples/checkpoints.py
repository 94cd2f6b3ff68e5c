"""Files that survive a kill at any moment: checkpoints appear whole or not at all, and metrics never outrun
them on resume.

What was damaged afterwards (a flipped byte, a file cut short) is found before a run goes on with it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

TRAILER = b"\nsha256 %s\n"  # of all before it, in hexadecimal; torch.load does not mind bytes after its own
TRAILER_BYTES = len(TRAILER % bytes(64))
CHUNK_BYTES = 1 << 20
ROW_KEYS = {
    "step": ("step", "loss", "lr", "grad_norm", "optimizer_ms"),
    "eval": ("step", "val_loss"),
    "end": ("step", "state_bytes", "peak_bytes", "wall_s"),
}
"""What a row of the metrics has at least, by its event."""


class Damaged(RuntimeError):
    """A file is not what was written; the message names it and says what to do."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a neighbour, force it to the disk, then rename over `path`: a reader finds the old file or the
    new one.

    A write that fails takes its neighbour with it: on a full disk that is the file which keeps it full.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partials(paths: Iterable[Path]) -> None:
    """What processes killed while they wrote `paths` have left. None may be writing them now."""
    for path in paths:
        for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
            partial.unlink()


class Metrics:
    """One JSON object a line. `position` is stored in each checkpoint; opening at a position forgets what
    came after it."""

    def __init__(self, path: Path, position: int = 0):
        read_metrics(path, position)
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


def read_metrics(path: Path, position: int | None = None) -> list[dict[str, Any]]:
    """The complete lines of a metrics file, up to `position` if it is given; none if the file is not there.

    A line cut short by a kill is left out. Raises Damaged for a line that is no row, and where the file ends
    before `position`.
    """
    data = path.read_bytes() if path.exists() else b""
    if position is not None:
        if len(data) < position:
            raise Damaged(
                f"{path} holds {len(data)} bytes but its checkpoint was written at {position}: "
                "it was changed since, and the run cannot be resumed"
            )
        data = data[:position]
    return [_row(path, number, line) for number, line in enumerate(data.split(b"\n")[:-1], 1)]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        missing = [key for key in ROW_KEYS[row["event"]] if key not in row]
    except (ValueError, TypeError, KeyError, RecursionError):
        missing = [""]
    if missing:
        raise Damaged(f"{path}, line {number}, is not a row of metrics: the file was changed since, and the run cannot be resumed")
    return row


def finished(path: Path) -> bool:
    """The last complete line of the metrics is that of a run's end. What a crash left behind the last
    checkpoint need not be rows."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        return bool(lines) and json.loads(lines[-1])["event"] == "end"
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


class _Hashing:
    """A file that torch.save writes to, the digest of what went through it, and the error that torch.save
    hides behind its own."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        try:
            self.digest.update(data)
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """torch.save and a checksum of it, atomically."""

    def write(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        try:
            torch.save(checkpoint, hashing)
        except RuntimeError:
            if hashing.error is None:
                raise
            raise hashing.error from None
        file.write(TRAILER % hashing.digest.hexdigest().encode())

    write_atomically(path, write)


def load(path: Path) -> dict[str, Any] | None:
    """On the CPU; `load_state_dict` moves each part to its parameters' device. None if there is none yet.
    Raises Damaged."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - TRAILER_BYTES
        while left > 0 and (chunk := file.read(min(left, CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
        if left != 0 or file.read() != TRAILER % digest.hexdigest().encode():
            raise Damaged(
                f"{path} is damaged, its checksum does not fit: delete it to train that optimizer anew, or put back a copy, "
                "and give --resume again"
            )
    return torch.load(path, weights_only=True, map_location="cpu")
