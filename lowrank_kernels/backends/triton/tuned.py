"""Rows that were measured on a device of one name. `python -m benchmarks.tune` writes them, and choose.py
looks a bucket's row up.

A table is a file <device name>.json: a list of rows, one a line.

    kind, moments, side, rank, waves   what the row was measured for (Key)
    path                               "single_pass" or "split"
    config                             the fields of SinglePassConfig; for a split "project_moments" and
                                       "back_project", each with the fields of its config
    gb_per_s                           bytes that a step must move over the time it took; null: not measured
    commit, versions                   of what was measured

A row serves every rank up to its own; the row of the smallest rank that covers is taken. A missing file or
key leaves the bucket to the built-in rows. Folders are looked through in this order, and the first one that
has a file for the device serves alone:

    LOWRANK_KERNELS_TUNED    where it is set; 0 leaves everything to the built-in rows
    user_folder()            in the user's cache
    PACKAGED                 in the package
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from .configs import BackProjectConfig, Config, ProjectMomentsConfig, SinglePassConfig, SplitConfig

VARIABLE = "LOWRANK_KERNELS_TUNED"
PACKAGED = Path(__file__).parent / "tuned"
VALUES = {"kind": ("16bit", "tf32", "ieee"), "moments": ("fp32", "8-bit"), "side": ("left", "right"), "waves": ("few", "many")}
PATHS = {"single_pass": SinglePassConfig, "split": SplitConfig}
SMALLEST_TILE, SMALLEST_CODED_TILE = 16, 64
"""The least extent of a tile that tl.dot takes, and the columns of a block of 8-bit moments."""


class Key(NamedTuple):
    """kind of dot, dtype of the moments, side, rank, and `waves` of programs."""

    kind: str
    moments: str
    side: str
    rank: int
    waves: str


@dataclass(frozen=True)
class Row:
    key: Key
    config: SinglePassConfig | SplitConfig
    gb_per_s: float | None
    commit: str
    versions: dict[str, str]


def waves(n: int, count: int, multiprocessors: int) -> str | None:
    """How often the programs of a launch fill the device, for `count` matrices with n columns: "many" times
    if tiles of 128 columns are at least four for each multiprocessor, else a "few". None: not even tiles of
    64 columns fill it once, so a bucket of this size says nothing of a row."""
    if -(-n // 64) * count < multiprocessors:
        return None
    return "many" if -(-n // 128) * count >= 4 * multiprocessors else "few"


def look_up(rows: Iterable[Row], key: Key) -> Row | None:
    """The row for the smallest rank that covers."""
    covering = [row for row in rows if row.key._replace(rank=key.rank) == key and row.key.rank >= key.rank]
    return min(covering, key=lambda row: row.key.rank, default=None)


# Where tables are.


def file_name(device: str) -> str:
    """NVIDIA_H100_80GB_HBM3.json for "NVIDIA H100 80GB HBM3"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", device) + ".json"


def user_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lowrank_kernels" / "tuned"


def folders() -> list[Path]:
    """In the order in which they are looked through."""
    named = os.environ.get(VARIABLE)
    if named == "0":
        return []
    return [*([Path(named)] if named else []), user_folder(), PACKAGED]


def find(device: str) -> Path | None:
    """The file that serves a device."""
    return next((path for folder in folders() if _is_file(path := folder / file_name(device))), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder that may not be looked into
        return False


def target(device: str) -> Path:
    """The file that a new table for a device goes to: the one that serves if it can be written, else one in
    the named folder, the package or the user's cache, whichever can be written first."""
    serving = find(device)
    named = os.environ.get(VARIABLE, "0")
    wished = [serving.parent] if serving else []
    wished += [Path(named)] if named != "0" else [PACKAGED]
    folder = next((folder for folder in wished if _writable(folder)), user_folder())
    return folder / file_name(device)


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


# Reading and writing.


@functools.cache
def rows_of(device: str) -> tuple[Row, ...]:
    """The rows that serve a device. Read once in a process. If the file cannot be read, this warns, and there
    are none."""
    path = find(device)
    if path is None:
        return ()
    try:
        return read(path)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"lowrank_kernels: {error}. The built-in rows serve instead of this table, so steps may be slower. Mend the file or remove it.",
            RuntimeWarning,
            stacklevel=2,
        )
        return ()


