"""The example as its users run it, and in this process where a command of its own would show nothing more."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain.py"
sys.path.insert(0, str(SCRIPT.parent))

MICRO = ["--steps", "6", "--batch-size", "2", "--seq-len", "32", "--rank", "4", "--update-proj-gap", "2", "--eval-every", "3",
         "--eval-sequences", "4", "--threads", "1"]
PROSE = "".join(f"{n} bottles of beer on the wall, take one down, pass it around, {n - 1} left.\n" for n in range(400, 0, -1))


@pytest.fixture(scope="session")
def prose(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE)
    return path


@dataclass
class Done:
    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def command(prose):
    """The arguments of a micro run on the prose; later ones win."""
    return lambda *arguments: [*MICRO, "--data", str(prose), *map(str, arguments)]


@pytest.fixture(scope="session")
def pretrain_process(command):
    """Run it as a command, in a process of its own. An exit status other than `status` fails the test with what it printed."""

    def run(*arguments, status=0, cwd=None, env=None) -> Done:
        done = subprocess.run([sys.executable, SCRIPT, *command(*arguments)], capture_output=True, text=True, cwd=cwd,
                              env=None if env is None else os.environ | env, timeout=120)
        assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def pretrain(command):
    """The same in this process, which spares the seconds it takes to import torch."""

    def run(*arguments, status=0) -> Done:
        import pretrain as script

        with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
            returned = script.main(command(*arguments))
        assert returned == status, f"exit {returned}\n{stdout.getvalue()}\n{stderr.getvalue()}"
        return Done(returned, stdout.getvalue(), stderr.getvalue())

    return run


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trajectory(path: Path) -> list[dict]:
    """The rows without what a clock or the memory counter put there: bit-identical whenever the arithmetic is."""
    return [{key: value for key, value in row.items() if key not in ("optimizer_ms", "wall_s", "peak_bytes")} for row in rows(path)]
