"""What a GPU is asked, in the order of what answers are worth: does it build, is it right at all, the first figures, then the rest."""

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
    """Weights are seconds of nine minutes."""
    dry, workers = settings.dry, max(1, (os.cpu_count() or 1) - 2)
    steps = "--models 4x64 --ranks 8 --dtypes fp32" if dry else "--models 350m 1b 7b --ranks 128 --dtypes bf16"
    refresh = "--models 4x64 --ranks 8 --dtypes fp32" if dry else ""
    first = "--suite step --models 4x64 --ranks 8 --dtypes fp32" if dry else "--suite step --suite kernel --suite refresh"
    nothing_to_tune = "print('There is no tuner yet: the tile shapes are those of lowrank_kernels/kernels/configs.py.')"
    return [
        Stage("build", 80, evidence.MACHINE, [_build(dry), _python("-m", "benchmarks.gpu.smoke", "--registered")]),
        Stage("smoke", 50, evidence.MACHINE, [_python("-m", "benchmarks.gpu.smoke", *(["--small"] if dry else []))]),
        _benchmark(settings, "headline", 60, f"{first} --quick"),
        Stage("tests", 135, evidence.TESTS, _tests(settings, workers)),
        _sanitizer("memcheck", 40, dry, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        _sanitizer("racecheck", 40, dry, {}),
        _benchmark(settings, "step", 40, f"--suite step {steps}"),
        _benchmark(settings, "refresh", 30, f"--suite refresh {refresh}"),
        _benchmark(settings, "host", 15, "--suite host"),
        Stage("fuzz", 35, evidence.FUZZ, [_fuzz(4 if dry else 150, min(12, workers))]),
        Stage("facts", 15, evidence.MACHINE, _facts()),
        Stage("tune", 1, evidence.MACHINE, [_python("-c", nothing_to_tune)]),
        _benchmark(settings, "full", 540, f"{first} --quick" if dry else ""),
    ]


def _python(*arguments: str, **environment: str) -> Command:
    return Command([sys.executable, *arguments], environment)


def _build(dry: bool) -> Command:
    """The whole extension, its CUDA part included or not at all. Dry: setup.py to where it would compile, beside the tree."""
    if dry:
        scratch = ROOT / "build" / "dry"
        return _python("setup.py", "--quiet", "build_ext", "--build-lib", str(scratch), LOWRANK_KERNELS_BUILD="0")
    return _python("setup.py", "--quiet", "build_ext", "--inplace", LOWRANK_KERNELS_BUILD=os.environ.get("LOWRANK_KERNELS_BUILD", "cuda"))


def _benchmark(settings: Settings, name: str, weight: float, options: str) -> Stage:
    seconds = "6" if settings.dry else "{seconds}"
    argv = ["-m", "benchmarks", *options.split(), "--seconds", seconds, "--file", str(settings.files.path(evidence.ROWS))]
    argv += ["--commit", settings.commit] if settings.commit else []
    argv += ["--wheels", str(settings.wheels)] if settings.wheels else []
    environment = {"TORCH_COMPILE_DISABLE": "1"} if settings.dry else {}
    return Stage(name, weight, evidence.BENCHMARKS, [_python(*argv, **environment)], settings.new_rows)


def _tests(settings: Settings, workers: int) -> list[Command]:
    """Those marked `gpu`, side by side where pytest-xdist is there. A worker that loses the GPU ends alone (tests/lost_gpu.py)."""
    files = gpu_tests()
    options = ["-m", "gpu", "--tb=short", "-o", "junit_logging=no", f"--junitxml={settings.files.path(evidence.JUNIT)}", "-v"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(1 if settings.dry else min(14, workers)), "--dist", "worksteal", "--max-worker-restart", "200"]
    if settings.dry:
        return [_python("-m", "pytest", *options, "tests/test_philox.py", **ONE_THREAD)]
    return [_python("-m", "pytest", *options, *files, **ONE_THREAD)]


def gpu_tests() -> list[str]:
    """Files with a test that is marked `gpu`, found by their text: others would only be collected, and need more packages for it."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in found if re.search(r"\bmark\.gpu\b", path.read_text(encoding="utf-8"))]


def _sanitizer(tool: str, weight: float, dry: bool, environment: dict[str, str]) -> Stage:
    """On the kernels of csrc/ alone, which the namespace in their mangled names tells; torch's run as they are."""
    options = ["--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no", "--kernel-name", "kns=lowrank_kernels"]
    command = ["compute-sanitizer", *options, sys.executable, "-m", "benchmarks.gpu.smoke", "--operators", "--small"]
    return Stage(tool, weight, evidence.SANITIZER, [Command(command, environment)], evidence.sanitizer_line)


def _fuzz(cases: int, workers: int) -> Command:
    return _python("-m", "tests.fuzz", "--cases", str(cases), "--workers", str(workers), **ONE_THREAD)


def _facts() -> list[Command]:
    """Read, never set."""
    query = (
        "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,mig.mode.current"
    )
    return [
        _python("-m", "lowrank_kernels"),
        Command(["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"]),
        Command(["nvidia-smi", f"--query-gpu={query}", "--format=csv"]),
    ]
