"""A worker of pytest-xdist whose GPU is lost ends, and a new one takes its place: else every test after the
one to blame would fail too.

An illegal access leaves a process without a usable CUDA context. Its test is reported, then once more as the
one during which the worker crashed. Without xdist the run stops there. conftest.py imports both hooks.
"""

import os

import pytest

from benchmarks.gpu.lost import is_lost

_LOST = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    yield
    if call.excinfo is not None and is_lost(call.excinfo.value):
        item.session.stash[_LOST] = True


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """After all reports of the test went to the controller."""
    yield
    if item.session.stash.get(_LOST, False):
        if hasattr(item.config, "workerinput"):
            os._exit(1)
        item.session.shouldstop = "the GPU is lost to this process"
