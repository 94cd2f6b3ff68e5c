"""SubspaceLinear as a module: checkpoints, copies, moves between dtypes and devices, and what it shows of
itself."""

import copy
import io
import pickle

import pytest
import torch
from nn.layers import Block, Model, projection
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.nn import layer_of


def build(**options):
    torch.manual_seed(0)
    return lrk.to_subspace(Model(**options), rank=4)


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, lrk.SubspaceLinear)}


def trained_once(model):
    """Gradients of all trainable parameters after one backward pass."""
    model(torch.arange(8).reshape(2, 4)).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def check_whole(model, expected):
    """Every layer is known by its parameters, its coordinates are zero and beside the weight; gradients are
    the expected ones."""
    for layer in layers_of(model).values():
        assert layer_of(layer.weight) is layer and layer_of(layer.coordinates) is layer
        assert (layer.coordinates.device, layer.coordinates.dtype) == (layer.weight.device, layer.weight.dtype)
        assert layer.coordinates.requires_grad and not layer.weight.requires_grad and not layer.coordinates.any()
    assert same(trained_once(model), expected)


# Checkpoints.


def test_the_state_dict_is_that_of_linear():
    dense, model = Model(), build()
    for options in ({}, {"keep_vars": True}, {"prefix": "a."}):
        assert list(model.state_dict(**options)) == list(dense.state_dict(**options))
    assert not any("coordinates" in name for name, _ in model.named_buffers())


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_load_both_ways(assign):
    model, dense = build(), Model()
    expected = trained_once(model)
    dense.load_state_dict(model.state_dict(), strict=True, assign=assign)
    assert same(dense.state_dict(), model.state_dict())
    fresh = lrk.to_subspace(Model(), rank=4)
    incoming = copy.deepcopy(dense.state_dict())
    result = fresh.load_state_dict(incoming, strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    check_whole(fresh, expected)
    if assign:
        assert fresh.layers[0].q_proj.weight.data_ptr() == incoming["layers.0.q_proj.weight"].data_ptr()


def test_a_checkpoint_that_lacks_a_weight_is_refused():
    state = Model().state_dict()
    del state["layers.0.q_proj.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "layers.0.q_proj.weight"'):
        build().load_state_dict(state)


@pytest.mark.parametrize("how", ["assign", "to_empty", "dtype assign"])
def test_a_model_built_on_meta_loads_a_checkpoint(how):
    expected = build(dtype=torch.float64 if how == "dtype assign" else torch.float32)
    with torch.device("meta"):
        model = Model()
    lrk.to_subspace(model, rank=4)
    assert model.layers[0].q_proj.coordinates.is_meta
    if how == "to_empty":
        with torch.no_grad():
            for p in model.to_empty(device="cpu").parameters():
                assert p.device.type == "cpu"
    model.load_state_dict(expected.state_dict(), assign=how != "to_empty")
    check_whole(model, trained_once(expected))


def test_to_empty_leaves_coordinates_zero():
    model = build()
    for layer in layers_of(model).values():
        layer.coordinates.data.fill_(1)
    model.to_empty(device="cpu")
    assert not any(layer.coordinates.any() for layer in layers_of(model).values())


# Copies.


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled, saved_and_loaded])
def test_copies_are_whole_and_independent(copied):
    model = build()
    model.layers[0].q_proj.subspace.move_to(2)
    expected = trained_once(model)
    before = copy.deepcopy(model.state_dict())
    twin = copied(model)
    assert all(layer_of(layer.coordinates) is layer for layer in layers_of(twin).values())
    for name, layer in layers_of(twin).items():
        original = layers_of(model)[name]
        assert layer.subspace is not original.subspace and torch.equal(projection(layer), projection(original))
    attention = twin.layers[0]
    assert attention.q_proj.subspace is attention.k_proj.subspace is not attention.o_proj.subspace
    check_whole(twin, expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    attention.q_proj.subspace.move_to(3)
    lrk.to_dense(twin.layers[1])
    assert same(model.state_dict(), before)
    check_whole(model, expected)


def test_a_shallow_copy_leaves_the_original_known():
    layer = lrk.SubspaceLinear(6, 4, rank=2)
    copy.copy(layer)
    assert layer_of(layer.coordinates) is layer


@pytest.mark.parametrize("drawn", [False, True])
def test_p_is_not_stored(drawn):
    """100 × 50 of 4 bytes would be 20 kB; weight, coordinates and bias are 6 kB."""
    layer = lrk.SubspaceLinear(100, 10, rank=50)
    if drawn:
        layer(torch.randn(1000, 100)).sum().backward()
    layer.zero_grad()
    for write in (torch.save, pickle.dump):
        file = io.BytesIO()
        write(layer, file)
        assert 100 * 10 * 4 < file.tell() < 12_000


# dtypes and devices.


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.bfloat16, lambda model: model.to("cpu", torch.float64)])
def test_other_dtypes(change):
    model, twin = build(), change(Model())
    change(model)
    twin.load_state_dict(model.state_dict())
    check_whole(model, trained_once(lrk.to_subspace(twin, rank=4)))


