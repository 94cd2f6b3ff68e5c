"""Loads the compiled operators that setup.py built from csrc/, or says why there are none. The library lies
beside this file.

LOWRANK_KERNELS_LIBRARY=path in the environment loads that library instead (make sanitize). If it cannot be
loaded, an error is raised instead of a warning.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .source_digest import digest

_PACKAGE = Path(__file__).resolve().parent
_OVERRIDE = "LOWRANK_KERNELS_LIBRARY"
OPERATORS = ("leading", "short_side_spectrum", "eigh", "orthonormalise", "sample_importance", "multiply", "peaks", "normal")
"""The operators of ops/parts.py. The extension implements all of them on a CPU and, with its CUDA part, on a
CUDA GPU."""
_SLOWER = "the subspace refresh runs in PyTorch (slower)"


@dataclass(frozen=True)
class Finding:
    sentence: str
    library: Path | None = None
    unexpected: bool = False
    """Whether a library was built but cannot be used. This is worth a warning; a library that was never built
    is only reported."""


_finding = Finding("not loaded: LOWRANK_KERNELS_REFERENCE is set")


def status() -> str:
    """A sentence on the state of the extension, for the environment report."""
    return _finding.sentence


def loaded() -> bool:
    """Whether the compiled operators are registered."""
    return _finding.library is not None


def missing(dispatch_key: str) -> list[str]:
    """The operators without a compiled kernel of their own under a dispatch key, "CPU" or "CUDA". torch's
    dispatcher is asked."""
    return [name for name in OPERATORS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lowrank_kernels::{name}", dispatch_key)]


def load(*, reference_forced: bool) -> None:
    """Registers the compiled implementations. ops/ calls this once, after it has defined the operators. Warns
    where a built library cannot be used."""
    global _finding
    if reference_forced:
        return
    found = find(_PACKAGE, torch.__version__, os.environ)
    if found.library is not None:
        try:
            _load_what_the_cuda_part_links(found.library)
            torch.ops.load_library(found.library)
        except OSError as error:
            if os.environ.get(_OVERRIDE):
                raise
            found = Finding(f"{found.sentence}, does not load ({error.__cause__ or error}): {_rebuild(_PACKAGE)}", unexpected=True)
    if found.unexpected:
        warnings.warn(f"lowrank_kernels: the extension is {found.sentence}", RuntimeWarning, stacklevel=2)
    _finding = found


def _load_what_the_cuda_part_links(library: Path) -> None:
    """torch keeps its linear algebra for CUDA in a library of its own and loads that with the first call. The
    handles of cuSOLVER are in it. It lies where the loader does not look by itself. It is large, so only an
    extension that was built with cuSOLVER, or that brings no facts, has it loaded."""
    facts = _facts_of(library)
    linked = Path(torch.__file__).parent / "lib" / "libtorch_cuda_linalg.so"
    if torch.version.cuda and linked.is_file() and (facts is None or facts.get("cusolver")):
        ctypes.CDLL(str(linked))


def find(package: Path, torch_version: str, environ: Mapping[str, str]) -> Finding:
    """Decides which library to load, from the facts that setup.py wrote beside it. Loads nothing. Raises
    FileNotFoundError where LOWRANK_KERNELS_LIBRARY names no file."""
    if override := environ.get(_OVERRIDE):
        library = Path(override).resolve()
        if not library.is_file():
            raise FileNotFoundError(f"{_OVERRIDE}={override}: there is no such file")
        return Finding(f"loaded from {library} ({_OVERRIDE}){_facts_beside(library)}", library)
    try:
        facts = json.loads((package / "_build.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        facts = {"reason": "nothing was compiled in this folder"}
    if facts["reason"]:
        return Finding(f"not built: {facts['reason']}; {_SLOWER}. {_reinstall(package)}")
    library = next((path for path in (package / "_C.so", package / "_C.pyd") if path.is_file()), None)
    built = f"built for torch {facts['torch']} ({_parts(facts)})"
    if library is None:
        return Finding(f"{built}, but the library is gone: {_rebuild(package)}", unexpected=True)
    if _abi(facts["torch"]) != _abi(torch_version):
        return Finding(f"built for torch {facts['torch']} but torch {torch_version} is running: {_rebuild(package)}", unexpected=True)
    if _stale(package, facts):
        return Finding(f"{built}, but csrc/ has changed since: {_rebuild(package)}", unexpected=True)
    return Finding(f"{built}, loaded from {library}", library)


def _facts_of(library: Path) -> dict | None:
    """What setup.py wrote beside a library."""
    try:
        return json.loads(library.with_name("_build.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _facts_beside(library: Path) -> str:
    facts = _facts_of(library)
    return "" if facts is None else f", built for torch {facts['torch']} ({_parts(facts)})"


def _parts(facts: dict) -> str:
    if facts["cuda"]:
        solver = f"with cuSOLVER {facts['cusolver']}" if facts.get("cusolver") else "without cuSOLVER"
        return f"C++ and CUDA {facts['cuda']} {solver} for {', '.join(facts['archs'])}"
    return f"C++ without the CUDA part: {facts['cuda_reason']}" if facts["cuda_reason"] else "C++"


def _abi(version: str) -> str:
    """The name of a torch version's ABI. Releases of one minor version share it: "2.13" for 2.13.0+cpu and
    2.13.1. Any other build fits only itself."""
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+(cpu|cu\d+|cxx11.*|rocm.*|xpu))?", version)
    return release.group(1) if release else version


def _stale(package: Path, facts: dict) -> bool:
    """Whether csrc/ has changed since the library was built. False outside of a source tree.

    A stale library may register an operator with another schema than the operator now has. That would end the
    process, because C++ exceptions do not pass through dlopen.
    """
    return (package.parent / "setup.py").is_file() and facts.get("sources") != digest(package.parent / "csrc")


def _reinstall(package: Path) -> str:
    folder = package.parent
    source = f"-e {folder}" if (folder / "setup.py").is_file() else "FOLDER, the source folder"
    return f"Reinstall with: pip install --no-build-isolation {source}"


def _rebuild(package: Path) -> str:
    return f"it is not loaded and {_SLOWER}. {_reinstall(package)}"
