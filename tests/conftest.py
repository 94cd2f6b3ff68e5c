import os

import pytest
import torch
from lost_gpu import pytest_runtest_makereport, pytest_runtest_protocol  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
    *numbers, start = settings
    if grad.dim() > 2:
        return torch.ops.lowrank_kernels._range_finder_of_batch(grad, *numbers, start)
    found = torch.ops.lowrank_kernels._range_finder_of_batch(grad[None], *numbers, None if start is None else start[None])
    return tuple(part[0] for part in found)
