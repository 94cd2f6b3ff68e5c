"""What can go wrong with a run's directory: a second process, a full disk, damaged files. One sentence each,
and nothing is written."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import exclusive
import pytest
import torch
from checkpoints import Damaged, write_atomically
from pretrain_runs import SCRIPT, rows, trajectory
from settings import SettingsError

RUN = ("--optimizer", "galore", "i3s", "--checkpoint-every", 2)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(pretrain, *arguments) -> str:
    """The one sentence that it printed."""
    done = pretrain(*arguments, status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("pretrain.py: error: ") and not done.stdout
    return line


@pytest.fixture(scope="module")
def stopped(pretrain, tmp_path_factory):
    """A run that was stopped after GaLore's checkpoint of step 4, with a row of step 5 behind it; do not
    alter it."""
    import training

    directory = tmp_path_factory.mktemp("stopped") / "run"
    original = training.train_step

    def fail_at_step_6(model, optimizer, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return original(model, optimizer, step, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_step", fail_at_step_6)
        pretrain("--out", directory, *RUN)
    assert rows(directory / "galore.jsonl")[-1]["step"] == 5 and not (directory / "i3s.jsonl").exists()
    return directory


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(pretrain, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    pretrain("--out", directory, *RUN)
    return directory


def test_the_stopped_run_resumes(copy, whole, pretrain):
    """Or the refusals below would show nothing."""
    pretrain("--out", copy, "--resume")
    for method in ("galore", "i3s"):
        assert trajectory(copy / f"{method}.jsonl") == trajectory(whole / f"{method}.jsonl")


# Two processes.


@pytest.mark.skipif(exclusive.fcntl is None, reason="no fcntl")
def test_a_second_process_in_a_directory_is_refused(command, pretrain, tmp_path, monkeypatch):
    import pretrain as script

    monkeypatch.setattr(script, "run", lambda *_, **__: pytest.fail("it trains"))  # for the better part of an hour
    directory = tmp_path / "run"
    long = command("--out", directory, "--optimizer", "adamw", "--steps", 100_000)
    process = subprocess.Popen([sys.executable, SCRIPT, *long], stdout=subprocess.DEVNULL)
    try:
        while not (directory / "adamw.jsonl").exists() or len((directory / "adamw.jsonl").read_bytes().split(b"\n")) < 6:
            assert process.poll() is None
            time.sleep(0.01)
        for resume in ([], ["--resume"]):
            said = refused(pretrain, "--out", directory, "--optimizer", "adamw", "--steps", 100_000, *resume)
            assert ("already holds a run" if not resume else "another process trains in it") in said
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with exclusive.exclusive(directory) as locked:  # the system let go of it
        assert locked
    steps = [row["step"] for row in checkpoints.read_metrics(directory / "adamw.jsonl") if row["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 4


@pytest.mark.skipif(exclusive.fcntl is None, reason="no fcntl")
def test_two_new_runs_that_start_together(pretrain, tmp_path):
    """The other process has made the directory and taken its lock, but not saved its settings yet."""
    directory = tmp_path / "run"
    with exclusive.exclusive(directory):
        assert "another process trains in it" in refused(pretrain, "--out", directory)
    assert contents(directory) == {exclusive.LOCK: b""}
    pretrain("--out", directory, "--optimizer", "adamw")


def test_a_run_begun_between_the_look_and_the_lock_is_not_overwritten(pretrain, tmp_path, monkeypatch):
    import pretrain as script

    new_plan = script.new_plan

    def meanwhile(args, processes):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / script.PLAN).write_text("another's")
        return new_plan(args, processes)

    monkeypatch.setattr(script, "new_plan", meanwhile)
    assert "already holds a run" in refused(pretrain, "--out", tmp_path / "run")
    assert (tmp_path / "run" / script.PLAN).read_text() == "another's"


def test_without_locks_it_says_so_and_trains(pretrain, tmp_path, monkeypatch):
    monkeypatch.setattr(exclusive, "fcntl", None)
    done = pretrain("--out", tmp_path / "run", "--optimizer", "adamw")
    assert done.stderr.count("nothing keeps a second process from writing there too") == 1


def test_partial_files_of_two_processes_have_two_names(tmp_path, monkeypatch):
    seen = []
    for pid in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        write_atomically(tmp_path / "file", lambda file: seen.append(Path(file.name).name))
    assert seen == ["file.11.partial", "file.12.partial"]


@pytest.mark.skipif(exclusive.fcntl is None, reason="no fcntl")
def test_partial_files_of_killed_processes_are_removed(copy, pretrain):
    for name in ("galore.pt.123.partial", "rso.pt.7.partial", "settings.json.9.partial", "curves.png.1.partial", "mine.partial"):
        (copy / name).write_bytes(b"left")
    pretrain("--out", copy, "--resume")
    assert [path.name for path in copy.glob("*.partial")] == ["mine.partial"]


# A full disk.


@pytest.mark.parametrize("fails", ["write", "fsync", "rename"])
def test_a_failed_write_leaves_no_partial_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"whole"))

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails != "write":
        monkeypatch.setattr(os, {"fsync": "fsync", "rename": "replace"}[fails], fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail if fails == "write" else lambda file: file.write(b"new"))
    assert contents(tmp_path) == {"file": b"whole"}


def test_a_checkpoint_that_finds_the_disk_full_says_so(copy, pretrain, whole):
    """The kernel's own refusal: no file may grow beyond 100 kB, far less than a checkpoint."""
    before = contents(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        done = pretrain("--out", copy, "--resume", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = done.stderr.splitlines()
    assert os.strerror(errno.EFBIG) in line and "goes on from what was saved before" in line
    assert not list(copy.glob("*.partial")) and (copy / "galore.pt").read_bytes() == before["galore.pt"]
    pretrain("--out", copy, "--resume")
    assert trajectory(copy / "galore.jsonl") == trajectory(whole / "galore.jsonl")


# Damaged files.


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_byte_anywhere_in_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "checkpoint"
    checkpoints.save(path, {"model": torch.arange(300.0), "step": 3})
    assert torch.equal(checkpoints.load(path)["model"], torch.arange(300.0))
    assert torch.equal(torch.load(path, weights_only=True)["model"], torch.arange(300.0))  # for people, without this module
    size = path.stat().st_size
    for at in [*range(0, size, 29), *range(size - checkpoints.TRAILER_BYTES, size)]:
        flip(path, at)
        with pytest.raises(Damaged, match="its checksum does not fit"):
            checkpoints.load(path)
        flip(path, at)
    checkpoints.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:100_000]), marks=pytest.mark.slow),
        lambda path: path.write_bytes(b""),
        pytest.param(lambda path: path.write_bytes(b"garbage " * 1000), marks=pytest.mark.slow),
    ],
    ids=["flipped", "a-byte-short", "truncated", "empty", "garbage"],
)
def test_a_damaged_checkpoint_is_refused(copy, pretrain, whole, damage):
    damage(copy / "galore.pt")
    before = contents(copy)
    assert "galore.pt is damaged" in refused(pretrain, "--out", copy, "--resume")
    assert contents(copy) == before
    (copy / "galore.pt").unlink()  # as the message says
    pretrain("--out", copy, "--resume")
    assert trajectory(copy / "galore.jsonl") == trajectory(whole / "galore.jsonl")


