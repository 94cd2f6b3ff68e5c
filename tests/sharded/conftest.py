import functools
import os

import gloo
import pytest


@pytest.fixture(scope="session")
def everything(request):
    """Whether the cases marked slow run too."""
    return request.config.getoption("--all")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of the checkpoints, the same one for all workers of a test run."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "checkpoints"


@pytest.fixture(scope="session")
def two(folder, everything, tmp_path_factory):
    """What each of two processes found; see worlds.py."""
    import worlds

    return gloo.shared(tmp_path_factory, functools.partial(worlds.two, folder, everything), 2)


@pytest.fixture(scope="session")
def four(everything, tmp_path_factory):
    import worlds

    return gloo.shared(tmp_path_factory, functools.partial(worlds.four, everything), 4)


@pytest.fixture(scope="session")
def one(two, folder, everything, tmp_path_factory):
    import worlds

    return gloo.shared(tmp_path_factory, functools.partial(worlds.alone, folder, everything), 1)[0]


@pytest.fixture(scope="session")
def two_again(one, folder, everything, tmp_path_factory):
    import worlds

    return gloo.shared(tmp_path_factory, functools.partial(worlds.together, folder, everything), 2)[0]