@pytest.mark.parametrize("swap", [False, True])
def test_parameters_swapped_on_conversion(swap):
    model = build()
    q = model.layers[0].q_proj
    before = q.coordinates
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.double()
        model.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert q.coordinates is before, "an optimizer has it"
    check_whole(model, trained_once(model))


def test_to_meta_and_half_and_train():
    model = build()
    assert all(p.dtype == torch.float16 for p in model.half().parameters())
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())
    y = model(torch.arange(4, device="meta"))
    y.sum().backward()
    assert y.shape == (4, 10) and model.layers[0].q_proj.coordinates.grad.is_meta
    assert not model.eval().layers[0].q_proj.training and model.train().layers[0].q_proj.training


def test_a_failed_move_leaves_the_layer_known():
    with torch.device("meta"):
        layer = lrk.SubspaceLinear(6, 4, rank=2)
    with pytest.raises(NotImplementedError, match="to_empty"):
        layer.to("cpu")
    assert layer_of(layer.coordinates) is layer


# Construction.


def test_construction():
    layer = lrk.SubspaceLinear(8, 6, False, "cpu", torch.bfloat16, rank=3, distribution="haar", seed=5)
    assert isinstance(layer, nn.Linear) and layer.bias is None
    assert {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()} == {
        "weight": ((6, 8), torch.bfloat16, False),
        "coordinates": ((3, 6), torch.bfloat16, True),
    }
    assert repr(layer) == "SubspaceLinear(in_features=8, out_features=6, bias=False, rank=3, distribution='haar')"
    torch.manual_seed(0)
    weight = nn.Linear(8, 6).weight
    torch.manual_seed(0)
    assert torch.equal(lrk.SubspaceLinear(8, 6, rank=3).weight, weight), "initialised as nn.Linear, P taking no random numbers"
    state = torch.get_rng_state()
    layer(torch.randn(2, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_gives_p(seed):
    P, other = (projection(lrk.SubspaceLinear(8, 6, rank=3, seed=s)) for s in (seed, seed + 1))
    assert torch.equal(P, projection(lrk.SubspaceLinear(8, 40, dtype=torch.float32, rank=3, seed=seed))) and not torch.equal(P, other)


def test_construction_on_meta_and_without_initialisation():
    assert all(p.is_meta for p in lrk.SubspaceLinear(8, 6, device="meta", rank=3).parameters())
    with torch.device("meta"):
        assert all(p.is_meta for p in lrk.SubspaceLinear(8, 6, rank=3).parameters())
    layer = nn.utils.skip_init(lrk.SubspaceLinear, 8, 6, rank=3)
    assert not layer.coordinates.any() and layer.weight.shape == (6, 8)
    layer.reset_parameters()
    layer(torch.randn(2, 8)).sum().backward()
    assert layer_of(layer.coordinates) is layer and layer.coordinates.grad.any()


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (dict(rank=0), ValueError, "rank must be an int from 1 to in_features = 8, got 0"),
        (dict(rank=9), ValueError, "got 9"),
        (dict(rank=True), ValueError, "got True"),
        (dict(rank=2.0), ValueError, "got 2.0"),
        (dict(rank=2, distribution="uniform"), ValueError, "must be one of 'gaussian', 'haar', 'rademacher', 'principal', got 'uniform'"),
        (dict(rank=2, seed="a"), TypeError, "seed must be an int, got 'a'"),
        (dict(rank=2, seed=1.0), TypeError, "seed must be an int, got 1.0"),
        (dict(rank=2, dtype=torch.complex64), ValueError, "dtype must be a real floating-point type, got torch.complex64"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=message):
        lrk.SubspaceLinear(8, 6, **bad)


def test_hooks_run():
    block, calls = Block(), []
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    block.q_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    block.q_proj.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    block.q_proj.register_full_backward_hook(lambda module, dx, dy: calls.append((dx[0].shape, dy[0].shape)))
    expected = block(x).detach()
    lrk.to_subspace(block, rank=4)
    y = block(x)
    y.sum().backward()
    assert torch.equal(y, expected) and calls == [(3, 12), (3, 12), ((3, 12), (3, 12))]
    assert block.q_proj.coordinates.grad.any()


def test_parameters_of_a_converted_model_load_with_weights_only():
    model = build()
    buffer = io.BytesIO()
    torch.save({"kept": model.state_dict(keep_vars=True), "named": dict(model.named_parameters())}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert all(torch.equal(value, loaded["named"][name]) for name, value in model.named_parameters())
    assert all(layer_of(value) is None for value in loaded["named"].values())