def test_damage_of_a_later_optimizer_is_found_before_the_first_one_trains(copy, pretrain):
    (copy / "i3s.pt").write_bytes(b"")
    before = contents(copy)
    assert "i3s.pt is damaged" in refused(pretrain, "--out", copy, "--resume")
    assert contents(copy) == before


def changed(**settings):
    return lambda record: record["settings"].update(settings)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record["settings"].pop("dense_lr"), "of an earlier version"),
        (lambda record: record["settings"].pop("steps"), "missing or unknown settings: steps"),
        (lambda record: record.pop("lr"), "is damaged"),
        (lambda record: record["lr"].update(sgd=1.0), "sgd"),
        (lambda record: record["lr"].update(galore="fast"), "fast"),
        (changed(colour="red"), "missing or unknown settings: colour"),
        (changed(steps="six"), "steps is 'six'"),
        (changed(steps=0), "--steps must be a positive integer"),
        (changed(model="2t"), "--model must be one of"),
        (changed(svd="quick"), "--svd must be one of"),
    ],
)
def test_broken_settings_are_refused(copy, pretrain, edit, message):
    record = json.loads((copy / "settings.json").read_text())
    edit(record)
    (copy / "settings.json").write_text(json.dumps(record))
    before = contents(copy)
    assert message in refused(pretrain, "--out", copy, "--resume")
    assert contents(copy) == before


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"settings": [], "lr": {}}'])
def test_settings_that_are_not_settings_are_refused(copy, pretrain, data):
    (copy / "settings.json").write_bytes(data)
    before = contents(copy)
    assert "settings.json is damaged" in refused(pretrain, "--out", copy, "--resume")
    assert contents(copy) == before


@pytest.mark.parametrize("line", [b"garbage", b"", b"\xff\xfe", b"3", b"{}", b'{"event": "step", "step": 2}', b'{"event": "lunch"}'])
def test_a_garbage_line_of_metrics_is_refused(copy, pretrain, line):
    path = copy / "galore.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = line.ljust(len(lines[1])) if line.strip() else b" " * len(lines[1])
    path.write_bytes(b"\n".join(lines))
    before = contents(copy)
    assert "galore.jsonl, line 2, is not a row of metrics" in refused(pretrain, "--out", copy, "--resume")
    assert contents(copy) == before


def test_a_garbage_line_of_finished_metrics_is_refused(whole, pretrain, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "run")
    lines = (copy / "i3s.jsonl").read_bytes().split(b"\n")
    lines[1] = b"garbage"
    (copy / "i3s.jsonl").write_bytes(b"\n".join(lines))
    before = contents(copy)
    assert "i3s.jsonl, line 2, is not a row of metrics" in refused(pretrain, "--out", copy, "--resume")
    assert contents(copy) == before


