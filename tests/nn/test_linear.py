"""SubspaceLinear: values and gradients against fp64, what is saved, and the ways in which a layer is used."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nn.layers import Block, Saved, product_error, projection
from tolerances import assert_within
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lowrank_kernels as lrk


def arranged(shape, layout, dtype):
    """Random values of a shape, laid out in memory as named."""
    if layout == "transposed":
        return torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))).to(dtype)
    if layout == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    if layout == "expanded":
        return torch.randn(1 if shape[:-1] else shape[-1], *([shape[-1]] if shape[:-1] else [])).to(dtype).expand(shape)
    if layout == "all one":
        return torch.randn(()).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(1, 40)),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    layouts=st.tuples(*[st.sampled_from(["plain", "transposed", "strided", "expanded", "all one"])] * 2),
    needs_x=st.booleans(),
)
@example([], (8, 6, 2), True, torch.float32, ("plain", "all one"), True)
@example([1], (1, 1, 1), True, torch.float32, ("plain", "plain"), True)
@example([0], (8, 6, 8), True, torch.bfloat16, ("plain", "plain"), True)
@example([2, 0, 3], (8, 6, 1), False, torch.float32, ("plain", "expanded"), True)
@example([3, 4, 2], (33, 1, 33), True, torch.bfloat16, ("transposed", "transposed"), True)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_forward_is_that_of_linear_and_gradients_those_of_the_coordinates(tokens, sizes, bias, dtype, layouts, needs_x):
    """y = x·(Wᵀ + P·B) + b at B = 0, by autograd in fp64."""
    in_features, out_features, rank = sizes[0], sizes[1], min(sizes[0], sizes[2])
    torch.manual_seed(in_features)
    layer = lrk.SubspaceLinear(in_features, out_features, bias, dtype=dtype, rank=rank)
    x = arranged((*tokens, in_features), layouts[0], dtype).requires_grad_(needs_x)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias)) and y.dtype == dtype

    dy = arranged(y.shape, layouts[1], dtype)
    y.backward(dy)
    P = projection(layer)
    exact_x, weight, offset = (None if t is None else t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    B = torch.zeros(rank, out_features, dtype=torch.float64, requires_grad=True)
    exact_y = exact_x @ (weight.mT + P.double() @ B) + (0 if offset is None else offset)
    exact_y.backward(dy.double())

    rows, dy_rows = x.detach().double().reshape(-1, in_features) if x.numel() else x.new_zeros(0, in_features).double(), dy.double()
    dy_rows = dy_rows.reshape(rows.shape[0], out_features)
    of_z = product_error(rows, P, dtype)
    z = rows @ P.double()
    assert_within(layer.coordinates.grad, B.grad, product_error(z.mT, dy_rows, dtype, of_z.mT), "dB")
    if bias:
        assert_within(layer.bias.grad, offset.grad, product_error(torch.ones(1, len(rows)), dy_rows, dtype)[0], "db")
    if needs_x:
        assert_within(x.grad, exact_x.grad, product_error(dy_rows, weight.detach(), dtype).reshape(x.shape), "dx")
    assert layer.weight.grad is None and (x.grad is not None) == needs_x


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_gradcheck(shape):
    layer = lrk.SubspaceLinear(5, 4, dtype=torch.float64, rank=2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: layer(x), (x, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (7, 12), (0, 12), (2, 3, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_saves_tokens_times_rank(shape, rank, dtype):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    tokens = x.numel() // 12
    dense, layer = nn.Linear(12, 9, dtype=dtype), lrk.SubspaceLinear(12, 9, dtype=dtype, rank=rank)
    with Saved(dense) as of_dense:
        dense(x)
    with Saved(layer) as of_layer:
        layer(x)
    assert (of_dense.bytes, of_layer.bytes) == (tokens * 12 * dtype.itemsize, tokens * rank * dtype.itemsize)


@pytest.mark.parametrize("rank", [1, 7, 24])
def test_forward_and_backward_take_two_large_products_instead_of_three(rank):
    tokens, wide, out = 30, 24, 40
    layer = lrk.SubspaceLinear(wide, out, rank=rank)
    x = torch.randn(2, 15, wide, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 4 * tokens * wide * out + 2 * tokens * rank * (wide + out)


def test_saves_z_alone_of_an_expanded_input():
    layer = lrk.SubspaceLinear(12, 9, rank=3)
    with Saved(layer) as saved:
        layer(torch.randn(1, 1, 12).expand(4, 5, 12))
    assert saved.bytes == 4 * 5 * 3 * 4


def gradients(module, loss, *inputs):
    """Of every trainable parameter and of the inputs, of the loss."""
    wanted = [p for p in module.parameters() if p.requires_grad] + [x for x in inputs if x.requires_grad]
    return [
        torch.zeros_like(p) if g is None else g for p, g in zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True)
    ]


def same(first, second, exactly=True):
    return all(torch.equal(a, b) if exactly else torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(first, second, strict=True))


def block(**options):
    torch.manual_seed(0)
    return lrk.to_subspace(Block(**options), rank=4), torch.randn(2, 5, 12, dtype=options.get("dtype", torch.float64), requires_grad=True)


def test_autocast():
    """Forward as nn.Linear's under autocast, backward outside, as is usual; Z in the type of the
    computation."""
    layer = lrk.SubspaceLinear(12, 9, rank=5)
    x = torch.randn(7, 12, requires_grad=True)
    dense = nn.Linear(12, 9)
    dense.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        with Saved(layer) as saved:
            y = layer(x)
        expected = dense(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected) and saved.bytes == 7 * 5 * 2
    dy = torch.randn(7, 9).bfloat16()
    y.backward(dy)
    dx, x.grad = x.grad, None
    expected.backward(dy)
    assert torch.equal(dx, x.grad) and dx.dtype == torch.float32 and torch.equal(layer.bias.grad, dense.bias.grad)

    x_rows, P, dtype = x.detach().bfloat16(), projection(layer).bfloat16(), torch.bfloat16
    z = x_rows.double() @ P.double()
    bound = product_error(z.mT, dy, dtype, product_error(x_rows, P, dtype).mT)
    assert layer.coordinates.grad.dtype == torch.float32
    assert_within(layer.coordinates.grad, z.mT @ dy.double(), bound, "dB")


def test_autocast_of_a_block_gives_the_bits_of_linear():
    model, x = block(dtype=torch.float32)
    dense = lrk.to_dense(copy.deepcopy(model))
    found = []
    for each in (model, dense):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [each.q_proj.bias, each.k_proj.bias, each.o_proj.bias])])
    assert same(*found)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_gives_equal_gradients(use_reentrant):
    model, x = block()
    expected = gradients(model, model(x).square().sum(), x)
    # Reentrant checkpoints run backward inside of backward, which torch.autograd.grad cannot.
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert same([p.grad for p in model.parameters() if p.requires_grad] + [x.grad], expected)


def test_checkpoint_saves_its_input_alone():
    model, x = block()
    with Saved(model) as saved:
        checkpoint(model, x, use_reentrant=False)
    assert saved.bytes == x.nbytes


def test_no_grad_saves_and_projects_nothing(monkeypatch):
    model, x = block()
    expected = model(x)
    monkeypatch.setattr(type(model.o_proj.subspace), "project", None)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_training_after_a_first_use_in_inference_mode():
    model, x = block()
    twin, _ = block()
    expected = gradients(twin, twin(x).square().sum(), x)
    with torch.inference_mode():
        model(x)
        for layer in model.children():
            projection(layer)
    for layer in model.children():
        layer.subspace.move_to(1)
        layer.subspace.move_to(0)
    assert same(gradients(model, model(x).square().sum(), x), expected)


def test_an_input_made_in_inference_mode_can_be_trained_on():
    model, x = block()
    with torch.inference_mode():
        features = x.clone()
    expected = gradients(model, model(x.detach()).square().sum())
    assert same(gradients(model, model(features).square().sum()), expected)


def test_the_same_layer_twice_in_one_forward():
    layer = lrk.SubspaceLinear(6, 6, dtype=torch.float64, rank=3)
    x = torch.randn(4, 6, dtype=torch.float64)
    P, B = projection(layer), torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.mT + P @ B
    (torch.tanh(x @ weight + layer.bias.detach()) @ weight).square().sum().backward()
    (layer(torch.tanh(layer(x))) - layer.bias).square().sum().backward()
    assert torch.allclose(layer.coordinates.grad, B.grad, rtol=1e-12)


def test_micro_batches_accumulate_to_the_batch():
    model, x = block()
    expected = gradients(model, model(x).square().sum())
    for part in x.detach().split(1):
        model(part).square().sum().backward()
    assert same([p.grad for p in model.parameters() if p.requires_grad], expected, exactly=False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["plain", "expanded", "transposed"])
@pytest.mark.parametrize("tokens", [(), (3,), (0,), (2, 3), (2, 3, 4)])
def test_the_output_may_be_changed_in_place(tokens, layout, bias):
    layer = lrk.SubspaceLinear(8, 6, bias, dtype=torch.float64, rank=2)
    x = arranged((*tokens, 8), layout, torch.float64).requires_grad_()
    residual = torch.randn(*tokens, 6, dtype=torch.float64)
    expected = gradients(layer, F.relu(layer(x) + residual).square().sum(), x)
    y = layer(x)
    y += residual
    assert same(gradients(layer, nn.ReLU(inplace=True)(y).square().sum(), x), expected)


def test_a_second_derivative_raises():
    layer = lrk.SubspaceLinear(6, 4, rank=2)
    x = torch.randn(3, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_a_weight_that_moved_between_forward_and_backward_raises():
    layer = lrk.SubspaceLinear(6, 4, rank=2)
    y = layer(torch.randn(3, 6, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_subspace_that_moved_between_forward_and_backward_does_not_matter():
    model, x = block()
    expected = gradients(model, model(x).square().sum(), x)
    loss = model(x).square().sum()
    for layer in model.children():
        layer.subspace.move_to(1)
    assert same(gradients(model, loss, x), expected)


@pytest.mark.parametrize("trained_weight", [False, True])
def test_without_trained_coordinates_it_is_linear(trained_weight):
    layer, dense = lrk.SubspaceLinear(6, 4, rank=2), nn.Linear(6, 4)
    dense.load_state_dict(layer.state_dict())
    layer.coordinates.requires_grad_(False)
    for each in (layer, dense):
        each.weight.requires_grad_(trained_weight)
    x = torch.randn(3, 6, requires_grad=True)
    with Saved(layer) as saved:
        y = layer(x)
    assert saved.bytes == (x.nbytes if trained_weight else 0)
    assert same(gradients(layer, y.square().sum(), x), gradients(dense, dense(x).square().sum(), x))
    assert layer.coordinates.grad is None


def test_requires_grad_for_the_whole_model_does_no_harm():
    model, x = block()
    expected = gradients(model, model(x).square().sum())
    model.requires_grad_(True)
    with Saved(model) as saved:
        model.o_proj(x)
    assert saved.bytes == 2 * 5 * 4 * 8
    model(x).square().sum().backward()
    assert all(layer.weight.grad is None for layer in model.children())
    found = [p.grad for name, p in model.named_parameters() if not name.endswith("weight")]
    assert same(found, expected)
