"""Files that survive a kill at any moment. A checkpoint appears whole or not at all. On resume, metrics that
are newer than the checkpoint are dropped.

Later damage (a flipped byte, a file cut short) is found before a run goes on with the file.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

TRAILER = b"\nsha256 %s\n"  # SHA-256 of all bytes before it, in hexadecimal; torch.load ignores bytes after its own
TRAILER_BYTES = len(TRAILER % bytes(64))
CHUNK_BYTES = 1 << 20
ROW_KEYS = {
    "step": ("step", "loss", "lr", "grad_norm", "optimizer_ms"),
    "eval": ("step", "val_loss"),
    "end": ("step", "state_bytes", "peak_bytes", "wall_s"),
}
"""The keys that a row of the metrics has at least, by its event."""


class Damaged(RuntimeError):
    """A file does not hold what was written to it. The message names the file and says what to do."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside `path`, forces it to the disk, then renames it to `path`. A reader finds the old
    file or the new one.

    If the write fails, the file beside `path` is removed: on a full disk it may be what keeps the disk full.
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
    """Removes the partial files that killed processes left while they wrote `paths`. No process may be
    writing them now."""
    for path in paths:
        for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
            partial.unlink()


class Metrics:
    """One JSON object a line. Each checkpoint stores `position`. Opening at a position drops all that was
    written after it."""

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
    """The complete lines of a metrics file, up to `position` if it is given. The list is empty if there is no
    file.

    A line that a kill cut short is left out. Raises Damaged for a line that is no row, and where the file
    ends before `position`.
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
    """Whether the last complete line of the metrics marks the end of a run. Other lines are not checked:
    after a crash, those behind the last checkpoint need not be rows."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        return bool(lines) and json.loads(lines[-1])["event"] == "end"
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


class _Hashing:
    """A file for torch.save to write to. It keeps the digest of all that was written, and the OSError that
    torch.save replaces with an error of its own."""

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
    """torch.save, followed by a checksum of it, atomically."""

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
    """The checkpoint on the CPU, or None if there is none yet. `load_state_dict` moves each part to its
    parameters' device. Raises Damaged."""
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


# Of parameters that are spread over processes: torch.distributed.checkpoint writes a directory, of which each
# process writes its part. The small file of `save` then names it, so that a kill in between leaves the file
# with the name of the directory before.


def save_sharded(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, is_first: bool) -> None:
    """All processes call this. The directory is whole when it returns."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    if is_first and directory.exists():  # of a process that was killed while it wrote
        shutil.rmtree(directory)
    dist.barrier()
    dcp.save(_state_of(model, optimizer), checkpoint_id=directory)


def load_sharded(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads what any number of processes have saved. All processes call this. Raises Damaged."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    held = _state_of(model, optimizer)
    try:
        dcp.load(held, checkpoint_id=directory)
    except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise Damaged(f"{directory} is damaged ({reason}); put back a copy, or delete the file that names it, to train anew") from None
    states.set_model_state_dict(model, held["model"])
    states.set_optimizer_state_dict(model, optimizer, held["optimizer"])


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as states

    return {"model": states.get_model_state_dict(model), "optimizer": states.get_optimizer_state_dict(model, optimizer)}


def remove_older(directory: Path) -> None:
    """Removes the other directories beside this one."""
    for other in directory.parent.iterdir():
        if other != directory:
            shutil.rmtree(other)
