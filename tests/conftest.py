import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from lost_gpu import pytest_runtest_makereport, pytest_runtest_protocol  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def setup_module():
    """setup.py as a module; importing it builds nothing."""
    pytest.importorskip("setuptools.command.bdist_wheel")
    spec = importlib.util.spec_from_file_location("lowrank_kernels_setup", Path(__file__).parent.parent / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(params=["operators", "as on a GPU", "PyTorch"])
def refresh_implementation(request, monkeypatch):
    """What ops.range_finder and its like run: the operators, which are the extension's where it is built; the extension's way through
    a batch without looking at results, which is a GPU's; the defaults in PyTorch."""
    from lowrank_kernels import extension, range_finder, subspaces
    from lowrank_kernels.ops import refresh

    if request.param != "operators" and not extension.loaded():
        pytest.skip("without the extension the operators are the defaults in PyTorch")
    if request.param == "as on a GPU":
        if torch.cuda.is_available():
            pytest.skip("the operators take that way here")
        monkeypatch.setattr(refresh, "_range_finder", _range_finder_of_batch)
        monkeypatch.setattr(refresh, "_choose_bases", torch.ops.lowrank_kernels._choose_bases_of_batch)
    if request.param == "PyTorch":
        for module in (range_finder, subspaces):
            for name in ("orthonormalise", "range_finder", "sample_importance", "choose_bases"):
                if hasattr(module, name):
                    monkeypatch.setattr(refresh, f"_{name}", getattr(module, name))
    return request.param


def _range_finder_of_batch(grad, *settings):
    if grad.dim() > 2:
        return torch.ops.lowrank_kernels._range_finder_of_batch(grad, *settings)
    found = torch.ops.lowrank_kernels._range_finder_of_batch(grad[None], *settings)
    return tuple(part[0] for part in found)
