"""The lane of `make gpu-dry` itself: a part of it runs, and what it is there to find fails it."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("triton")
if torch.version.hip is not None:
    pytest.skip("compiles for NVIDIA GPUs", allow_module_level=True)

from benchmarks import dry  # noqa: E402

ROOT = Path(__file__).parents[2]
ALIGNED = "tests/kernels/test_project.py::test_aligned_bucket_of_many"


def lane(*tests, arch=90, tree=ROOT):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.dry_lane", f"--dry-arch={arch}", "-m", "gpu"]
    return subprocess.run([*command, *tests], cwd=tree, capture_output=True, text=True)


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)])
def test_a_part_of_the_lane(arch):
    """More of it takes minutes: `make gpu-dry`."""
    done = lane("tests/test_step_parts.py", ALIGNED, "--all", arch=arch)
    assert done.returncode == 0, done.stdout
    [summary] = [line for line in done.stdout.splitlines() if line.startswith(f"sm_{arch}: ")]
    launches, _, passed = summary.removeprefix(f"sm_{arch}: ").partition(" launches compiled, not run; passed: ")
    counts = {ending: int(count) for count, _, ending in (part.partition(" ") for part in passed.split(", "))}
    assert int(launches) > 60 and counts["to its end"] > 40 and counts["to a comparison"] > 0


BREAKS = {
    "an argument of a launcher dropped": (
        "moments.py", "bucket.found_inf, height, width,", "bucket.found_inf, width,",
        "tests/kernels/test_moments.py::test_each_matrix_its_own_states", "missing 1 required positional argument",
    ),
    "a row too large for shared memory": (
        "builtin.py", "ProjectConfig(32, 64, 16, 4, 3), ProjectConfig(64, 64, 16, 8, 3)",
        "ProjectConfig(32, 64, 16, 4, 40), ProjectConfig(64, 64, 16, 8, 3)", ALIGNED, "bytes of shared memory and sm_90 has 232448",
    ),
    "a kernel that does not compile": (
        "back_project.py", "(BLOCK_N, BLOCK_M) if RIGHT else (BLOCK_M, BLOCK_N)", "(BLOCK_R, BLOCK_M)",
        "tests/kernels/test_back_project.py::test_aligned_bucket_of_many", "CompilationError",
    ),
}  # fmt: skip
NEW_TESTS = """
import pytest, torch
from launchers import project
pytestmark = pytest.mark.gpu
def launch(): return project([torch.zeros(4, 2)], [torch.zeros(4, 5)], False)
def test_compares(): launch(); assert False
def test_launches_nothing(): assert False
def test_raises(): launch(); raise KeyError
def test_fails_outside(): launch(); torch.testing.assert_close(torch.ones(1), torch.zeros(1))
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """One run of the lane on a copy of the sources that is broken in several places: the message of each
    failed test, "" of the others."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in ("lowrank_kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "results", "*.so", "_build.json"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    for file, old, new, *_ in BREAKS.values():
        path = tree / "lowrank_kernels/backends/triton" / file
        source = path.read_text()
        assert source.count(old) == 1
        path.write_text(source.replace(old, new))
    (tree / "tests/kernels/test_new.py").write_text(NEW_TESTS)
    done = lane(*(test for *_, test, _ in BREAKS.values()), "tests/kernels/test_new.py", "--junitxml", str(tree / "x.xml"), tree=tree)
    assert done.returncode == 1, done.stdout
    found = {}
    for case in ElementTree.parse(tree / "x.xml").iter("testcase"):
        failure = case.find("failure")
        name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name').partition('[')[0]}"
        found[name] = found.get(name, "") + ("" if failure is None else failure.get("message") + failure.text)
    return found


@pytest.mark.parametrize("broken", BREAKS)
def test_what_the_lane_is_there_to_find(failed, broken):
    *_, test, message = BREAKS[broken]
    assert message in failed[test], failed


def test_a_failed_assertion_is_a_comparison_only_in_a_test_and_after_a_launch(failed):
    found = {name.partition("::")[2] for name, message in failed.items() if "test_new" in name and message}
    assert found == {"test_launches_nothing", "test_raises", "test_fails_outside"} and "tests/kernels/test_new.py::test_compares" in failed


def kernel(shared=0, warps=4):
    return SimpleNamespace(metadata=SimpleNamespace(name="kernel", shared=shared, num_warps=warps), asm={"cubin": b""})


@pytest.mark.parametrize(
    ("arguments", "grid", "registers", "message"),
    [
        (dict(shared=163 * 1024), (1, 1), 255, None),
        (dict(shared=163 * 1024 + 1), (1, 1), 32, "166913 bytes of shared memory and sm_80 has 166912"),
        (dict(warps=8), (1, 1), 255, None),
        (dict(warps=16), (1, 1), 129, "136 registers in each of 512 threads and a block has 65536"),
        ({}, (0, 1), 32, r"a grid of \(0, 1\)"),
        ({}, (1, 65536), 32, r"a grid of \(1, 65536\)"),
    ],
)
def test_what_a_gpu_would_refuse(monkeypatch, arguments, grid, registers, message):
    monkeypatch.setattr(dry, "resources", lambda cubin: {"REG": registers})
    if message is None:
        dry.check(kernel(**arguments), grid, 80)
        return
    with pytest.raises(dry.WouldNotRun, match=message):
        dry.check(kernel(**arguments), grid, 80)
