"""What RSOAdamW refuses, with what advice, and that a refusal or a failure changes nothing."""

import copy
import warnings

import pytest
import torch
from optim.models import Net, same_bits, train
from optim.rso_runs import Shared, build, converted, everything, random_gradients
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels import backends


def test_construction_errors():
    with pytest.raises(ValueError, match="params hold no coordinates of a SubspaceLinear; convert the model with to_subspace before"):
        lrk.RSOAdamW(Net().parameters())
    model, _ = build()
    others = [p for p in model.parameters() if not any(p is layer.coordinates for layer in converted(model).values())]
    with pytest.raises(ValueError, match="params hold no coordinates"):
        lrk.RSOAdamW(others)
    for options, error, message in [
        (dict(inner_steps=0), ValueError, "inner_steps must be a positive int, got 0"),
        (dict(inner_steps=2.0), TypeError, "inner_steps must be a positive int, got 2.0"),
        (dict(inner_steps=True), TypeError, "inner_steps must be a positive int, got True"),
        (dict(proximal=-0.1), ValueError, r"proximal must be finite and ≥ 0, got -0.1"),
        (dict(proximal=float("nan")), ValueError, "proximal must be finite"),
        (dict(momentum=1.0), ValueError, r"momentum must lie in \[0, 1\), got 1.0"),
        (dict(rounding="up"), ValueError, "rounding must be one of 'nearest', 'stochastic', got 'up'"),
        (dict(rounding="stochastic"), ValueError, r"for bfloat16 layers, got torch.float32 \(group 0, parameter \d+ of shape"),
        (dict(inner="adam"), ValueError, "inner must be one of 'adamw', 'sgd', got 'adam'"),
        (dict(lr=-1.0), ValueError, "lr must be finite and ≥ 0"),
        (dict(betas=(0.9, 1.0)), ValueError, "betas must lie in"),
        (dict(eps=-1e-8), ValueError, "eps must be"),
        (dict(weight_decay=float("inf")), ValueError, "weight_decay must be"),
    ]:
        with pytest.raises(error, match=message):
            lrk.RSOAdamW(model.parameters(), **options)


@pytest.mark.parametrize("key, value, error", [("inner", "adam", ValueError), ("inner_steps", 0, ValueError), ("proximal", "1", TypeError)])
def test_values_changed_to_wrong_ones_are_refused_before_anything_moves(key, value, error):
    model, optimizer = build()
    train(model, optimizer, 2)
    random_gradients(model)
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0][key] = value
    with pytest.raises(error, match=f"{key} must be"):
        optimizer.step()
    assert same_bits(before, model.state_dict())


@pytest.mark.parametrize(
    "group, message",
    [
        ({"proximl": 0.1}, "unknown key 'proximl' in a group .*; did you mean 'proximal'?"),
        ({"rank": 4}, "unknown key 'rank' in a group .*to_subspace"),
        ({"inner_steps": 0}, r"inner_steps must be a positive int, got 0 \(group 1\)"),
        (
            {"layer": "k_proj"},
            r"parameter 'blocks.0.k_proj.coordinates' of shape \(6, 24\) belongs to a layer that shares P with one in group 0",
        ),
    ],
)
def test_a_refused_group_leaves_the_optimizer_as_it_was(group, message):
    model, _ = build(net=Shared)
    shared = [(name, p) for name, p in model.named_parameters() if "k_proj" not in name]
    optimizer = lrk.RSOAdamW(shared, inner_steps=4)
    for step in range(5):
        random_gradients(model, step)
        optimizer.step()
    before = everything(model, optimizer)
    extra = (
        ("blocks.0.k_proj.coordinates", model.blocks[0]["k_proj"].coordinates)
        if group.pop("layer", None)
        else ("x", nn.Parameter(torch.ones(2)))
    )
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [extra]} | group)
    assert same_bits(before, everything(model, optimizer))
    assert all(layer.subspace.outer_step == 1 for layer in converted(model).values())


def test_layers_converted_after_the_optimizer_was_built_raise_at_the_next_step():
    torch.manual_seed(0)
    model = lrk.to_subspace(Net(), rank=4, target_modules=["layers"])
    optimizer = lrk.RSOAdamW(model.named_parameters(), inner_steps=4)
    train(model, optimizer, 2)
    lrk.to_subspace(model, rank=4, target_modules=["up"])
    random_gradients(model)
    before = everything(model, optimizer)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"parameter 'up.weight' .* build the optimizer after the conversion, from all of model.parameters\(\)"
        ):
            optimizer.step()
    assert same_bits(before, everything(model, optimizer))
    lrk.to_dense(model.up)
    train(model, optimizer, 1, start=2)
    build()  # another model's conversion does not matter
    train(model, optimizer, 1, start=3)


