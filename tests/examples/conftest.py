"""The example as its users run it, and in this process where a command of its own would show nothing more."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pretrain_runs import MICRO, PROSE, SCRIPT

sys.path.insert(0, str(SCRIPT.parent))


@pytest.fixture(autouse=True)
def threads():
    """A run in this process sets the number of CPU threads; the tests after it get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
    """Run it as a command, in a process of its own. An exit status other than `status` fails the test with
    what it printed."""

    def run(*arguments, status=0, cwd=None, env=None) -> Done:
        done = subprocess.run(
            [sys.executable, SCRIPT, *command(*arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=None if env is None else os.environ | env,
            timeout=120,
        )
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