def describe(device: str) -> str:
    """Which rows serve a device, in half a sentence."""
    if os.environ.get(VARIABLE) == "0":
        return f"built-in rows ({VARIABLE} is 0)"
    path = find(device)
    if path is None:
        return f"built-in rows (no {file_name(device)} in {', '.join(map(str, folders()))})"
    try:
        rows = read(path)
    except (OSError, ValueError) as error:
        return f"built-in rows ({error})"
    timed = sum(row.gb_per_s is not None for row in rows)
    commits = ", ".join(sorted({row.commit for row in rows}))
    versions = ", ".join(sorted({" ".join(each) for row in rows for each in row.versions.items()}))
    return f"{len(rows)} rows of {path}, {timed} of them timed, at {commits or 'no commit'} ({versions or 'no versions'})"


def read(path: Path) -> tuple[Row, ...]:
    """Raises ValueError with the file's name, the row's number and what is wrong with it."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of rows, got {type(records).__name__}")
    rows: dict[Key, Row] = {}
    for number, record in enumerate(records, 1):
        try:
            row = _row(record)
            if row.key in rows:
                raise ValueError(f"{tuple(row.key)} has a row already")
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from error
        rows[row.key] = row
    return tuple(rows.values())


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replaces the file at once, so that nobody reads a half of it."""
    lines = ",\n".join(json.dumps(_record(row), ensure_ascii=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".part", delete=False, encoding="utf-8") as file:
        file.write(f"[\n{lines}\n]\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _record(row: Row) -> dict[str, object]:
    path = next(name for name, config in PATHS.items() if isinstance(row.config, config))
    of_row = {name: getattr(row, name) for name in ("gb_per_s", "commit", "versions")}
    return row.key._asdict() | {"path": path, "config": asdict(row.config)} | of_row


def _row(record: object) -> Row:
    _fields("a row", record, {*Key._fields, "path", "config", "gb_per_s", "commit", "versions"})
    for name, allowed in (*VALUES.items(), ("path", tuple(PATHS))):
        if record[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {record[name]!r}")
    _positive_int("rank", record["rank"])
    rate, versions = record["gb_per_s"], record["versions"]
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0):
        raise ValueError(f"gb_per_s must be a positive number or null, got {rate!r}")
    if not isinstance(record["commit"], str):
        raise ValueError(f"commit must be a string, got {record['commit']!r}")
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise ValueError(f"versions must be strings by name, got {versions!r}")
    key = Key(*(record[name] for name in Key._fields))
    least = SMALLEST_CODED_TILE if key.moments == "8-bit" else SMALLEST_TILE
    if record["path"] == "split":
        _fields("config of a split", record["config"], {"project_moments", "back_project"})
        config = SplitConfig(
            _config(ProjectMomentsConfig, record["config"]["project_moments"], least),
            _config(BackProjectConfig, record["config"]["back_project"], SMALLEST_TILE),
        )
    else:
        config = _config(SinglePassConfig, record["config"], least)
        if config.rank_covered < key.rank:
            raise ValueError(f"a single pass covers ranks up to its BLOCK_R of {config.BLOCK_R}, and the row's rank is {key.rank}")
    return Row(key, config, rate, record["commit"], versions)


def _config(config: type[Config], record: object, least_columns: int) -> Config:
    optional = {each.name for each in fields(config) if each.default is not MISSING}
    _fields(config.__name__, record, {each.name for each in fields(config)}, optional)
    for name, value in record.items():
        if value is None and name in optional:
            continue
        _positive_int(name, value)
        least = least_columns if name == "BLOCK_N" else SMALLEST_TILE if name.startswith("BLOCK") else 1
        if (name.startswith("BLOCK") or name in ("SLICES", "num_warps")) and (value < least or value & (value - 1)):
            raise ValueError(f"{name} must be a power of two from {least} on, got {value}")
    if record.get("SLICES", 1) > record.get("BLOCK_R", 1):
        raise ValueError(f"SLICES must be {record['BLOCK_R']} at most, the BLOCK_R, got {record['SLICES']}")
    # Threads that share an element of a slice would race: all load it, and one stores it.
    of_tile = record["BLOCK_N"] * record.get("BLOCK_R", record.get("BLOCK_M", 1)) // record.get("SLICES", 1)
    if record["num_warps"] > min(32, of_tile // 32):
        raise ValueError(f"num_warps must be {min(32, of_tile // 32)} at most for {of_tile} elements, got {record['num_warps']}")
    return config(**record)


def _fields(what: str, record: object, names: set[str], optional: Iterable[str] = ()) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{what} must be an object, got {record!r}")
    if unknown := sorted(record.keys() - names):
        raise ValueError(f"{what} has no field {', '.join(unknown)}")
    if missing := sorted(names - record.keys() - set(optional)):
        raise ValueError(f"{what} lacks {', '.join(missing)}")


def _positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
