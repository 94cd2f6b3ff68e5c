"""RSOAdamW in training code: schedulers, closures, missing gradients, groups, hooks, layers that come and
go."""

import copy
import warnings

import pytest
import torch
from optim.models import Net, batch, same_bits, train
from optim.rso_runs import DEVICE, Shared, build, converted, random_gradients
from torch import nn

import lowrank_kernels as lrk


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_and_clipping_go_through_the_coordinates(set_to_none):
    model, optimizer = build()
    for step in range(6):
        x, y = batch(step)
        (100 * (model(x) - y).square().mean()).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        parameters = [p for p in model.parameters() if p.grad is not None]
        assert norm > 0.5 and sum(p.grad.square().sum() for p in parameters).sqrt() == pytest.approx(0.5, rel=1e-3)
        assert {id(layer.coordinates) for layer in converted(model).values()} <= {id(p) for p in parameters}
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all(p.grad is None if set_to_none else not p.grad.any() for p in parameters)


def test_gradients_accumulate():
    """Of a sum of losses, whether it is taken in one backward pass or in two."""
    whole, parts = build(torch.float64), build(torch.float64)
    for step in range(6):
        x, y = batch(step, torch.float64)
        (whole[0](x) - y).square().sum().backward()
        for half in (slice(0, 8), slice(8, 16)):
            (parts[0](x[half]) - y[half]).square().sum().backward()
        for _, optimizer in (whole, parts):
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(whole[0].parameters(), parts[0].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_layers_without_a_gradient_stay_and_count_by_themselves():
    model, optimizer = build(inner_steps=10, weight_decay=0.1, proximal=0.1, device=DEVICE)
    quiet = model.layers[1]
    for step in range(6):
        random_gradients(model, step)
        if step % 2:
            quiet.coordinates.grad = None
            before = quiet.weight.clone(), copy.deepcopy(optimizer.state[quiet.coordinates])
        optimizer.step()
        if step % 2:
            assert torch.equal(before[0], quiet.weight) and same_bits(before[1], optimizer.state[quiet.coordinates])
    assert optimizer.state[quiet.coordinates]["step"] == 3 and optimizer.state[model.up.coordinates]["step"] == 6
    optimizer.zero_grad()
    weights = copy.deepcopy(model.state_dict())
    for _ in range(4):
        optimizer.step()
    assert same_bits(weights, model.state_dict()), "steps without gradients move nothing"
    assert optimizer.param_groups[0]["outer_step"] == 1, "and count for inner_steps"
    assert not optimizer.state[quiet.coordinates]["exp_avg"].any(), "a layer without a gradient starts afresh as the others do"


def test_frozen_layers_and_coordinates_stay():
    torch.manual_seed(0)
    model = Net()
    model.layers[2].requires_grad_(False)
    lrk.to_subspace(model, rank=4)
    model.layers[0].coordinates.requires_grad_(False)
    optimizer = lrk.RSOAdamW(model.parameters(), inner_steps=2)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 5)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"layers.0.weight", "layers.2.weight", "layers.2.bias"} == before.keys() - moved
    model.layers[0].coordinates.requires_grad_(True)
    train(model, optimizer, 1, start=5)
    assert not torch.equal(model.layers[0].weight, before["layers.0.weight"]), "thawed"


@pytest.mark.parametrize("sparse", [False, True])
def test_an_embedding_tied_to_the_head_beside_converted_layers(sparse):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(20, 12, sparse=sparse), "mix": nn.Linear(12, 12), "head": nn.Linear(12, 20, bias=False)}
    )
    if not sparse:
        model["head"].weight = model["embedding"].weight
    lrk.to_subspace(model, rank=4, target_modules=["mix"])
    optimizer = lrk.RSOAdamW(model.parameters(), inner_steps=2)
    assert len(optimizer.param_groups[0]["params"]) == 4 + sparse
    before = copy.deepcopy(model.state_dict())
    model["head"](torch.tanh(model["mix"](model["embedding"](torch.arange(5))))).square().sum().backward()
    if sparse:
        with pytest.raises(TypeError, match=r"the gradient is sparse .* in group 0, parameter 0 of shape \(20, 12\); make it dense"):
            optimizer.step()
        assert same_bits(before, model.state_dict()) and not optimizer.state and optimizer.param_groups[0]["inner_step"] == 0
    else:
        optimizer.step()
        assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("net", [Net, Shared])
