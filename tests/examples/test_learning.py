"""The study over a grid: nothing is run twice, nothing is rewritten."""

import importlib.util
import json
import sys

import pytest
from pretrain_runs import ROOT


@pytest.fixture
def study(tmp_path, monkeypatch, prose):
    """Call it with arguments; it returns the exit status. Results go to tmp_path."""
    spec = importlib.util.spec_from_file_location("learning", ROOT / "benchmarks" / "learning.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "learning", module)
    monkeypatch.setattr(sys, "path", sys.path[:])
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "SCRATCH", tmp_path / "scratch")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["learning.py", "micro", *map(str, arguments)])
        return module.main()

    call.module = module
    call.arguments = (
        "--data",
        prose,
        "--steps",
        4,
        "--batch-size",
        2,
        "--seq-len",
        16,
        "--eval-sequences",
        4,
        "--threads",
        1,
        "--update-proj-gap",
        2,
    )
    call.results = tmp_path / "results" / "micro.jsonl"
    call.scratch = tmp_path / "scratch"
    return call


def records(study):
    return [json.loads(line) for line in study.results.read_text().splitlines()]


def test_lean_blocks_are_another_experiment(study):
    grid = (*study.arguments, "--optimizer", "adamw", "--seeds", 0)
    assert study(*grid, "--lean", "off", "on") == 0
    eager, lean = records(study)
    assert (eager["settings"]["lean"], lean["settings"]["lean"]) == (False, True) and eager["key"] != lean["key"]
    assert lean["bytes"]["activation"] < eager["bytes"]["activation"]
    assert lean["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-3)
    with pytest.raises(SystemExit):
        study(*grid, "--lean", "yes")


def test_a_grid_is_run_once(study, capsys):
    grid = (*study.arguments, "--optimizer", "adamw", "galore", "--rank", 2, 4)
    assert study(*grid, "--seeds", 0) == 0
    first = study.results.read_bytes()
    found = [(r["optimizer"], r["settings"]["rank"]) for r in records(study)]
    assert sorted(found) == [("adamw", 2), ("galore", 2), ("galore", 4)]  # AdamW has no rank: one run stands for both
    assert all(r["torch"] and r["python"] and r["lr"] and r["settings"]["data_digest"] and r["val_loss"] > 0 for r in records(study))
    assert [r["overlap"] is None for r in records(study) if r["optimizer"] == "adamw"] == [True]
    assert not list(study.scratch.rglob("*.pt"))

    assert study(*grid, "--seeds", 0, 1) == 0
    assert study.results.read_bytes().startswith(first)
    assert sorted(r["settings"]["seed"] for r in records(study)) == [0, 0, 0, 1, 1, 1]
    assert "3 runs to do, 3 in" in capsys.readouterr().out

    assert study("--report") == 0
    printed = capsys.readouterr().out
    assert printed.count("galore") == 2 and printed.count("adamw") == 1 and printed.count("±") > 3


def test_dense_rates_span_the_grid_and_older_results_are_told_apart(study, capsys):
    grid = (*study.arguments, "--optimizer", "adamw", "galore", "--rank", 4, "--seeds", 0)
    assert study(*grid, "--dense-lr", 1e-3, 1e-2) == 0
    assert sorted((r["optimizer"], r["settings"]["dense_lr"]) for r in records(study)) == [
        (method, rate) for method in ("adamw", "galore") for rate in (1e-3, 1e-2)
    ]
    assert len({r["val_loss"] for r in records(study)}) == 4
    older = records(study)[0]  # of before the setting: everything trained at lr
    older["lr"], older["key"] = 0.0625, "older"
    del older["settings"]["dense_lr"]
    with open(study.results, "a") as file:
        file.write(json.dumps(older) + "\n")
    capsys.readouterr()
    assert study("--report") == 0
    printed = capsys.readouterr().out
    assert "dense_lr" in printed and printed.count("0.0625") == 2


def test_an_interrupted_study_goes_on_from_its_checkpoint(study, monkeypatch):
    grid = (*study.arguments, "--optimizer", "galore", "--seeds", 0)
    assert study(*grid) == 0
    (whole,) = records(study)
    study.results.unlink()

    train = study.module.training.train
    monkeypatch.setattr(study.module.training, "train", lambda *a, should_stop, **k: train(*a, should_stop=lambda: True, **k))
    assert study(*grid) == 130
    assert not study.results.exists() and list(study.scratch.rglob("*.pt"))
    monkeypatch.setattr(study.module.training, "train", train)
    assert study(*grid) == 0
    (resumed,) = records(study)
    assert resumed["val_curve"] == whole["val_curve"] and resumed["overlaps"] == whole["overlaps"]


def test_a_divergence_is_a_result(study):
    assert study(*study.arguments, "--optimizer", "adamw", "--lr", 1e30, "--seeds", 0) == 0
    (record,) = records(study)
    assert "diverged" in record and "val_loss" not in record
    assert study("--report") == 0


def test_the_family_is_sorted_by_memory_and_judged_by_two_deviations(study, capsys, monkeypatch):
    grid = (*study.arguments, "--optimizer", "adamw", "galore", "--seeds", 0, 1, 2)
    assert study(*grid) == 0
    found = records(study)
    losses = {("adamw", 0): 1.50, ("adamw", 1): 1.60, ("adamw", 2): 1.55, ("galore", 0): 1.52, ("galore", 1): 1.621, ("galore", 2): 1.569}
    for record in found:
        record["val_loss"] = losses[record["optimizer"], record["settings"]["seed"]]
    capsys.readouterr()
    study.module.report(found, study.module.FAMILY)
    galore, adamw = [line for line in capsys.readouterr().out.partition("by memory")[2].splitlines() if "galore" in line or "adamw" in line]
    assert "+0.0200 ± 0.0010" in galore and "yes" in galore and "–" in adamw
    next(record for record in found if record["optimizer"] == "galore")["val_loss"] = 1.46
    study.module.report(found, study.module.FAMILY)
    (galore,) = [line for line in capsys.readouterr().out.partition("by memory")[2].splitlines() if "galore" in line]
    assert "no" in galore and "yes" not in galore


def test_the_committed_study_is_reported_without_a_name(study, capsys, monkeypatch):
    monkeypatch.setattr(study.module, "RESULTS", ROOT / "benchmarks" / "results" / "learning")
    monkeypatch.setattr(sys, "argv", ["learning.py", "--report"])
    assert study.module.main() == 0
    printed = capsys.readouterr().out
    assert "by memory" in printed and all(name in printed for name in ("fira-i3s", "adafactor-i3s", "apollo-mini", "rso"))
