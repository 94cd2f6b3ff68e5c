"""What a GPU is asked, in the order of what answers are worth: does it build, is it right at all, the first
figures, then the rest."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import evidence
from .runner import ROOT, Command, Stage

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
NAMES = ("build", "smoke", "headline", "tests", "memcheck", "racecheck", "step", "refresh", "host", "fuzz", "facts", "tune", "full")
LATER = ("tune", "full")
"""Stages that only run where they are asked for: in a second call, on a machine that has built everything."""


@dataclass(frozen=True)
class Settings:
    """`dry`: no GPU; each stage's own commands on small sizes and the CPU, as far as they go there."""

    files: evidence.Files
    dry: bool = False
    commit: str | None = None
    wheels: Path | None = None
    new_rows: evidence.NewRows = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "new_rows", evidence.NewRows(self.files.path(evidence.ROWS)))


def all_stages(settings: Settings) -> list[Stage]:
    """Weights are seconds of nine minutes; of a dry run what stages take on a CPU, in proportion."""
    plan = _dry_stages(settings) if settings.dry else _stages(settings)
    table = {"LOWRANK_KERNELS_TUNED": str(settings.files.folder)}  # of the stage before
    return [*plan, _tune(settings), _benchmark(settings, "full", 540, "", **table)]


def _stages(settings: Settings) -> list[Stage]:
    workers = max(1, (os.cpu_count() or 1) - 2)
    mode = os.environ.get("LOWRANK_KERNELS_BUILD", "cuda")
    build = _python("setup.py", "--quiet", "build_ext", "--inplace", LOWRANK_KERNELS_BUILD=mode)
    return [
        Stage("build", 80, evidence.MACHINE, [build, _smoke("--registered")]),
        Stage("smoke", 50, evidence.MACHINE, [_smoke()]),
        _benchmark(settings, "headline", 60, "--suite step --suite kernel --suite refresh --quick"),
        Stage("tests", 135, evidence.TESTS, [_tests(settings, min(14, workers), gpu_tests())]),
        _sanitizer("memcheck", 40, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        _sanitizer("racecheck", 40),
        _benchmark(settings, "step", 40, "--suite step --models 350m 1b 7b --ranks 128 --dtypes bf16"),
        _benchmark(settings, "refresh", 30, "--suite refresh"),
        _benchmark(settings, "host", 15, "--suite host"),
        Stage("fuzz", 35, evidence.FUZZ, [_fuzz(150, min(12, workers))]),
        Stage("facts", 15, evidence.MACHINE, _facts()),
    ]


def _dry_stages(settings: Settings) -> list[Stage]:
    """The same commands on small sizes. setup.py goes as far as it would compile, and writes beside the
    tree."""
    build = _python("setup.py", "--quiet", "build_ext", "--build-lib", str(ROOT / "build" / "dry"), LOWRANK_KERNELS_BUILD="0")
    small = "--models 4x64 --ranks 8 --dtypes fp32"
    return [
        Stage("build", 8, evidence.MACHINE, [build, _smoke("--registered")]),
        Stage("smoke", 7, evidence.MACHINE, [_smoke("--small")]),
        _benchmark(settings, "headline", 9, f"--suite kernel --quick {small}"),
        Stage("tests", 12, evidence.TESTS, [_tests(settings, 1, ["tests/test_philox.py"])]),
        _sanitizer("memcheck", 1, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        _sanitizer("racecheck", 1),
        _benchmark(settings, "step", 9, f"--suite step {small}"),
        _benchmark(settings, "refresh", 9, f"--suite refresh {small}"),
        _benchmark(settings, "host", 13, "--suite host"),
        Stage("fuzz", 13, evidence.FUZZ, [_fuzz(2, 1)]),
        Stage("facts", 7, evidence.MACHINE, _facts()),
    ]


def _python(*arguments: str, **environment: str) -> Command:
    return Command([sys.executable, *arguments], environment)


def _smoke(*options: str) -> Command:
    return _python("-m", "benchmarks.gpu.smoke", *options)


def _benchmark(settings: Settings, name: str, weight: float, options: str, **environment: str) -> Stage:
    seconds = "3" if settings.dry else "{seconds}"
    argv = ["-m", "benchmarks", *options.split(), "--seconds", seconds, "--file", str(settings.files.path(evidence.ROWS))]
    argv += ["--commit", settings.commit] if settings.commit else []
    argv += ["--wheels", str(settings.wheels)] if settings.wheels else []
    environment |= {"TORCH_COMPILE_DISABLE": "1"} if settings.dry else {}
    return Stage(name, weight, evidence.BENCHMARKS, [_python(*argv, **environment)], settings.new_rows)


def _tune(settings: Settings) -> Stage:
    """Its table goes to the files that a run leaves, and stands at the end of its log as well."""
    options = ["--dry", "--quick", "--ranks", "64"] if settings.dry else ["--out", str(settings.files.folder)]
    options += ["--commit", settings.commit] if settings.commit else []
    return Stage("tune", 540, evidence.BENCHMARKS, [_python("-m", "benchmarks.tune", "--minutes", "{minutes}", *options)])


def _tests(settings: Settings, workers: int, files: list[str]) -> Command:
    """Those marked `gpu`, side by side where pytest-xdist is there. A worker that loses the GPU ends alone
    (tests/lost_gpu.py)."""
    options = ["--all", "-v", "-m", "gpu", "--tb=short", "-o", "junit_logging=no", f"--junitxml={settings.files.path(evidence.JUNIT)}"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "200"]
    return _python("-m", "pytest", *options, *files, **ONE_THREAD)


def gpu_tests() -> list[str]:
    """Files with a test that is marked `gpu`, found by their text: others would only be collected, and need
    more packages for it."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in found if re.search(r"\bmark\.gpu\b", path.read_text(encoding="utf-8"))]


def _sanitizer(tool: str, weight: float, **environment: str) -> Stage:
    """On the kernels of csrc/ alone, which the namespace in their mangled names tells; torch's run as they
    are."""
    options = ["--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no", "--kernel-name", "kns=lowrank_kernels"]
    command = ["compute-sanitizer", *options, *_smoke("--operators", "--small").argv]
    return Stage(tool, weight, evidence.SANITIZER, [Command(command, environment)], evidence.sanitizer_line)


def _fuzz(cases: int, workers: int) -> Command:
    return _python("-m", "tests.fuzz", "--cases", str(cases), "--workers", str(workers), **ONE_THREAD)


def _facts() -> list[Command]:
    """Read, never set."""
    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    return [
        _python("-m", "lowrank_kernels"),
        Command(["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"]),
        Command(["nvidia-smi", f"--query-gpu={query}", "--format=csv"]),
    ]