def test_metrics_shorter_than_their_checkpoint_are_refused(copy, pretrain):
    (copy / "galore.jsonl").write_bytes(b"")
    before = contents(copy)
    assert "it was changed since, and the run cannot be resumed" in refused(pretrain, "--out", copy, "--resume")
    assert contents(copy) == before


def test_what_a_crash_leaves_behind_the_last_checkpoint_does_no_harm(copy, whole, pretrain):
    """A machine that loses its power may leave zeros, or anything, in what was not yet forced to the disk."""
    with open(copy / "galore.jsonl", "ab") as file:
        file.write(b"\0" * 100 + b"\n\xff\n")
    pretrain("--out", copy, "--resume")
    assert trajectory(copy / "galore.jsonl") == trajectory(whole / "galore.jsonl")


# Names and places.


def surrogate(name: bytes) -> str:
    return os.fsdecode(name)


@pytest.mark.parametrize("where", ["in the directory", "the file", "the directory"])
def test_a_file_name_that_is_not_utf_8_is_refused(pretrain, tmp_path, where):
    folder = tmp_path / ("text" if where != "the directory" else surrogate(b"te\xffxt"))
    try:
        folder.mkdir()
        (folder / surrogate(b"caf\xe9.txt" if where != "the directory" else b"cafe.txt")).write_text("text " * 500)
        (folder / "other.txt").write_text("other " * 500)
    except OSError:
        pytest.skip("this file system has no such names")
    data = next(folder.glob("caf*")) if where == "the file" else folder
    said = refused(pretrain, "--data", data, "--out", tmp_path / "run")
    assert "is not UTF-8" in said and ("caf\\xe9.txt" in said or "te\\xffxt" in said)
    assert not (tmp_path / "run").exists()


def test_an_out_that_is_not_utf_8_is_refused(pretrain, tmp_path):
    assert "is not UTF-8" in refused(pretrain, "--out", str(tmp_path / surrogate(b"ru\xffn")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_an_out_that_is_a_file_is_refused(pretrain, tmp_path, resume):
    (tmp_path / "file").write_text("precious")
    assert "is a file, not a directory" in refused(pretrain, "--out", tmp_path / "file", *resume)
    assert (tmp_path / "file").read_text() == "precious"
    if not resume:
        assert os.strerror(errno.ENOTDIR) in refused(pretrain, "--out", tmp_path / "file" / "run")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_an_out_that_is_read_only_is_refused(copy, pretrain, tmp_path, monkeypatch, code):
    """Simulated: root, whom permissions do not stop, runs tests too."""

    def read_only(*_, **__):
        raise OSError(code, os.strerror(code))

    before = contents(copy)
    monkeypatch.setattr(exclusive, "open", read_only, raising=False)
    assert f"--out {copy}: {os.strerror(code)}" in refused(pretrain, "--out", copy, "--resume")
    assert contents(copy) == before
    monkeypatch.setattr(Path, "mkdir", read_only)
    assert f"--out {tmp_path / 'new'}: {os.strerror(code)}" in refused(pretrain, "--out", tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    assert os.strerror(code) in refused(pretrain, "--optimizer", "adamw")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weight-decay", "nan"), "--weight-decay must be finite, got nan"),
        (("--weight-decay", "inf"), "--weight-decay must be finite, got inf"),
        (("--scale", "inf"), "--scale must be finite, got inf"),
        (("--scale", "nan"), "--scale must be finite, got nan"),
        (("--clip", "nan"), "--clip must be finite, got nan"),
        (("--dense-lr", "inf"), "--dense-lr must be finite, got inf"),
        (("--dense-lr", "0"), "--dense-lr must be positive, got 0"),
        (("--seed", str(2**70)), f"--seed must be less than 2⁶³, got {2**70}"),
        (("--seed", str(2**63)), "--seed must be less than 2⁶³"),
        (("--batch-size", str(2**70)), "--batch-size must be less than 2³¹"),
        (("--threads", str(2**31)), "--threads must be less than 2³¹"),
    ],
)
def test_numbers_out_of_range_are_refused(pretrain, tmp_path, arguments, message):
    assert message in refused(pretrain, "--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_the_largest_seed_works(pretrain, tmp_path):
    pretrain("--out", tmp_path / "run", "--optimizer", "adamw", "i3s", "rso", "--steps", 3, "--seed", 2**63 - 1)


def test_a_lock_that_the_file_system_refuses_is_reported(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(exclusive.fcntl, "flock", refuse)
    with exclusive.exclusive(tmp_path) as locked:
        assert not locked
    assert "No locks available" in capsys.readouterr().err
    monkeypatch.setattr(exclusive.fcntl, "flock", lambda *_: (_ for _ in ()).throw(BlockingIOError()))
    with pytest.raises(SettingsError), exclusive.exclusive(tmp_path):
        pass
