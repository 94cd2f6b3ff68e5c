"""The command, end to end."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from matrix import representative
from pretrain_runs import SCRIPT, rows, trajectory

METHODS = ("adamw", "galore", "i3s", "rso")
REFRESHES = {"adamw": [], "galore": [1, 3, 5], "i3s": [1, 3, 5], "rso": [2, 4, 6]}
"""Bases are chosen before the steps that count 0, 2, 4 before their increment; RSO draws after every second
step."""


@pytest.fixture(scope="module")
def finished(pretrain_process, tmp_path_factory):
    """One run of all optimizers, and what it printed."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    return directory, pretrain_process("--out", directory, "--optimizer", *METHODS).stdout


def test_metrics_are_complete(finished):
    directory, _ = finished
    for method in METHODS:
        found = rows(directory / f"{method}.jsonl")
        assert [row["step"] for row in found if row["event"] == "step"] == [1, 2, 3, 4, 5, 6]
        assert [row["step"] for row in found if row["event"] == "eval"] == [3, 6]
        assert [row["event"] for row in found].count("end") == 1 and found[-1]["event"] == "end"
        assert [row["step"] for row in found if row.get("refresh")] == REFRESHES[method]
        overlaps = [row["overlap"] for row in found if row.get("overlap") is not None]
        assert len(overlaps) == (2 if method in ("galore", "i3s") else 0)
        assert all(0 <= overlap <= 1 + 1e-4 for overlap in overlaps)


def test_every_optimizer_starts_alike(finished):
    directory, _ = finished
    first = [rows(directory / f"{method}.jsonl")[0] for method in METHODS]
    assert len({row["loss"] for row in first}) == 1 and len({row["grad_norm"] for row in first[:3]}) == 1
    later = [rows(directory / f"{method}.jsonl")[-2]["val_loss"] for method in METHODS]
    assert len(set(later)) == 4


def test_table_and_summary_agree_with_the_metrics(finished):
    directory, printed = finished
    results = json.loads((directory / "summary.json").read_text())["results"]
    assert list(results) == list(METHODS)
    lines = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in printed.splitlines() if "│" in line}
    for column, (method, figures) in enumerate(results.items()):
        found = rows(directory / f"{method}.jsonl")
        val_loss = found[-2]["val_loss"]
        assert figures["val_loss"] == val_loss
        assert figures["perplexity_per_byte"] == pytest.approx(math.exp(val_loss))
        assert figures["bits_per_byte"] == pytest.approx(val_loss / math.log(2))
        assert figures["state_bytes"] == found[-1]["state_bytes"]
        ordinary = sorted(row["optimizer_ms"] for row in found if row["event"] == "step" and row["step"] > 1 and not row.get("refresh"))
        assert ordinary[0] <= figures["step_ms"] <= ordinary[-1]
        assert lines["held-out loss, nats per byte"][column] == f"{val_loss:.4f}"
        assert lines["optimizer state, MB"][column] == f"{found[-1]['state_bytes'] / 1e6:.2f}"
    assert results["galore"]["state_bytes"] < results["adamw"]["state_bytes"]
    assert results["galore"]["overlap"] is not None and results["adamw"]["overlap"] is None
    assert results["rso"]["activation_bytes"] < results["galore"]["activation_bytes"] == results["adamw"]["activation_bytes"]
    saved = [figures["activation_bytes"] for figures in results.values()]
    assert lines["activations saved for backward, MB"] == [f"{size / 1e6:.2f}" for size in saved]


def test_the_table_says_what_low_rank_costs_and_what_it_saves(finished):
    directory, printed = finished
    results = json.loads((directory / "summary.json").read_text())["results"]
    assert "AdamW against AdamW" not in printed
    for method, title in (("galore", "GaLore"), ("i3s", "I3S"), ("rso", "RSO")):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{title} against AdamW, full rank: "))
        assert f"loss {results[method]['val_loss'] - results['adamw']['val_loss']:+.3f} nats" in line
        assert f"optimizer state × {results[method]['state_bytes'] / results['adamw']['state_bytes']:.2f}" in line
        assert f"saved activations × {results[method]['activation_bytes'] / results['adamw']['activation_bytes']:.2f}" in line


def test_the_picture_is_a_picture(finished):
    directory, _ = finished
    from matplotlib.image import imread

    image = imread(directory / "curves.png")[..., :3]
    assert image.shape[0] > 600 and image.shape[1] > 1200
    from matplotlib.colors import to_rgb
    from methods import METHODS as offered

    for method in METHODS:  # each line was drawn
        assert (abs(image - to_rgb(offered[method].color)).max(-1) < 0.02).sum() > 100, method


