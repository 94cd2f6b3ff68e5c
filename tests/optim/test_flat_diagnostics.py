"""diagnostics(flat=True) is a dict of floats for a logger."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import lowrank_kernels as lrk


def build(**options):
    """A matrix and two experts with names, and one matrix without."""
    model = nn.ModuleDict({"layer": nn.Linear(12, 8, bias=False)})
    model.experts = nn.Parameter(torch.randn(2, 8, 12))
    groups = [{"params": list(model.named_parameters()), "rank": 3, "update_proj_gap": 1, "diagnostics": True} | options]
    return lrk.GaLoreAdamW(groups), [model.layer.weight, model.experts]


def step(optimizer, params):
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizer.step()


def test_it_has_the_figures_of_the_rows_and_their_means():
    optimizer, params = build()
    for _ in range(2):
        step(optimizer, params)
    found, rows = optimizer.diagnostics(flat=True), optimizer.diagnostics()
    names = [row["param"] if row["expert"] is None else f"experts[{row['expert']}]" for row in rows]
    assert sorted(names) == ["experts[0]", "experts[1]", "layer.weight"]
    for figure in ("overlap", "captured_energy", "effective_rank"):
        values = [row[figure] for row in rows]
        assert {name: found.pop(f"{figure}/{name}") for name in names} == dict(zip(names, values, strict=True))
        assert found.pop(f"{figure}/mean") == pytest.approx(sum(values) / 3)
    assert found == {}


def test_what_is_not_known_is_left_out():
    optimizer, params = build()
    assert optimizer.diagnostics(flat=True) == {}
    step(optimizer, params)
    found = optimizer.diagnostics(flat=True)
    assert not any(key.startswith("overlap") for key in found) and len(found) == 2 * (3 + 1)
    params[1].grad = None
    params[0].grad = torch.randn(8, 12)
    optimizer.step()
    found = optimizer.diagnostics(flat=True)
    assert found["overlap/mean"] == found["overlap/layer.weight"] and "overlap/experts[0]" not in found
    assert all(type(value) is float and not math.isnan(value) for value in found.values())


def test_a_parameter_without_a_name_has_its_index():
    weight = nn.Parameter(torch.randn(8, 12))
    optimizer = lrk.GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(3))]}, {"params": [weight], "rank": 3, "diagnostics": True}])
    step(optimizer, [weight])
    assert set(optimizer.diagnostics(flat=True)) == {
        "captured_energy/1",
        "captured_energy/mean",
        "effective_rank/1",
        "effective_rank/mean",
    }


def test_where_nothing_is_measured_it_says_so_once():
    optimizer, params = build(diagnostics=False)
    with pytest.warns(UserWarning, match=r"no group of this GaLoreAdamW has diagnostics=True.*diagnostics=True\) makes") as caught:
        assert optimizer.diagnostics(flat=True) == {}
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.diagnostics(flat=True) == {} and optimizer.diagnostics() == []
        step(optimizer, params)
        assert copy.deepcopy(build()[0]).diagnostics(flat=True) == {}


def test_rso_has_nothing_to_measure():
    model = lrk.to_subspace(nn.Linear(8, 12), rank=4)
    optimizer = lrk.RSOAdamW(model.parameters())
    with pytest.warns(UserWarning, match="subspaces are random"):
        assert optimizer.diagnostics(flat=True) == {}


def test_the_host_asks_once(monkeypatch):
    """All numbers are copied together, and none by .item()."""
    optimizer, params = build()
    step(optimizer, params)
    copied = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: copied.append(tensor.shape) or original(tensor))
    monkeypatch.setattr(torch.Tensor, "item", None)
    optimizer.diagnostics(flat=True)
    assert copied == [(3, 3)]
