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
    """What a refresh is made of: the operators, which are the extension's where it is built; the extension's way through a batch without
    looking at results, which is a GPU's; the defaults in PyTorch."""
    from lowrank_kernels import extension, range_finder
    from lowrank_kernels.ops import parts

    if request.param != "operators" and not extension.loaded():
        pytest.skip("without the extension the operators are the defaults in PyTorch")
    if request.param == "as on a GPU":
        if torch.cuda.is_available():
            pytest.skip("the operators take that way here")
        monkeypatch.setattr(range_finder, "may_look", lambda tensor: False)
    if request.param == "PyTorch":
        for name in extension.OPERATORS:
            monkeypatch.setattr(parts, name, getattr(range_finder, name))
    return request.param
