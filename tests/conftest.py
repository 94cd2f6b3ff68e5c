import importlib.util
import os
import sys
from pathlib import Path

import matrix
import pytest
import torch
from lost_gpu import pytest_runtest_makereport, pytest_runtest_protocol  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the full matrix: also the tests marked slow, and every kernel configuration")


def pytest_collection_modifyitems(config, items):
    """Without --all, the tests marked slow are left out, but for those that are named one by one."""
    if config.getoption("--all") or any("::" in str(argument) for argument in config.args):
        return
    matrix.mark_repetitions(items, "refresh_implementation", _refresh_implementations_here())
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def _refresh_implementations_here():
    from lowrank_kernels import extension

    if not extension.loaded():
        return ["operators"]
    return [way for way in REFRESH_IMPLEMENTATIONS if way != "as on a GPU" or not torch.cuda.is_available()]


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


REFRESH_IMPLEMENTATIONS = ["operators", "as on a GPU", "PyTorch"]


@pytest.fixture(params=REFRESH_IMPLEMENTATIONS)
def refresh_implementation(request, monkeypatch):
    """What a refresh is made of: the operators, which are the extension's where it is built; the extension's
    way through a batch without looking at results, which is a GPU's; the defaults in PyTorch."""
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
