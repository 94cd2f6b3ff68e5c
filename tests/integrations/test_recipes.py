"""The code of docs/recipes/, one page a framework."""

import importlib
from pathlib import Path

import pytest
import torch
from test_pages import snippets

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
NEEDS = {
    "accelerate": ["accelerate"],
    "lightning": ["lightning"],
    "peft": ["peft"],
    "torchtitan": ["torchtitan"],
    "trl": ["trl", "datasets"],
}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(path.stem for path in RECIPES.glob("*.md")))
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch):
    for package in NEEDS[page]:
        pytest.importorskip(package, exc_type=ImportError)
        importlib.import_module(package)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "recipe"}
    for number, source in enumerate(snippets(RECIPES / f"{page}.md")):
        exec(compile(source, f"{page}.md, snippet {number}", "exec"), names)
