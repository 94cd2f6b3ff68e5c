import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["operators", "PyTorch"])
def refresh_implementation(request, monkeypatch):
    """What ops.range_finder and its like run: the operators, which are the extension's where it is built, and their PyTorch defaults."""
    from lowrank_kernels import extension, range_finder, subspaces
    from lowrank_kernels.ops import refresh

    if request.param == "PyTorch":
        if not extension.loaded():
            pytest.skip("the operators run in PyTorch here already")
        for module in (range_finder, subspaces):
            for name in ("orthonormalise", "range_finder", "sample_importance", "choose_bases"):
                if hasattr(module, name):
                    monkeypatch.setattr(refresh, f"_{name}", getattr(module, name))
    return request.param
