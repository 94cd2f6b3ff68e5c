"""The report, also on a machine without Triton and without a compiler; the version; an installation without
the package's extras."""

import os
import subprocess
import sys
import warnings

import pytest

import lowrank_kernels as lrk
from lowrank_kernels import environment, extension
from lowrank_kernels.backends import cuda
from lowrank_kernels.ops import dispatch, refresh


def test_report_names_everything():
    text = environment.report()
    assert lrk.__version__ in text
    for name in ("torch", "Triton", "extension", "C++ compiler", "GPU", "step runs on", "refresh runs on"):
        assert any(line.startswith(name) for line in text.splitlines())
    assert f"extension        {extension.status()}" in text


WITHOUT_TRITON = """
import importlib.util, runpy, sys
sys.modules["triton"] = None
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] == "triton" else found(name, package)
runpy.run_module("lowrank_kernels", run_name="__main__")
import torch, lowrank_kernels as lrk
parameter = torch.nn.Parameter(torch.ones(8, 9)); parameter.grad = torch.ones(8, 9)
lrk.I3SAdamW([{"params": [parameter], "rank": 2}]).step()
"""


def test_works_without_triton_and_without_a_compiler():
    bare = {key: value for key, value in os.environ.items() if key not in ("CXX", "CC")} | {"PATH": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert lines["Triton"].strip().startswith("not installed")
    assert lines["C++ compiler"].strip() == "none found"


def test_missing_triton_is_said_once_where_a_gpu_would_have_used_it(monkeypatch):
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: True)
    cuda.triton_missing.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Triton is not installed; low-rank steps on the GPU run in plain PyTorch"):
            assert cuda.triton_missing() == "Triton is not installed"
    finally:
        cuda.triton_missing.cache_clear()


def test_triton_from_another_distribution(monkeypatch):
    pytest.importorskip("triton")

    def not_found(name):
        raise environment.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.importlib.metadata, "version", not_found)
    assert "Triton" in environment.report()


def test_version_is_in_one_place():
    import importlib.metadata

    assert importlib.metadata.version("lowrank-kernels") == lrk.__version__


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        ((), "CUDA C++ on a CUDA GPU, C++ on a CPU, PyTorch elsewhere"),
        (("CUDA",), "PyTorch (slower) on a CUDA GPU, C++ on a CPU, PyTorch elsewhere"),
        (("CUDA", "CPU"), "PyTorch (slower) on a CUDA GPU, PyTorch (slower) on a CPU, PyTorch elsewhere"),
    ],
)
def test_where_the_refresh_runs(monkeypatch, lacking, expected):
    monkeypatch.setattr(extension, "missing", lambda key: ["orthonormalise"] if key in lacking else [])
    monkeypatch.setattr(dispatch, "REFERENCE_FORCED", False)
    assert environment.environment()["refresh runs on"] == expected


def test_the_dispatcher_tells_what_is_compiled():
    assert extension.missing("CPU") == ([] if extension.loaded() else list(extension.OPERATORS))
    assert extension.missing("XPU") == list(extension.OPERATORS)


@pytest.mark.parametrize("lacking", [True, False])
def test_a_slow_refresh_on_a_gpu_is_said_once(monkeypatch, lacking):
    monkeypatch.setattr(extension, "missing", lambda key: ["orthonormalise"] if lacking else [])
    monkeypatch.setattr(dispatch, "REFERENCE_FORCED", False)
    refresh._say_if_slow.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            refresh._say_if_slow()
            refresh._say_if_slow()
    finally:
        refresh._say_if_slow.cache_clear()
    assert len(caught) == lacking
    assert all("the subspace refresh on the GPU runs in PyTorch, which is slower; the extension is" in str(one.message) for one in caught)