def test_the_same_command_gives_the_same_losses(finished, pretrain, pretrain_process, tmp_path):
    directory, _ = finished
    pretrain_process("--out", tmp_path / "again", "--optimizer", *METHODS)
    pretrain("--out", tmp_path / "seeded", "--optimizer", "adamw", "--seed", 1)
    for method in METHODS:
        assert trajectory(tmp_path / "again" / f"{method}.jsonl") == trajectory(directory / f"{method}.jsonl")
    assert trajectory(tmp_path / "seeded" / "adamw.jsonl") != trajectory(directory / "adamw.jsonl")


LONG = ("--steps", 40, "--eval-every", 7, "--checkpoint-every", 4, "--update-proj-gap", 5, "--inner-steps", 5)
LONG = (*LONG, "--optimizer", "galore", "rso", "i3s")


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(pretrain, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    pretrain("--out", directory, *LONG)
    return directory


@pytest.mark.parametrize(
    ("method", "at_line"),
    representative([("galore", 1), ("galore", 23), ("rso", 18), ("i3s", 14)], lambda method, at_line: method == "i3s"),
)
def test_killed_at_any_moment_it_resumes_bit_for_bit(uninterrupted, command, pretrain, tmp_path, method, at_line):
    directory = tmp_path / "run"
    process = subprocess.Popen([sys.executable, SCRIPT, *command("--out", directory, *LONG)], stdout=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 60
        while lines(directory / f"{method}.jsonl") < at_line and time.monotonic() < deadline_s:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    written = lines(directory / f"{method}.jsonl")
    assert at_line <= written < lines(uninterrupted / f"{method}.jsonl"), "the kill came too late to show anything"
    first = (directory / "galore.jsonl").stat() if method == "i3s" else None

    pretrain("--out", directory, *LONG, "--resume")
    for each in ("galore", "rso", "i3s"):
        assert trajectory(directory / f"{each}.jsonl") == trajectory(uninterrupted / f"{each}.jsonl")
    if first:  # what was finished before is not run again
        assert (directory / "galore.jsonl").stat().st_mtime_ns == first.st_mtime_ns
    assert json.loads((directory / "summary.json").read_text())["results"].keys() == {"galore", "rso", "i3s"}


def test_ctrl_c_saves_the_step_under_way(uninterrupted, command, pretrain, tmp_path):
    directory = tmp_path / "run"
    long = (*LONG, "--checkpoint-every", 1000)
    process = subprocess.Popen([sys.executable, SCRIPT, *command("--out", directory, *long)], stdout=subprocess.PIPE, text=True)
    while lines(directory / "galore.jsonl") < 5:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    saved_step = rows(directory / "galore.jsonl")[-1]["step"]
    assert f"GaLore is saved at step {saved_step}" in printed and f"--resume --out {directory}" in printed
    resumed = pretrain("--out", directory, *long, "--resume")
    assert f"from its checkpoint at step {saved_step}" in resumed.stdout
    assert trajectory(directory / "i3s.jsonl") == trajectory(uninterrupted / "i3s.jsonl")
    assert trajectory(directory / "galore.jsonl") == trajectory(uninterrupted / "galore.jsonl")


def test_the_second_signal_acts_as_usual():
    from stopping import stop_on_signal

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        before = signal.getsignal(signal.SIGTERM)
        with stop_on_signal() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_an_optimizer_can_be_added_to_a_finished_run(finished, pretrain, tmp_path):
    directory, _ = finished
    pretrain("--out", tmp_path / "run", "--optimizer", "adamw")
    before_ns = (tmp_path / "run" / "adamw.jsonl").stat().st_mtime_ns
    pretrain("--out", tmp_path / "run", "--optimizer", "i3s", "--resume")
    assert trajectory(tmp_path / "run" / "i3s.jsonl") == trajectory(directory / "i3s.jsonl")
    assert (tmp_path / "run" / "adamw.jsonl").stat().st_mtime_ns == before_ns
    assert list(json.loads((tmp_path / "run" / "summary.json").read_text())["results"]) == ["adamw", "i3s"]


@pytest.mark.parametrize(
    "changed",
    [
        ("--steps", "7"),
        ("--seed", "1"),
        ("--rank", "5"),
        ("--inner-steps", "3"),
        ("--distribution", "haar"),
        ("--scale", "0.5"),
        ("--dtype", "bf16"),
        ("--lr", "galore=0.5"),
        ("--dense-lr", "0.5"),
        ("--seq-len", "16"),
        ("--weight-decay", "0.1"),
        ("--accumulate", "2"),
    ],
)
def test_a_changed_argument_is_refused_on_resume(finished, changed):
    """In this process: the refusal comes before any work."""
    import pretrain as script

    directory, _ = finished
    with pytest.raises(script.SettingsError, match=rf"{changed[0]} .*was started with .* cannot change"):
        script.resumed_plan(script.parser().parse_args([*changed, "--resume"]), directory)


def test_changed_text_is_refused_on_resume(pretrain, prose, tmp_path):
    copy = tmp_path / "text.txt"
    shutil.copy(prose, copy)
    pretrain("--out", tmp_path / "run", "--optimizer", "adamw", "--data", copy)
    copy.write_text(copy.read_text() + "One more line.\n")
    failed = pretrain("--out", tmp_path / "run", "--resume", "--data", copy, status=2)
    assert "text.txt (its last 5% held out) has changed" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank must be a positive integer, got 0"),
        (["--update-proj-gap", "0"], "--update-proj-gap must be a positive integer, got 0"),
        (["--steps", "-3"], "--steps must be a positive integer, got -3"),
        (["--inner-steps", "0"], "--inner-steps must be a positive integer, got 0"),
        (["--rso-rank", "129"], "--rso-rank 129 is more than the width of tiny, 128"),
        (["--rso-rank", "1", "--distribution", "principal"], "--distribution principal needs a --rso-rank of 2 at least, got 1"),
        (["--principal-rank", "64", "--distribution", "principal"], "--principal-rank 64 is not less than --rso-rank"),
        (["--scale", "0"], "--scale must be positive"),
        (["--clip", "-1"], "--clip must not be negative"),
        (["--batch-size", "6", "--accumulate", "4"], "--accumulate 4 does not divide --batch-size 6"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--lr", "fast"], "'fast' is not a number"),
        (["--lr", "adamw=1e-3", "galor=1e-2"], "'galor' is not among the optimizers"),
        (["--lr", "i3s=1e-2", "--optimizer", "adamw"], "'i3s' is not among the optimizers of this run (adamw)"),
        (["--lr", "1e-3", "1e-2"], "one number for all optimizers"),
        (["--lr", "nan"], "must be positive and finite"),
        (["--lr", "0"], "must be positive and finite"),
        (["--data", "/does/not/exist"], "no such file or directory"),
        (["--seq-len", "5000"], "less than one sequence"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be a positive integer"),
        (["--resume", "--out", "/does/not/exist"], "holds no run"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, prose, tmp_path, monkeypatch, capsys):
    import pretrain as script

    monkeypatch.chdir(tmp_path)
    try:
        status = script.main(["--data", str(prose), *arguments])
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_run_is_not_overwritten(finished, pretrain):
    directory, _ = finished
    before = trajectory(directory / "adamw.jsonl")
    failed = pretrain("--out", directory, status=2)
    assert "already holds a run: add --resume" in failed.stderr
    assert trajectory(directory / "adamw.jsonl") == before


def test_runs_are_numbered_and_the_latest_is_resumed(pretrain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        pretrain("--optimizer", "adamw")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-001", "tiny-002"]
    resumed = pretrain("--resume").stdout
    assert "AdamW: finished before" in resumed and "tiny-002" in resumed


def test_training_works_without_matplotlib(pretrain_process, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    done = pretrain_process("--out", tmp_path / "run", "--optimizer", "adamw", env={"PYTHONPATH": str(tmp_path)})
    assert done.stderr.count("matplotlib is not installed (pip install 'lowrank-kernels[demo]')") == 1
    assert (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "curves.png").exists()


def test_without_rich_it_says_what_to_install(pretrain_process, tmp_path):
    (tmp_path / "rich.py").write_text("raise ImportError('not here')")
    failed = pretrain_process("--out", tmp_path / "run", env={"PYTHONPATH": str(tmp_path)}, status=2)
    assert "rich cannot be imported (not here): pip install 'lowrank-kernels[demo]'" in failed.stderr


def test_a_log_has_plain_lines(finished):
    _, printed = finished
    assert "\x1b" not in printed and "\r" not in printed
    assert "rank 4 of 128, refresh every 2 steps; RSO rank 8, every 2" in printed
    assert sum(line.strip().startswith("I3S") and "held-out" in line for line in printed.splitlines()) >= 2


def test_a_divergence_is_reported_and_the_others_go_on(pretrain, tmp_path):
    done = pretrain("--out", tmp_path / "run", "--optimizer", "adamw", "i3s", "--lr", "adamw=1e30", "i3s=1e-3", status=1)
    assert "AdamW diverged at step" in done.stdout
    assert list(json.loads((tmp_path / "run" / "summary.json").read_text())["results"]) == ["i3s"]


def test_help_says_what_the_sizes_mean(capsys):
    import pretrain as script

    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "vocabulary of 256 bytes they have fewer" in " ".join(capsys.readouterr().out.split())
