"""Only one process at a time in a run's directory. Two processes would cut each other's metrics and write
rows twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from settings import SettingsError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"


@contextmanager
def exclusive(directory: Path) -> Iterator[bool]:
    """Makes the directory if need be and holds its lock. The system releases the lock when the process dies,
    however it dies.

    Yields whether there is a lock. Windows and some network file systems have none; a printed line says so
    then. Raises SettingsError where another process holds the lock and where the directory cannot be written
    to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / LOCK, "ab")
    except OSError as error:
        raise SettingsError(f"--out {directory}: {error.strerror}") from None
    with file:
        missing = "Python has no fcntl here"
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                missing = ""
            except BlockingIOError:
                raise SettingsError(f"--out {directory}: another process trains in it; wait for it, or choose another directory") from None
            except OSError as error:
                missing = str(error)
        if missing:
            print(f"No lock on {directory} ({missing}): nothing keeps a second process from writing there too", file=sys.stderr)
        yield not missing
