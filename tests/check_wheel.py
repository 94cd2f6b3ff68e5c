"""python -m tests.check_wheel FILE…: installs each wheel or sdist into a new virtual environment in which
there is torch alone, and trains with it there. `make wheels` calls it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SMOKE = """
import torch
import lowrank_kernels as lrk
from lowrank_kernels import extension

def train(method, steps=10):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64))
    if method == "rso":
        optimizer = lrk.RSOAdamW(lrk.to_subspace(model, rank=16).parameters(), lr=1e-2, inner_steps=5)
    else:
        optimizer = lrk.GaLoreAdamW(lrk.param_groups(model, rank=16, update_proj_gap=5), lr=1e-2)
    losses = []
    for step in range(steps):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    return losses

for method in ("galore", "rso"):
    losses = train(method)
    print(f"{method}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
assert extension.loaded() == EXTENSION, extension.status()
"""


def has_library(file: Path) -> bool:
    """By its name: pure wheels and sdists have none, which is built without torch."""
    return file.suffix == ".whl" and not file.name.endswith("-any.whl")


def check(file: Path, torch: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "Scripts" if os.name == "nt" else "bin", "python")

        def run(*arguments: str) -> None:
            subprocess.run([python, *arguments], cwd=folder, check=True)  # not in a source tree

        print(f"== {file.name}", flush=True)
        run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", torch)
        run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", torch, str(file.resolve()))
        run("-m", "lowrank_kernels")
        run("-c", SMOKE.replace("EXTENSION", str(has_library(file))))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.check_wheel", description=__doc__.partition(":")[2].strip())
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--torch", default="torch", help="what pip is asked for")
    settings = parser.parse_args(arguments)
    for file in settings.files:
        check(file, settings.torch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
