"""Gradients that are projected in the backward pass, and what several processes of torchrun exchange."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
from pretrain_runs import SCRIPT, rows, trajectory

LOOSE = dict(rel=1e-4, abs=1e-4)


def losses(directory, method):
    return [row["loss"] for row in rows(directory / f"{method}.jsonl") if row["event"] == "step"]


def torchrun(command, *arguments, processes=2):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", SCRIPT, *command(*arguments)]


def done(command, *arguments, status=0):
    found = subprocess.run(torchrun(command, *arguments), capture_output=True, text=True, timeout=150)
    assert found.returncode == status, found.stdout + found.stderr
    return found


# In one process.


@pytest.mark.parametrize("way", ["deferred", "immediately"])
def test_the_losses_are_those_of_full_gradients(pretrain, tmp_path, way):
    arguments = ("--optimizer", "adamw", "galore", "i3s", "rso", "--clip", "0")
    pretrain("--out", tmp_path / "full", *arguments)
    pretrain("--out", tmp_path / "thin", *arguments, "--in-backward", *([] if way == "deferred" else [way]))
    ends = {}
    for method in ("adamw", "galore", "i3s", "rso"):
        assert losses(tmp_path / "thin", method) == losses(tmp_path / "full", method)
        ends[method] = [rows(tmp_path / name / f"{method}.jsonl")[-1]["gradient_bytes"] for name in ("full", "thin")]
    assert ends["adamw"][0] == ends["adamw"][1] == ends["galore"][0]
    assert ends["galore"][1] < ends["galore"][0] / 3 and ends["rso"][0] == ends["rso"][1]
    steps = [row for row in rows(tmp_path / "thin" / "galore.jsonl") if row["event"] == "step"]
    assert all((row["grad_norm"] is None) == (way == "immediately") for row in steps)


def test_a_lift_that_needs_the_gradient_is_possible_at_once(pretrain, tmp_path):
    pretrain("--out", tmp_path / "full", "--optimizer", "fira", "apollo", "--clip", "0")
    pretrain("--out", tmp_path / "thin", "--optimizer", "fira", "apollo", "--clip", "0", "--in-backward", "immediately")
    for method in ("fira", "apollo"):
        assert losses(tmp_path / "thin", method) == losses(tmp_path / "full", method)


def test_micro_batches_and_clipping(pretrain, tmp_path):
    pretrain("--out", tmp_path / "run", "--optimizer", "galore", "--in-backward", "--accumulate", "2", "--clip", "0.01")
    pretrain("--out", tmp_path / "free", "--optimizer", "galore", "--in-backward", "--accumulate", "2")
    assert all(row["grad_norm"] > 0.01 for row in rows(tmp_path / "run" / "galore.jsonl") if row["event"] == "step")
    assert losses(tmp_path / "run", "galore") != losses(tmp_path / "free", "galore")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--in-backward", "immediately"), "needs --clip 0 and --accumulate 1"),
        (("--in-backward", "immediately", "--clip", "0", "--accumulate", "2"), "needs --clip 0 and --accumulate 1"),
        (("--in-backward", "--optimizer", "fira"), "--in-backward deferred keeps no gradient, by which Fira moves weights; leave fira out"),
        (("--compress-gradients",), "--compress-gradients needs several processes: torchrun"),
    ],
)
def test_what_cannot_work_is_refused(pretrain, tmp_path, arguments, message):
    found = pretrain("--out", tmp_path / "run", *arguments, status=2)
    assert message in found.stderr and len(found.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


# In two processes.

FOUR = ("--batch-size", "4")
RUN = ("--optimizer", "adamw", "galore", "rso", "--clip", "0", *FOUR)  # clipping would see ‖R‖ where one process sees ‖G‖


@pytest.fixture(scope="module")
def compressed(command, tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes") / "run"
    return directory, done(command, "--out", directory, *RUN, "--compress-gradients").stdout


def test_two_processes_learn_what_one_does(compressed, pretrain, tmp_path):
    directory, printed = compressed
    pretrain("--out", tmp_path / "alone", *RUN)
    for method in ("adamw", "galore", "rso"):
        assert losses(directory, method) == pytest.approx(losses(tmp_path / "alone", method), **LOOSE)
        val = [
            [row["val_loss"] for row in rows(where / f"{method}.jsonl") if "val_loss" in row] for where in (directory, tmp_path / "alone")
        ]
        assert val[0] == pytest.approx(val[1], **LOOSE)
    assert "2 processes" in printed and "sent by a process, mean MB a step" in printed


def test_bytes_sent(compressed):
    directory, _ = compressed
    sent = {m: [row["sent_bytes"] for row in rows(directory / f"{m}.jsonl") if "sent_bytes" in row] for m in ("adamw", "galore", "rso")}
    assert len(set(sent["adamw"])) == 1 and len(set(sent["rso"])) == 1
    whole, thin = sent["galore"][0], sent["galore"][1]
    assert sent["galore"] == [whole, thin] * 3 and whole == sent["adamw"][0] and thin < whole / 4  # a refresh every two steps
    assert sent["rso"][0] < whole / 2


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_goes_on(compressed, command, tmp_path):
    directory = tmp_path / "run"
    started = subprocess.Popen(
        torchrun(command, "--out", directory, *RUN, "--compress-gradients", "--checkpoint-every", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (directory / "galore.pt").exists() and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=100)
    done(command, "--out", directory, *FOUR, "--resume")
    for method in ("adamw", "galore", "rso"):
        assert trajectory(directory / f"{method}.jsonl") == trajectory(compressed[0] / f"{method}.jsonl")


def test_another_number_of_processes_is_refused(compressed, pretrain, tmp_path):
    directory = shutil.copytree(compressed[0], tmp_path / "run")
    found = pretrain("--out", directory, *FOUR, "--resume", status=2)
    assert "was started with 2 processes, not 1" in found.stderr
