"""The example under FSDP2: what it learns, its sharded checkpoints, and another number of processes."""

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


@pytest.fixture(scope="module")
def killed(command, tmp_path_factory):
    """A run of GaLore of which a process died while it saved step 4."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    arguments = torchrun(command, "--out", directory, *RUN, *FSDP, "--optimizer", "galore")
    script = next(place for place, argument in enumerate(arguments) if str(argument).endswith("pretrain.py"))
    arguments[script] = Path(__file__).with_name("killed_while_saving.py")
    found = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert found.returncode != 0 and "exitcode: 9" in found.stderr.replace(" ", "").replace("exitcode:9", "exitcode: 9")
    return directory


def test_two_processes_learn_what_one_does(finished, pretrain, tmp_path):
    directory, printed = finished
    pretrain("--out", tmp_path / "alone", *RUN)
    for method in METHODS:
        alone, two = (rows(where / f"{method}.jsonl") for where in (tmp_path / "alone", directory))
        assert losses(directory, method) == pytest.approx(losses(tmp_path / "alone", method), **LOOSE)
        assert [row["val_loss"] for row in two if "val_loss" in row] == pytest.approx(
            [row["val_loss"] for row in alone if "val_loss" in row], **LOOSE
        )
        assert [row["grad_norm"] for row in two if "grad_norm" in row] == pytest.approx(
            [row["grad_norm"] for row in alone if "grad_norm" in row], rel=1e-3
        )
        for key in ("weight_bytes", "gradient_bytes"):
            assert two[-1][key] == alone[-1][key] / 2
        assert two[-1]["state_bytes"] < alone[-1]["state_bytes"] * 0.75
    assert "2 processes, FSDP2" in printed


def test_the_checkpoint_before_resumes_after_a_kill_while_saving(finished, killed, command, tmp_path):
    directory = shutil.copytree(killed, tmp_path / "run")
    assert {path.name for path in (directory / "galore.dcp").iterdir()} == {"2", "4"}
    done(command, "--out", directory, *FOUR, "--resume")
    assert trajectory(directory / "galore.jsonl") == trajectory(finished[0] / "galore.jsonl")
    assert [path.name for path in (directory / "galore.dcp").iterdir()] == ["6"]


def test_another_number_of_processes_goes_on(finished, killed, command, tmp_path):
    directory = shutil.copytree(killed, tmp_path / "run")
    subprocess_of_one = subprocess.run(
        torchrun(command, "--out", directory, *FOUR, "--resume", processes=1), capture_output=True, text=True, timeout=150
    )
    assert subprocess_of_one.returncode == 0, subprocess_of_one.stderr
    assert losses(directory, "galore") == pytest.approx(losses(finished[0], "galore"), **LOOSE)


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


def test_a_damaged_checkpoint_is_named(killed, command, tmp_path):
    directory = shutil.copytree(killed, tmp_path / "run")
    shutil.rmtree(directory / "galore.dcp" / "2")
    found = subprocess.run(torchrun(command, "--out", directory, *FOUR, "--resume"), capture_output=True, text=True, timeout=150)
    assert found.returncode != 0 and f"{directory / 'galore.dcp' / '2'} is damaged" in found.stderr + found.stdout


def test_what_cannot_work_is_refused(pretrain, tmp_path):
    found = pretrain("--out", tmp_path / "run", "--parallel", "fsdp2", status=2)
    assert "--parallel fsdp2 needs torchrun" in found.stderr and not (tmp_path / "run").exists()
