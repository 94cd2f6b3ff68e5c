"""The IR lane: it covers every row, finds nothing in the kernels, and finds what was broken in a copy of
them."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.version.hip is not None:
    pytest.skip("executes what Triton compiles for NVIDIA GPUs", allow_module_level=True)

from benchmarks.aot import ROOT  # noqa: E402
from benchmarks.aot import cases as aot
from benchmarks.ir import cases  # noqa: E402

needs_ttsem = pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="needs ttsem: make gpu-ir installs and runs it")
FOLDERS = ("lowrank_kernels", "benchmarks", "tests")


def lane(*arguments, root=ROOT, program=("-m", "benchmarks.ir")):
    """The lane in a process of its own, in which the kernels are not made for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(root), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "LOWRANK_KERNELS_BUILD": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-W", "ignore", *program, *arguments], cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    """copy(file, old, new): a copy of the project in which `old` became `new`; the folder."""

    def changed(file: str, old: str, new: str) -> Path:
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results", "*.so"))
        source = tmp_path / file
        text = source.read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
        source.write_text(text.replace(old, new))
        return tmp_path

    return changed


def test_every_row_is_a_case():
    """On both sides, and with everything that its kernel can do."""
    found = cases.cases()
    assert len({case.name for case in found}) == len(found)
    options: dict[tuple, set] = {}
    for case in found:
        for arch in (case.arch, None):
            options.setdefault((case.kernel, arch, case.config, case.right), set()).update(map(frozenset, [case.options]))
    for row in aot.rows():
        if (row.kernel, row.arch) == ("single_pass", None):
            continue  # the interpreter's
        for right in (False, True):
            executed = options[row.kernel, row.arch, row.config, right]
            assert row.eight_bit is None or any(("8-bit" in each) == row.eight_bit for each in executed), row
            if row.kernel == "project_moments":
                assert executed >= {frozenset(), frozenset(["8-bit"])}, row
            if (row.kernel, row.kind) == ("single_pass", "16bit"):
                of_row = [each for each in executed if ("8-bit" in each) == row.eight_bit]
                assert {"stochastic" in each for each in of_row} == {False, True}, row
                assert row.arch != 90 or any("R from memory" in each for each in of_row), row


@needs_ttsem
def test_sample_is_clean():
    done = lane("--sample")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 faults" in done.stdout


MASKS = {
    "store of R": (
        "project",
        "project.py",
        "tl.store(r_at, acc.T, mask=in_r[:, None] & in_n[None, :])",
        "tl.store(r_at, acc.T, mask=in_r[:, None])",
    ),
    "load of G": (
        "project",
        "project.py",
        "g = tl.load(g_at, mask=in_k[:, None] & in_n[None, :], other=0.0)",
        "g = tl.load(g_at)",
    ),
    "rows of P": (
        "project",
        "project.py",
        "p = tl.load(p_at, mask=in_k[:, None] & in_r[None, :], other=0.0)",
        "p = tl.load(p_at, mask=in_r[None, :])",
    ),
    "store of W": (
        "back_project",
        "back_project.py",
        "tl.store(w_at, new.to(W_DTYPE), mask=inside, eviction_policy",
        "tl.store(w_at, new.to(W_DTYPE), mask=at_m < m, eviction_policy",
    ),
    "store of scales": (
        "moments",
        "moments.py",
        "tl.store(m_scales_at, m_scales, mask=block_inside)",
        "tl.store(m_scales_at, m_scales, mask=row < rows)",
    ),
    "tile of W": ("single_pass", "single_pass.py", "inside = (at_m < m - i) & (at_n < n)", "inside = (at_m < m) & (at_n < n)"),
    "columns of the moments": (
        "single_pass",
        "advance.py",
        "inside = in_r & (offs_n < n)[None, :]",
        "inside = in_r & (offs_n >= 0)[None, :]",
    ),
    "rows of N": (
        "project_moments",
        "advance.py",
        "inside = (offs_r < rank)[:, None] & (offs_n < n)[None, :]",
        "inside = (offs_r >= 0)[:, None] & (offs_n < n)[None, :]",
    ),
}


@needs_ttsem
@pytest.mark.parametrize("mask", MASKS)
def test_mask_left_out(copy, mask):
    kernel, file, old, new = MASKS[mask]
    root = copy(f"lowrank_kernels/backends/triton/{file}", old, new)
    done = lane("--sample", "--kernels", kernel, "--stages", "sanitize", "--workers", "1", root=root)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-4000:]
    assert "sanitize FAULT" in done.stdout


BARRIERS = """
import re
from ttsem import harness
from benchmarks.ir import cases, compiler, launches, semantics, stages, warps

semantics.set_up()
compiler.set_up()
launches.replace_table()
[case] = [case for case in cases.moments_cases() if case.arch == 90 and case.options == ("8-bit",)]
launch, target = launches.launch_of(case), harness.target_for("cpu", case.arch)
record = stages._sanitize(launch, target, stages.Outcome(case.name))
lines = compiler.modules_of(record, target).barriers.split("\\n")
compiler.clean_up()
bare = [re.sub(r"\\{allocation.offset = \\d+ : i32\\}", "", line) if "ttg.convert_layout" in line else line for line in lines]
barriers = [number for number, line in enumerate(lines) if '"ttg.barrier"' in line]
assert len(barriers) == 2, barriers


def faults(lines, *without):
    return warps.find(record, "\\n".join(line for number, line in enumerate(lines) if number not in without)).faults


for name, found in {
    "as compiled": faults(lines),
    "without the kernel's barrier": faults(lines, barriers[0]),
    "without the compiler's barrier": faults(lines, barriers[1]),
    "conversions without one": faults(bare),
    "conversions without one, nor the kernel": faults(bare, *barriers),
}.items():
    print(f"{name}: {len(found)} {' '.join(found)}")
"""


@needs_ttsem
def test_barrier_taken_out_of_the_8_bit_path():
    """Between load and store of a scale stand the kernel's own barrier and that of a conversion of layouts,
    either of which would do; the compiler's own lets the conversions of both scales use the same shared
    memory.
    """
    done = lane(BARRIERS, program=("-c",))
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(line.split(": ", 1) for line in done.stdout.strip().split("\n"))
    assert found["as compiled"].startswith("0")
    assert found["without the kernel's barrier"].startswith("0")
    assert "shared memory" in found["without the compiler's barrier"]
    assert found["conversions without one"].startswith("0")
    assert "tensor" in (neither := found["conversions without one, nor the kernel"]) and "tt.store" in neither


POOL = """
import os
import time
from types import SimpleNamespace

from benchmarks.ir import cases, pool


def work(pipe, stages):
    while True:
        case = pipe.recv()
        if case.rank == 1:
            os._exit(3)
        if case.rank == 2:
            time.sleep(600)
        pipe.send(pool.Outcome(str(case.rank)))


if __name__ == "__main__":
    pool.work, pool.SECONDS = work, 60
    some = [cases.Case("project", 90, "fp32", "tf32", SimpleNamespace(), False, 1, 1, number) for number in range(5)]
    for outcome in pool.outcomes(some, (), 2):
        print(outcome.name, outcome.faults)
"""


@needs_ttsem
def test_a_case_that_crashes_or_hangs_is_a_fault_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(POOL)
    done = lane(program=(str(script),))
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.strip().split("\n")
    assert len(lines) == 5 and sum(line.endswith("[]") for line in lines) == 3
    assert any("1x1x1 " in line and "ended with 3" in line for line in lines)
    assert any("1x1x2 " in line and "not done in 60 s" in line for line in lines)
