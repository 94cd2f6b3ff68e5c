"""Computes one string that identifies the sources of a compiled library. setup.py runs this file by its path,
so it imports nothing of the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def digest(csrc: Path) -> str:
    """SHA-256, in hexadecimal, over the names and contents of the sources below a folder. It depends neither
    on the files' times nor on the folder's place."""
    found = hashlib.sha256()
    for name, path in sorted((path.relative_to(csrc).as_posix(), path) for path in csrc.rglob("*") if path.suffix in SUFFIXES):
        contents = path.read_bytes()
        found.update(f"{name}\0{len(contents)}\0".encode() + contents)
    return found.hexdigest()
