"""Only RSOAdamW moves a converted layer: any other optimizer says so, and optimizers of other models notice
nothing."""

import copy
import subprocess
import sys

import pytest
import torch
from nn.layers import Block
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.nn import layer_of

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "LBFGS": lambda params: torch.optim.LBFGS([p for p in params if p.requires_grad], lr=0.1),
    "LowRankAdamW": lambda params: lrk.LowRankAdamW(params),
}


def with_gradients(model):
    def closure():
        loss = model(torch.ones(3, 12)).square().sum()
        loss.backward()
        return loss

    closure()
    return closure


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_refuse_coordinates_and_take_the_model_once_it_is_dense(name):
    model = lrk.to_subspace(Block(dtype=torch.float32), rank=4)
    closure = with_gradients(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{name} was given the coordinates of SubspaceLinear\(.*RSOAdamW.*to_dense"):
            optimizer.step(closure)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(layer.coordinates.any() for layer in model.children())

    lrk.to_dense(model)
    closure = with_gradients(model)
    OPTIMIZERS[name](model.parameters()).step(closure)
    assert not torch.equal(model.q_proj.weight, before["q_proj.weight"])
    optimizer.step(closure)


def test_groups_for_low_rank_adamw_are_not_made_of_converted_layers():
    """Whose weights are frozen, and not to be unfrozen for it."""
    model = lrk.to_subspace(Block(dtype=torch.float32), rank=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="'q_proj' is a SubspaceLinear.* RSOAdamW.* to_dense"):
        lrk.param_groups(model, rank=2)
    assert len(lrk.param_groups(lrk.to_dense(model), rank=2)[1]["params"]) == 4


def test_a_layer_of_one_group_added_later():
    model = lrk.to_subspace(Block(dtype=torch.float32), rank=4)
    with_gradients(model)
    optimizer = torch.optim.SGD([model.q_proj.bias], lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": [model.o_proj.coordinates]})
    with pytest.raises(RuntimeError, match="RSOAdamW"):
        optimizer.step()


def test_an_optimizer_that_was_built_before_the_conversion_says_so():
    """Its weights would not move, and nothing would show it."""
    model = Block(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with_gradients(model)
    optimizer.step()
    lrk.to_subspace(model, rank=4)
    with_gradients(model)
    with pytest.raises(RuntimeError, match=r"AdamW has the weight of SubspaceLinear\(.*converted after .* built.*RSOAdamW.*to_dense"):
        optimizer.step()
    model.requires_grad_(False)  # frozen on purpose
    optimizer.step()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    lrk.to_dense(model)
    with_gradients(model)
    optimizer.step()


def test_what_is_not_converted_may_have_any_optimizer():
    """Biases and norms with one of their own, the frozen weights in it too."""
    model = lrk.to_subspace(Block(dtype=torch.float32), rank=4)
    with_gradients(model)
    ours = lrk.RSOAdamW([p for name, p in model.named_parameters() if name.endswith("coordinates")])
    theirs = torch.optim.SGD([p for name, p in model.named_parameters() if not name.endswith("coordinates")], lr=0.1)
    before = copy.deepcopy(model.state_dict())
    theirs.step()
    assert torch.equal(model.q_proj.weight, before["q_proj.weight"]) and not torch.equal(model.q_proj.bias, before["q_proj.bias"])
    ours.step()
    assert not torch.equal(model.q_proj.weight, before["q_proj.weight"])


def test_a_compiled_step_of_another_model():
    lrk.to_subspace(Block(), rank=4)
    model, twin = nn.Linear(4, 4), nn.Linear(4, 4)
    twin.load_state_dict(model.state_dict())
    for each, compiled in ((model, False), (twin, True)):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for _ in range(2):
            each(torch.ones(2, 4)).sum().backward()
            step()
    assert torch.allclose(model.weight, twin.weight, atol=1e-5)


def test_a_compiled_step_is_refused_too():
    model = lrk.to_subspace(Block(dtype=torch.float32), rank=4)
    with_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="RSOAdamW"):
        torch.compile(optimizer.step, backend="aot_eager")()


LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
model(torch.ones(3, 6)).sum().backward()
try:
    torch.optim.SGD(model.parameters(), lr=0.1).step()
except RuntimeError as error:
    assert "RSOAdamW" in str(error)
else:
    sys.exit("not refused")
"""


def test_a_model_loaded_in_a_process_that_converted_none(tmp_path):
    torch.save(lrk.to_subspace(nn.Linear(6, 4), rank=2), tmp_path / "model.pt")
    found = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "model.pt")], capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr


def test_dead_layers_are_forgotten():
    layer = lrk.SubspaceLinear(6, 4, rank=2)
    coordinates, weight = layer.coordinates, layer.weight
    del layer
    assert layer_of(coordinates) is None and layer_of(weight) is None
