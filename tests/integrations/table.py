"""python -m tests.integrations.table build/tests.xml: writes the table of docs/integrations.md from what
tests have shown.

    pytest --all tests/integrations --junitxml build/tests.xml

A cell is there because a test that passed has said so (the fixture `shows`). --check writes nothing, and
fails where the page has a cell that the run did not show.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
BEGIN, END = "<!-- integrations: begin -->", "<!-- integrations: end -->"
FEATURES = ("accumulation", "clipping", "resume", "DDP", "FSDP2", "in_backward")
FRAMEWORKS = {
    "Trainer": "transformers",
    'Trainer, `optim="galore_adamw"` …': "transformers",
    "Accelerate": "accelerate",
    "Lightning": "lightning",
    "PEFT": "peft",
    "TRL": "trl",
    "torchtitan": "torchtitan",
}
"""In the order of the rows, each with the package whose version is named."""
Shown = dict[tuple[str, str], set[str]]
"""(framework, method) → features."""


def shown_by(*runs: Path) -> Shown:
    found: Shown = {}
    for case in (case for run in runs for case in ElementTree.parse(run).iter("testcase")):
        if any(case.find(result) is not None for result in ("failure", "error", "skipped")):
            continue
        for each in case.iter("property"):
            if each.get("name") == "shows":
                framework, method, feature = each.get("value", "").split("|")
                found.setdefault((framework, method), set()).add(feature)
    return found


def rendered(shown: Shown) -> str:
    lines = ["| framework | method | " + " | ".join(FEATURES) + " |", "|---|---|" + "---|" * len(FEATURES)]
    for framework, package in FRAMEWORKS.items():
        for method in sorted(method for name, method in shown if name == framework):
            cells = ["yes" if feature in shown[framework, method] else "" for feature in FEATURES]
            lines.append(f"| {framework} {version(package)} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def version(package: str) -> str:
    return importlib.metadata.version(package)


def cells_of(text: str) -> Shown:
    """What a rendered table says."""
    found: Shown = {}
    for line in text.splitlines()[2:]:
        framework, method, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        name = next((name for name in FRAMEWORKS if framework.startswith(f"{name} ")), framework)
        found[name, method] = {feature for feature, cell in zip(FEATURES, cells, strict=True) if cell}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.integrations.table", description=__doc__.partition("\n")[0])
    parser.add_argument("junit", type=Path, nargs="+", help="what pytest --junitxml wrote, of one run or more")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page says more than the tests showed")
    settings = parser.parse_args(arguments)
    shown, text = shown_by(*settings.junit), PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    if not settings.check:
        PAGE.write_text(f"{before}{BEGIN}\n\n{rendered(shown)}\n\n{END}{after}")
        return 0
    missing = [
        f"{framework}, {method}: {feature}"
        for (framework, method), features in cells_of(table.strip()).items()
        for feature in sorted(features - shown.get((framework, method), set()))
        if _is_installed(FRAMEWORKS[framework])
    ]
    for each in missing:
        print(f"docs/integrations.md says yes, and no test has shown it: {each}", file=sys.stderr)
    return bool(missing)


def _is_installed(package: str) -> bool:
    try:
        return bool(re.match(r"\d", version(package)))
    except importlib.metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
