"""The example under FSDP2: what it learns, its sharded checkpoints, and another number of processes."""

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pretrain_runs import rows, trajectory
from test_pretrain_gradients import LOOSE, done, losses, torchrun

FOUR = ("--batch-size", "4", "--eval-sequences", "5")
"""An odd number of sequences, which two processes cannot share evenly."""
METHODS = ("adamw", "galore", "rso")
RUN = ("--optimizer", *METHODS, *FOUR)
FSDP = ("--parallel", "fsdp2", "--checkpoint-every", "2")


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fsdp") / "run"
    return directory, done(command, "--out", directory, *RUN, *FSDP).stdout


def killed(command, directory):
    """A run of GaLore of which a process dies while it saves step 4."""
    arguments = torchrun(command, "--out", directory, *RUN, *FSDP, "--optimizer", "galore")
    script = next(place for place, argument in enumerate(arguments) if str(argument).endswith("pretrain.py"))
    arguments[script] = Path(__file__).with_name("killed_while_saving.py")
    found = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert found.returncode != 0 and re.search(r"exitcode\s*: 9", found.stderr)
    assert {path.name for path in (directory / "galore.dcp").iterdir()} == {"2", "4"}


def test_two_processes_learn_what_one_does_and_survive_a_kill(finished, command, pretrain, tmp_path):
    """One test, so that one worker makes the runs that it compares."""
    directory, printed = finished
    assert "2 processes, FSDP2" in printed
    learn_what_one_does(directory, pretrain, tmp_path / "alone")
    killed(command, tmp_path / "killed")
    again = shutil.copytree(tmp_path / "killed", tmp_path / "again")
    done(command, "--out", again, *FOUR, "--resume")
    assert trajectory(again / "galore.jsonl") == trajectory(directory / "galore.jsonl")
    assert [path.name for path in (again / "galore.dcp").iterdir()] == ["6"]
    one = torchrun(command, "--out", tmp_path / "killed", *FOUR, "--resume", processes=1)
    subprocess.run(one, capture_output=True, text=True, timeout=150, check=True)
    assert losses(tmp_path / "killed", "galore") == pytest.approx(losses(directory, "galore"), **LOOSE)


def learn_what_one_does(directory, pretrain, alone):
    pretrain("--out", alone, *RUN)
    for method in METHODS:
        one, two = (rows(where / f"{method}.jsonl") for where in (alone, directory))
        assert losses(directory, method) == pytest.approx(losses(alone, method), **LOOSE)
        for key, close in (("val_loss", LOOSE), ("grad_norm", dict(rel=1e-3))):
            assert [row[key] for row in two if key in row] == pytest.approx([row[key] for row in one if key in row], **close)
        for key in ("weight_bytes", "gradient_bytes"):
            assert two[-1][key] == one[-1][key] / 2
        assert two[-1]["state_bytes"] < one[-1]["state_bytes"] * 0.75


@pytest.mark.slow
def test_a_stopped_run_goes_on(finished, command, tmp_path):
    directory = tmp_path / "run"
    arguments = torchrun(command, "--out", directory, *RUN, *FSDP)
    started = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (directory / "galore.pt").exists() and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=100)
    done(command, "--out", directory, *FOUR, "--resume")
    for method in METHODS:
        assert trajectory(directory / f"{method}.jsonl") == trajectory(finished[0] / f"{method}.jsonl")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(command, tmp_path):
    directory = tmp_path / "run"
    killed(command, directory)
    shutil.rmtree(directory / "galore.dcp" / "2")
    found = subprocess.run(torchrun(command, "--out", directory, *FOUR, "--resume"), capture_output=True, text=True, timeout=150)
    assert found.returncode != 0 and f"{directory / 'galore.dcp' / '2'} is damaged" in found.stderr + found.stdout


def test_what_cannot_work_is_refused(pretrain, tmp_path):
    found = pretrain("--out", tmp_path / "run", "--parallel", "fsdp2", status=2)
    assert "--parallel fsdp2 needs torchrun" in found.stderr and not (tmp_path / "run").exists()
