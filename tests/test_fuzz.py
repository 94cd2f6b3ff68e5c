"""The random sweep of `make fuzz`: a few cases of it, that a wrong step is found, and that a case is its seed
alone."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrix import representative

pytest.importorskip("triton")

from tests import fuzz  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_few_cases():
    first = random.SystemRandom().randrange(2**31)
    print(f"python -m tests.fuzz --cases 40 --seed {first}")
    for seed in range(first, first + 40):
        fuzz.check(seed)


def test_a_case_is_a_function_of_its_seed():
    assert fuzz.draw(7) == fuzz.draw(7) != fuzz.draw(8)
    torch.manual_seed(0)
    first = fuzz.make(fuzz.draw(7)) if torch.manual_seed(7) else None
    again = fuzz.make(fuzz.draw(7)) if torch.manual_seed(7) else None
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], again[name], strict=True))


def seeds_of(path, **wanted):
    return [seed for seed in range(400) if (case := fuzz.draw(seed)).path == path and all(getattr(case, k) == v for k, v in wanted.items())]


WRONG = [("beta2", 0.98), ("eps", 0.5), ("weight_decay", 0.5), ("right", None), ("lr", 0.1001)]


@pytest.mark.parametrize(
    "path, name, wrong",
    representative(
        [(path, *wrong) for path in ("cpu", "single_pass", "split") for wrong in WRONG],
        lambda path, name, wrong: path != "split" or name in ("right", "lr"),
    ),
)
def test_a_wrong_step_is_found(monkeypatch, path, name, wrong):
    """One hyperparameter taken for another one, on each path."""
    if fuzz.DEVICE != "cpu":
        pytest.skip("once is enough")
    case_run = fuzz.run

    def run(case, lists, seeds):
        value = not case.right if name == "right" else wrong
        case_run(fuzz.dataclasses.replace(case, **{name: value}), lists, seeds)

    monkeypatch.setattr(fuzz, "run", run)
    found = 0
    for seed in [seed for seed in seeds_of(path, gradient="noise", fresh=False) if fuzz.draw(seed).found_inf != 1.0][:12]:
        try:
            fuzz.check(seed)
        except Exception:
            found += 1
    assert found >= 3


def test_the_command_says_how_to_repeat_a_case(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz", "--cases", "2", "--seed", "40", "--workers", "1"])
    assert fuzz.main() == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 failed")
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--seed" in done.stdout
    monkeypatch.setattr(fuzz.split, "step", None)
    seed = seeds_of("split")[0]
    assert fuzz.attempt(seed)[2].startswith("Case(path='split'")


def test_after_a_case_that_loses_the_gpu_its_process_runs_no_other(monkeypatch):
    def check(seed):
        raise RuntimeError("CUDA error: an illegal memory access was encountered" if seed == 41 else "another error")

    monkeypatch.setattr(fuzz, "check", check)
    monkeypatch.setattr(fuzz, "_lost", False)
    found = [fuzz.attempt(seed)[2] for seed in (40, 41, 42, 43)]
    assert "another error" in found[0] and "illegal memory access" in found[1] and found[2:] == [fuzz.NOT_RUN] * 2
