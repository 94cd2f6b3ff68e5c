"""README and docs/: their Python runs, their links lead somewhere, and their prose keeps to its columns."""

import re
from pathlib import Path

import pytest
import torch

import lowrank_kernels as lrk
from benchmarks.readme import COLUMNS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
WHOLE = sorted((ROOT / "docs").glob("*/*.md"))
"""Tutorials and recipes, which begin from nothing."""
PAGES = [ROOT / "README.md", *DOCS, *WHOLE]
NEEDS = {
    "fine-tune": ["transformers", "accelerate"],
    "accelerate": ["accelerate"],
    "lightning": ["lightning"],
    "peft": ["peft", "transformers"],
    "torchtitan": ["torchtitan"],
    "trl": ["trl", "datasets"],
}
"""The packages that a page is about."""
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "NOTES.md", ROOT / "csrc" / "NOTES.md"]


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def snippets(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def runs(page):
    """Recipes run with --all."""
    return pytest.param(page, marks=[pytest.mark.slow] * (page.parent.name == "recipes"), id=str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", [runs(page) for page in PAGES if snippets(page)])
def test_snippets_run_one_after_another(page, tmp_path, monkeypatch):
    """README, tutorials and recipes begin from nothing, other pages from a model, its input and groups. What
    needs a GPU is compiled only, and so is what torchrun starts (tests/sharded/test_page.py runs it)."""
    for package in NEEDS.get(page.stem, []) if page in WHOLE else []:
        pytest.importorskip(package, exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "page"}
    if page in DOCS:
        names |= {"lrk": lrk, "model": torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 128))}
        names |= {"x": torch.randn(8, 256), "groups": lrk.param_groups(names["model"], rank=16)}
    for number, source in enumerate(snippets(page)):
        code = compile(source, f"{page.name}, snippet {number}", "exec")
        if '"cuda"' not in source and "torchrun" not in source:
            exec(code, names)


@named(PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", without_code(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", without_code(file.read_text()), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles], target


@named(PROSE)
def test_prose_keeps_to_its_columns(page):
    lines = without_code(page.read_text()).splitlines()
    assert [line for line in lines if len(line) > COLUMNS and not line.lstrip().startswith(("|", "!["))] == []


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in (*DOCS, *WHOLE))
