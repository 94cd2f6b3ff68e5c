"""What becomes of the other tests when one loses the GPU: errors are made up, so on a CPU."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.gpu.lost import is_lost

ROOT = Path(__file__).parents[2]
ILLEGAL = "CUDA error: an illegal memory access was encountered"
TESTS = f"""
import pytest

LOST = []

@pytest.mark.parametrize("number", range(8))
def test_fine(number):
    assert not LOST, "this process has lost its GPU"

def test_to_blame():
    LOST.append(1)
    raise RuntimeError({ILLEGAL!r})

@pytest.mark.parametrize("number", range(8))
def test_fine_too(number):
    assert not LOST, "this process has lost its GPU"

def test_that_only_fails():
    assert False, "a wrong number"
"""


def run(folder, *options):
    (folder / "conftest.py").write_text("from lost_gpu import pytest_runtest_makereport, pytest_runtest_protocol\n")
    (folder / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml", str(folder / "x.xml"), *options]
    paths = f"pythonpath={ROOT} {ROOT / 'tests'}"
    command += ["--rootdir", str(folder), "-c", "/dev/null", "-o", paths, str(folder)]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    cases = ElementTree.parse(folder / "x.xml").iter("testcase")
    found = [(case.get("name").partition("[")[0], case.find("failure") is not None or case.find("error") is not None) for case in cases]
    return done.stdout, found


def test_a_worker_that_loses_the_gpu_ends_and_all_others_pass(tmp_path):
    pytest.importorskip("xdist")
    printed, found = run(tmp_path, "-p", "xdist.plugin", "-n", "2", "--dist", "worksteal", "--max-worker-restart", "200")
    assert found.count(("test_fine", False)) == found.count(("test_fine_too", False)) == 8
    assert {name for name, failed in found if failed} == {"test_to_blame", "test_that_only_fails"}
    assert ILLEGAL in printed and "node down" in printed and "16 passed" in printed


def test_without_workers_the_run_stops_there(tmp_path):
    printed, found = run(tmp_path)
    assert found.count(("test_fine", False)) == 8 and ("test_to_blame", True) in found and len(found) == 9
    assert "the GPU is lost to this process" in printed


@pytest.mark.parametrize("text, lost", [
    (ILLEGAL, True),
    ("Triton Error [CUDA]: an illegal memory access was encountered", True),
    ("CUDA error: device-side assert triggered\nCompile with", True),
    ("CUDA error: unspecified launch failure", True),
    ("CUDA error: misaligned address", True),
    ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
    ("CUDA error: invalid argument", False),
    ("out of resource: shared memory, Required: 300000", False),
])  # fmt: skip
def test_which_errors_lose_it(text, lost):
    assert is_lost(RuntimeError(text)) == lost
    outer = AssertionError("in a fixture")
    outer.__cause__ = RuntimeError(text)
    assert is_lost(outer) == lost
    assert not is_lost(AssertionError(f"expected something else than {text}"))
