"""Peers from a folder of wheels, for comparisons on a machine without a network."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def install(folder: Path) -> None:
    """Puts every wheel of `folder` on the path of this process, behind all that is installed. Prints which
    wheels pip refuses, and why.

    Wheels are installed one by one and without their dependencies. A wheel that does not fit here must not
    keep out the others, nor bring another torch.
    """
    found = sorted(folder.glob("*.whl"))
    if not found:
        print(f"--wheels {folder}: there are no wheels in it")
        return
    target = tempfile.mkdtemp(prefix="wheels-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--target", target]
    for wheel in found:
        done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"--wheels: {wheel.name}" + (f" is not installed: {reason}" if done.returncode else ""))
    sys.path.append(target)
