"""Stages one after another, each a subprocess in a process group of its own, with a part of the time and a
file for its output.

Whatever a stage does, the next one runs. The summary stands in its file after each of them, and is whole when
the runner is told to end.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import evidence

ROOT = Path(__file__).parents[2]
GRACE_S = 8.0
"""What is out of time is interrupted, so that it may write what it knows, and killed so much later."""
LATER_SHARE = 0.15
"""Of a stage's time that is kept for each of the commands after one."""
POLL_S = 0.05


class Ended(BaseException):
    """SIGTERM or SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True)
class Command:
    """`argv` with `environment` beside the runner's. `{seconds}` or `{minutes}` in an argument is what
    it may measure for."""

    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """`weight`: its part of the time. `log`: the file of its output, which stages may share. `headline`: of
    that output."""

    name: str
    weight: float
    log: str
    commands: Sequence[Command]
    headline: Callable[[str], str] = evidence.last_line


@dataclass
class Outcome:
    name: str
    state: str = "not run"
    """ok, FAILED (exit status), TIME OUT, missing (a program), INTERRUPTED, not run."""
    seconds: float = 0.0
    headline: str = ""

    @property
    def bad(self) -> bool:
        return self.state not in ("ok", "missing")


def run(stages: Sequence[Stage], files: evidence.Files, seconds: float) -> list[Outcome]:
    """Runs all of them in `seconds`. What one leaves of its part is the later ones', each of which takes up
    to thrice its own."""
    outcomes = [Outcome(stage.name) for stage in stages]
    ends = time.monotonic() + seconds
    unit = seconds / sum(stage.weight for stage in stages)
    try:
        with _ending():
            for number, (stage, outcome) in enumerate(zip(stages, outcomes, strict=True)):
                outcome.state = "running"
                files.write_summary(outcomes)
                left = ends - time.monotonic()
                limit = stage.weight * min(left / sum(later.weight for later in stages[number:]), 3 * unit)
                print(f"[{seconds - left:4.0f} s] {stage.name}, at most {limit:.0f} s", flush=True)
                _run_stage(stage, outcome, files, limit)
                print(f"        {outcome.state} {outcome.headline}", flush=True)
    except Ended as end:
        for outcome in outcomes:
            if outcome.state == "running":
                outcome.state = "INTERRUPTED"
        print(f"ended by {end}", flush=True)
    finally:
        files.trim()
        files.write_summary(outcomes)
    return outcomes


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """SIGTERM and SIGINT raise Ended, once: what follows is quick, and not to be cut short."""

    def end(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_stage(stage: Stage, outcome: Outcome, files: evidence.Files, limit: float) -> None:
    start = time.monotonic()
    path = files.path(stage.log)
    states = []
    begin = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as log:
            for number, command in enumerate(stage.commands):
                kept = LATER_SHARE * limit * (len(stage.commands) - number - 1)
                states.append(_run_command(stage.name, command, log, limit - (time.monotonic() - start) - kept))
    finally:
        outcome.seconds = time.monotonic() - start
    outcome.state = next((state for state in states if state not in ("ok", "missing")), "missing" if "missing" in states else "ok")
    outcome.headline = stage.headline(evidence.read_from(path, begin))


def _run_command(stage: str, command: Command, log, limit: float) -> str:
    """Its outcome in a word or two."""
    seconds = max(1.0, 0.8 * limit - GRACE_S / 2)
    argv = [argument.replace("{seconds}", f"{seconds:.0f}").replace("{minutes}", f"{seconds / 60:.2f}") for argument in command.argv]
    settings = " ".join(f"{name}={value}" for name, value in command.environment.items())
    log.write(f"\n===== {stage}: {settings} {shlex.join(argv)}   (at most {limit:.0f} s)\n".encode())
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "PYTHONUTF8": "1"} | dict(command.environment)
    try:
        process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_default_signals,
        )  # fmt: skip
    except OSError as error:
        log.write(f"{argv[0]} cannot be run here: {error.strerror}\n".encode())
        return "missing"
    try:
        return _wait(process, limit)
    finally:
        _kill_group(process)  # and whoever it left behind


def _wait(process: subprocess.Popen, limit: float) -> str:
    grace = min(GRACE_S, limit / 6)
    if _ends_within(process, limit - grace):
        return "ok" if process.returncode == 0 else f"FAILED ({_status(process.returncode)})"
    process.send_signal(signal.SIGINT)
    _ends_within(process, grace)
    return "TIME OUT"


def _status(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _ends_within(process: subprocess.Popen, seconds: float) -> bool:
    """By looking again and again: a handler of a signal must be able to raise in between."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def _default_signals() -> None:
    """In the child: where the runner itself was started in the background SIGINT would be ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