def test_a_weight_tied_after_the_conversion_raises():
    model, optimizer = build()
    train(model, optimizer, 1)
    random_gradients(model)
    before = everything(model, optimizer)
    model.layers[0].weight.requires_grad_(True)
    (model.layers[0].weight.square().sum()).backward()
    with pytest.raises(RuntimeError, match=r"the weight that group 0, .* stands for has a gradient of its own.* untie it"):
        optimizer.step()
    assert same_bits(before, everything(model, optimizer))


def test_a_weight_that_is_no_parameter_any_more_raises():
    model, optimizer = build()
    random_gradients(model)
    before = copy.deepcopy(model.layers[1].weight)
    torch.nn.utils.parametrizations.weight_norm(model.layers[0])
    with pytest.raises(RuntimeError, match="is no parameter any more, as after weight_norm"):
        optimizer.step()
    assert torch.equal(before, model.layers[1].weight)


def test_layers_without_a_gradient_in_the_first_outer_step_are_named_once():
    model, optimizer = build(inner_steps=2)

    def steps(count):
        for step in range(count):
            random_gradients(model, step)
            model.layers[1].coordinates.grad = None
            optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(1)
    with pytest.warns(UserWarning, match=r"1 layers had no gradient .* parameter \d+ of shape \(6, 40\): they were not used"):
        steps(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(4)


def test_a_graph_cannot_be_captured(monkeypatch):
    model, optimizer = build()
    random_gradients(model)
    before = everything(model, optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        optimizer.step()
    assert same_bits(before, everything(model, optimizer))


def test_a_failure_while_p_is_drawn_leaves_the_position_and_the_next_call_goes_on(monkeypatch):
    (model, optimizer), twin = build(inner_steps=3), build(inner_steps=4)
    draw, calls = lrk.nn.Subspace._draw, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    for step in range(5):
        for each, stepped in ((model, optimizer), twin):
            random_gradients(each, step)
            if step == 2 and stepped is optimizer:
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(lrk.nn.Subspace, "_draw", fail)
                    stepped.step()
            else:
                stepped.step()
    assert optimizer.param_groups[0]["outer_step"] == 1 and optimizer.param_groups[0]["inner_step"] == 1
    assert same_bits(model.state_dict(), twin[0].state_dict())


def test_another_optimizer_that_moves_the_same_p_raises():
    model, _ = build(net=Shared)
    block = model.blocks[0]
    one, two = (lrk.RSOAdamW(block[name].parameters(), inner_steps=2) for name in ("q_proj", "k_proj"))
    for step in range(2):
        random_gradients(model, step)
        one.step()
    random_gradients(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"P of group 0, .* is that of outer step 1 and the optimizer is at 0: another optimizer moves it"
    ):
        two.step()
    assert same_bits(before, model.state_dict())


@pytest.mark.parametrize("optimizer_of", [torch.optim.AdamW, lambda params: torch.optim.SGD(params, lr=0.1), lrk.LowRankAdamW])
def test_other_optimizers_refuse_coordinates(optimizer_of):
    model, _ = build()
    other = optimizer_of(list(model.parameters()))
    random_gradients(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="given the coordinates of SubspaceLinear.* build RSOAdamW"):
        other.step()
    assert same_bits(before, model.state_dict())


@pytest.mark.parametrize("what", ["step", "matrix"])
def test_a_step_that_fails_leaves_the_weights_of_its_layers_and_can_be_repeated(monkeypatch, what):
    (model, optimizer), twin = build(), build()
    train(model, optimizer, 4)
    train(*twin, 4)
    random_gradients(model)
    weights = {name: layer.weight.clone() for name, layer in converted(model).items()}
    states = {name: copy.deepcopy(optimizer.state[layer.coordinates]) for name, layer in converted(model).items()}
    with monkeypatch.context() as patch:
        where = backends if what == "step" else lrk.nn.Subspace
        patch.setattr(where, what, lambda *_, **__: (_ for _ in ()).throw(MemoryError("no")))
        with pytest.raises(MemoryError):
            optimizer.step()
    for name, layer in converted(model).items():
        assert torch.equal(layer.weight, weights[name]) and same_bits(states[name], optimizer.state[layer.coordinates])
    assert optimizer.param_groups[0]["inner_step"] == 0
    optimizer.step()
    random_gradients(twin[0])
    twin[1].step()
    for name, layer in converted(model).items():
        assert torch.equal(layer.weight, converted(twin[0])[name].weight)