def test_models_of_other_dtypes_learn(dtype, net):
    model, optimizer = build(dtype, lr=0.01, inner_steps=10, net=net, device=DEVICE)
    x, y = batch(0, dtype, DEVICE)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be synchronised with")
def test_a_step_does_not_synchronise():
    """With a new P neither."""
    model, optimizer = build(device="cuda", inner_steps=3)
    train(model, optimizer, 3)
    random_gradients(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_groups_of_their_own_rates_and_times():
    model, _ = build()
    layers = converted(model)
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is layer.coordinates for layer in layers.values())]
    optimizer = lrk.RSOAdamW(
        [
            {"params": [model.up.coordinates], "lr": 0.5, "inner_steps": 2},
            {"params": [layer.coordinates for layer in layers.values() if layer is not model.up], "lr": 0.0},
            {"params": rest, "lr": 0.0},
            {"params": []},
        ],
        inner_steps=3,
    )
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 7)
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == {"up.weight"}
    assert [group["outer_step"] for group in optimizer.param_groups] == [3, 2, 2, 2]


def test_a_group_is_added_for_layers_that_are_converted_later():
    torch.manual_seed(0)
    model = lrk.to_subspace(Net(), rank=4, target_modules=["layers"])
    optimizer = lrk.RSOAdamW([*model.layers.parameters()], inner_steps=4)
    train(model, optimizer, 6)
    lrk.to_subspace(model, rank=3, target_modules=["up", "down"])
    optimizer.add_param_group({"params": [*model.up.parameters(), *model.down.parameters()], "inner_steps": 2})
    train(model, optimizer, 3, start=6)
    assert [(group["outer_step"], group["inner_step"]) for group in optimizer.param_groups] == [(2, 1), (1, 1)]
    assert optimizer.state[model.up.coordinates]["exp_avg"].shape == (3, 40)


@pytest.mark.parametrize("options", [{}, {"inner": "sgd"}, {"dtype": torch.bfloat16}, {"proximal": 0.1}], ids=str)
@pytest.mark.parametrize("steps", [0, 3])
def test_layers_made_dense_again_train_as_such(options, steps):
    """Also where that came between a backward pass and its step, when their coordinates have gradients."""
    model, optimizer = build(**options)
    train(model, optimizer, steps)
    random_gradients(model)
    weights = {name: layer.weight.clone() for name, layer in converted(model).items()}
    lrk.to_dense(model)
    optimizer.step()
    assert all(torch.equal(weight, model.get_submodule(name).weight) for name, weight in weights.items())
    optimizer.zero_grad()
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW([twin.get_submodule(name).weight for name in weights], lr=1e-2, weight_decay=0.0, fused=True)
    for step in range(6):
        random_gradients(model, step)
        for name in weights:
            twin.get_submodule(name).weight.grad = model.get_submodule(name).weight.grad.clone()
        optimizer.step()
        adamw.step()
    assert all(torch.equal(model.get_submodule(name).weight, twin.get_submodule(name).weight) for name in weights)


def test_a_parameter_given_twice_is_updated_once():
    runs = []
    for times in (1, 2):
        torch.manual_seed(0)
        layer = lrk.SubspaceLinear(8, 12, rank=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the duplicate
            optimizer = lrk.RSOAdamW([*layer.parameters()] * times, inner_steps=2)
        for step in range(3):
            random_gradients(layer, step)
            optimizer.step()
        runs.append(layer.state_dict())
    assert same_bits(*runs)
