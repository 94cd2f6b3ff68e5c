"""Text as bytes: vocabulary 256, nothing to download, no tokenizer to train.

Without a path the text is the source of the running Python's standard library, about 12 MB that every reader
of this file already has.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256
HELD_OUT = 0.05  # fraction of the files of a directory, or of the bytes of a single file

# Installed packages are not the library's own text. Its tests are left out because much of them is tables of
# encoded data.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class TextError(ValueError):
    """The text asked for cannot be used; the message says why."""


@dataclass(frozen=True)
class Corpus:
    """Two 1-D uint8 tensors, and what a reader of the results must know about them."""

    train: Tensor
    val: Tensor
    name: str
    digest: str  # SHA-256 of both parts; a run is resumed only on the same text

    def __str__(self) -> str:
        return f"{self.name}: {len(self.train) / 1e6:.3g} MB to train on, {len(self.val) / 1e6:.3g} MB held out"


def load(path: Path | None) -> Corpus:
    """The standard library (None), a directory (some files are held out) or a file (its tail is held out)."""
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = {name: data for name, data in _files(root, "*.py") if not _NOT_STDLIB & set(Path(name).parts)}
        version = sysconfig.get_python_version()
        return _split_by_file(files, name=f"Python {version} standard library")
    _check_name(path.resolve())
    if not path.exists():
        raise TextError(f"--data {path}: no such file or directory")
    if path.is_file():
        return _split_tail(path.read_bytes(), name=path.name)
    files = {name: data for name, data in _files(path, "*") if b"\0" not in data}  # a NUL byte means that the file is not text
    if len(files) == 1:
        (data,) = files.values()
        return _split_tail(data, name=path.resolve().name)
    return _split_by_file(files, name=path.resolve().name)


def _files(root: Path, pattern: str) -> Iterable[tuple[str, bytes]]:
    """(path relative to root, contents) of the files under root in sorted order. Hidden and empty files are
    left out."""
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and (data := path.read_bytes()):
            _check_name(path)
            yield name.as_posix(), data


def _check_name(path: Path) -> None:
    """Checks a file's name, because the name decides which side of the split the file is on, and it is
    printed."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise TextError(f"--data: the file name {os.fsencode(path)!r} is not UTF-8; rename it") from None


def is_held_out(name: str) -> bool:
    """Whether a file is held out. It is a pure function of the file's relative path, so adding a file never
    moves another one across the split."""
    return _hash_fraction(name) < HELD_OUT


def _hash_fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _split_by_file(files: dict[str, bytes], name: str) -> Corpus:
    if not files:
        raise TextError(f"{name}: no text files found")
    copies: dict[bytes, list[str]] = {}
    for path, data in files.items():
        copies.setdefault(hashlib.sha256(data).digest(), []).append(path)
    unique = [paths[0] for paths in copies.values()]  # a copy on the other side of the split would be a leak

    held_out = {path for path in unique if is_held_out(path)}
    if not held_out or len(held_out) == len(unique):  # with only a few files: hold out exactly one
        held_out = {min(unique, key=_hash_fraction)}
    train = b"\n".join(files[path] for path in unique if path not in held_out)
    val = b"\n".join(files[path] for path in unique if path in held_out)
    return _corpus(train, val, f"{name} ({len(unique)} files, {len(held_out)} held out)")


def _split_tail(data: bytes, name: str) -> Corpus:
    if not data:
        raise TextError(f"{name}: the file is empty")
    cut = len(data) - int(len(data) * HELD_OUT)
    return _corpus(data[:cut], data[cut:], f"{name} (its last {HELD_OUT:.0%} held out)")


def _corpus(train: bytes, val: bytes, name: str) -> Corpus:
    digest = hashlib.sha256(len(train).to_bytes(8, "big") + train + val).hexdigest()
    train_tensor, val_tensor = (
        torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else torch.empty(0, dtype=torch.uint8) for part in (train, val)
    )
    return Corpus(train_tensor, val_tensor, name, digest)


def check_length(corpus: Corpus, seq_len: int) -> None:
    """Checks that each part holds at least one sequence and the byte that follows it."""
    for part, data in (("training", corpus.train), ("held-out", corpus.val)):
        if len(data) < seq_len + 1:
            raise TextError(
                f"{corpus.name}: the {part} part has {len(data)} bytes, less than one sequence (--seq-len {seq_len}, and one byte more)"
            )


def batch(data: Tensor, *, seed: int, step: int, batch_size: int, seq_len: int) -> Tensor:
    """(batch_size, seq_len + 1) int64 windows at random places. They are a pure function of (seed, step), so
    resuming needs no sampler state."""
    key = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    starts = torch.randint(len(data) - seq_len, (batch_size,), generator=generator)
    return data[starts[:, None] + torch.arange(seq_len + 1)].long()


def windows(data: Tensor, *, count: int, seq_len: int) -> Tensor:
    """(≤ count, seq_len + 1) int64 windows, the same for every run. They are spread evenly over the text, and
    no predicted byte is in two of them."""
    available = (len(data) - 1) // seq_len
    picked = torch.arange(min(count, available)) * available // min(count, available)
    return data[picked[:, None] * seq_len + torch.arange(seq_len + 1)].long()
