"""Figures drawn from metrics rows."""

import pytest
from picture import _running_mean
from pretrain_runs import rows
from report import summarize


def step(number, ms, **more):
    return {"event": "step", "step": number, "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "optimizer_ms": ms, **more}


def end(number):
    return {"event": "end", "step": number, "state_bytes": 8, "peak_bytes": None, "wall_s": 1.0}


def test_refreshes_and_ordinary_steps_are_told_apart():
    rows = [
        step(1, 900.0, refresh=True, overlap=None), step(2, 2.0), step(3, 4.0), {"event": "eval", "step": 3, "val_loss": 2.0},
        step(4, 23.0, refresh=True, overlap=0.5), step(5, 3.0), step(6, 90.0), {"event": "eval", "step": 6, "val_loss": 1.0},
        step(7, 43.0, refresh=True, overlap=0.7), step(8, 3.5), end(8),
    ]  # fmt: skip
    summary = summarize(rows)
    assert summary["step_ms"] == 3.5  # of 2, 3, 3.5, 4 and 90: neither the first step nor a refresh
    assert summary["refresh_ms"] == (23 + 43) / 2 - 3.5
    assert summary["overlap"] == pytest.approx(0.6)
    assert summary["val_loss"] == 1.0
    assert summary["activation_bytes"] is None  # of a run before it was counted


def test_what_was_not_measured_is_none():
    every_step = [step(n, 5.0, refresh=True, overlap=0.5) for n in (1, 2, 3)] + [{"event": "eval", "step": 3, "val_loss": 1.0}, end(3)]
    assert summarize(every_step)["step_ms"] is None and summarize(every_step)["refresh_ms"] is None
    once = [step(1, 5.0, refresh=True, overlap=None), step(2, 2.0), {"event": "eval", "step": 2, "val_loss": 1.0}, end(2)]
    assert summarize(once)["refresh_ms"] is None and summarize(once)["overlap"] is None and summarize(once)["step_ms"] == 2.0


def test_running_mean():
    assert _running_mean([1, 2, 3, 4, 5, 6], reach=0) == [1, 2, 3, 4, 5, 6]
    assert _running_mean([1, 2, 6, 4, 5, 6], reach=2) == [1, 3, pytest.approx(18 / 5), pytest.approx(23 / 5)]


def test_diagnostics_are_in_rows_and_picture(pretrain, tmp_path):
    arguments = ("--optimizer", "adamw", "galore", "apollo", "--update-proj-gap", "2")
    pretrain("--out", tmp_path / "run", *arguments, "--diagnostics")
    pretrain("--out", tmp_path / "without", *arguments)
    for method in ("galore", "apollo"):
        refreshes = [row for row in rows(tmp_path / "run" / f"{method}.jsonl") if row.get("refresh")]
        assert len(refreshes) == 3 and all(1 <= row["effective_rank"] <= 128 for row in refreshes)
        assert all(("captured_energy" in row) == (method == "galore") for row in refreshes)
        losses = [[row["loss"] for row in rows(where / f"{method}.jsonl") if "loss" in row] for where in tmp_path.iterdir()]
        assert losses[0] == losses[1]
    assert all(0.3 < row["captured_energy"] <= 1.001 for row in rows(tmp_path / "run" / "galore.jsonl") if row.get("refresh"))
    width, height = (int.from_bytes((tmp_path / "run" / "curves.png").read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert height > width * 0.8  # two lines of panels
