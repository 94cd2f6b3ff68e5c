"""Layers that share P: one Z where they read one tensor, another where they do not, and nothing kept after
use."""

import copy

import pytest
import torch
from nn.layers import Block, Saved, projection
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import lowrank_kernels as lrk
from lowrank_kernels.nn import Subspace

RANK, TOKENS = 4, 7


def shared(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = lrk.to_subspace(Block(dtype=dtype), rank=RANK, **options)
    return [model.q_proj, model.k_proj, model.v_proj]


def given(dtype=torch.float64, **options):
    return torch.randn(TOKENS, 12, dtype=dtype, **options)


def check_gradients(layers, inputs, dys):
    """dB = (x·P)ᵀ·dy of each layer's own x."""
    for layer, x, dy in zip(layers, inputs, dys, strict=True):
        exact = (x.double() @ projection(layer).double()).mT @ dy.double()
        assert torch.allclose(layer.coordinates.grad.double(), exact, rtol=1e-12, atol=1e-12)


def test_layers_that_read_one_tensor_save_one_z():
    layers, x = shared(), given(requires_grad=True)
    with Saved(*layers) as saved:
        outputs = [layer(x) for layer in layers]
    assert saved.bytes == TOKENS * RANK * 8
    dys = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, dys)
    check_gradients(layers, [x.detach()] * 3, dys)
    assert torch.allclose(x.grad, sum(dy @ layer.weight for dy, layer in zip(dys, layers, strict=True)))


def test_a_block_saves_one_z_for_each_input_of_its_linear_layers():
    """Through the whole model: what is not of the linear layers is saved as before."""
    torch.manual_seed(0)
    model, x = Block(), given(requires_grad=True)
    model.requires_grad_(False)
    with Saved(model) as others:
        model(x)
    model.requires_grad_(True)
    lrk.to_subspace(model, rank=RANK)
    with Saved(model) as saved:
        model(x)
    assert saved.bytes == others.bytes + 2 * TOKENS * RANK * 8


def changed_in_place(x):
    with torch.no_grad():
        return x.mul_(2)


@pytest.mark.parametrize("other", [torch.clone, lambda x: x.view_as(x), lambda x: x.detach(), lambda x: x[:3], changed_in_place])
@pytest.mark.parametrize("which", [1, 2])
def test_layers_that_read_different_tensors_do_not_share(other, which):
    layers, x = shared(), given()
    inputs, outputs, seen = [], [], []
    with Saved(*layers) as saved:
        for index, layer in enumerate(layers):
            x = other(x) if index == which else x
            seen.append(x)
            inputs.append(x.clone())
            outputs.append(layer(x))
    assert len(saved.storages) == 2
    dys = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, dys)
    check_gradients(layers, inputs, dys)


def test_inputs_that_alternate():
    layers, inputs = shared(), [given(), given()]
    order = [(0, 0), (1, 1), (2, 0), (0, 1), (1, 0), (2, 1)]
    outputs = [(layers[layer](inputs[x]), layer, x) for layer, x in order]
    expected = [torch.zeros_like(layer.coordinates) for layer in layers]
    for y, layer, x in outputs:
        dy = torch.randn_like(y)
        expected[layer] += (inputs[x] @ projection(layers[layer])).mT @ dy
        y.backward(dy)
    for layer, exact in zip(layers, expected, strict=True):
        assert torch.allclose(layer.coordinates.grad, exact)


@pytest.mark.parametrize("modes", [(None, torch.bfloat16), (torch.bfloat16, None), (torch.float16, torch.bfloat16)])
def test_layers_called_under_another_autocast_do_not_share(modes):
    (q, k, _), x = shared(torch.float32), given(torch.float32)
    z = []
    for layer, mode in zip((q, k), modes, strict=True):
        with torch.autocast("cpu", mode, enabled=mode is not None), Saved(q, k) as saved:
            layer(x)
        z.append(saved.bytes)
    assert z == [TOKENS * RANK * (mode or torch.float32).itemsize for mode in modes]


def test_layers_that_do_not_share_p():
    layers, x = shared(share=None), given()
    with Saved(*layers) as saved:
        outputs = [layer(x) for layer in layers]
    assert saved.bytes == 3 * TOKENS * RANK * 8
    dys = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, dys)
    check_gradients(layers, [x] * 3, dys)


# Nothing is kept.


def reference(tensor):
    return StorageWeakRef(tensor.untyped_storage())


def called(layers, x):
    """The layers' outputs, and a weak reference to each Z saved."""
    with Saved(*layers) as saved:
        outputs = [layer(x) for layer in layers]
    zs = [StorageWeakRef(storage) for storage in saved.storages.values()]
    saved.storages.clear()
    assert zs or not torch.is_grad_enabled()
    return outputs, zs


some_called = pytest.mark.parametrize("count", [1, 2, 3], ids=lambda count: f"{count} of 3 called")


@some_called
def test_nothing_is_kept_once_outputs_and_input_are_gone(count):
    layers, x = shared(), given(requires_grad=True) * 1
    of_x = reference(x)
    outputs, zs = called(layers[:count], x)
    del x, outputs
    assert of_x.expired() and all(z.expired() for z in zs)


@some_called
def test_x_is_not_kept_while_outputs_live(count):
    layers, x = shared(), given()
    of_x = reference(x)
    outputs, zs = called(layers[:count], x)
    del x
    assert of_x.expired() and not any(z.expired() for z in zs)
    del outputs
    assert all(z.expired() for z in zs)


@some_called
def test_z_is_not_kept_after_backward(count):
    layers, x = shared(), given()
    outputs, zs = called(layers[:count], x)
    sum(y.sum() for y in outputs).backward()
    if count < 3:  # until then another layer may ask for it
        del x
    assert all(z.expired() for z in zs)


@some_called
def test_nothing_is_kept_where_gradients_are_off(count):
    layers, x = shared(), given()
    of_x = reference(x)
    with torch.no_grad():
        outputs, zs = called(layers[:count], x)
    del x
    assert of_x.expired() and not zs and len(outputs) == count


@some_called
def test_z_is_not_kept_when_the_subspace_moved(count):
    layers, x = shared(), given()
    outputs, zs = called(layers[:count], x)
    layers[0].subspace.move_to(1)
    del outputs
    assert all(z.expired() for z in zs)
    with Saved(*layers) as saved:
        outputs = [layer(x) for layer in layers]
    assert saved.bytes == TOKENS * RANK * 8
    dys = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, dys)
    check_gradients(layers, [x] * 3, dys)


# P.


def test_the_same_memory_through_all_outer_steps_and_the_same_bits_at_each():
    subspace = Subspace(20, 6, "gaussian", 3, 5)
    where = torch.device("cpu"), torch.float32
    P = subspace.matrix(*where)
    first, address = P.clone(), P.data_ptr()
    subspace.move_to(4)
    fourth = P.clone()
    assert subspace.matrix(*where) is P and P.data_ptr() == address and not torch.equal(fourth, first)
    subspace.move_to(0)
    assert torch.equal(P, first)
    late = Subspace(20, 6, "gaussian", 3, 5)
    late.move_to(4)
    assert torch.equal(late.matrix(*where), fourth)


def test_every_copy_moves():
    subspace = Subspace(20, 6, "haar", 0)
    single, double = (subspace.matrix(torch.device("cpu"), dtype) for dtype in (torch.bfloat16, torch.float64))
    subspace.move_to(1)
    for P in (single, double):
        fresh = Subspace(20, 6, "haar", 0)
        fresh.move_to(1)
        assert torch.equal(fresh.matrix(P.device, P.dtype), P)


def test_another_seed_place_or_distribution_is_another_p():
    kinds = [("gaussian", 0), ("gaussian", 1), ("gaussian", -1), ("gaussian", 2**40), ("gaussian", 0, 0), ("gaussian", 0, 1), ("haar", 0)]
    subspaces = [Subspace(20, 6, *kind) for kind in kinds]
    drawn = [s.matrix(torch.device("cpu"), torch.float32) for s in subspaces]
    for index, P in enumerate(drawn):
        assert not any(torch.allclose(P, other, atol=0.1) for other in drawn[:index])
    fingerprints = {s.fingerprint for s in subspaces}
    assert len(fingerprints) == len(kinds) and all(-(2**63) <= value < 2**63 for value in fingerprints)


def test_a_first_draw_under_autocast_is_that_outside():
    subspaces = [Subspace(64, 16, "haar", 0) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = subspaces[0].matrix(torch.device("cpu"), torch.float32)
    assert torch.equal(inside, subspaces[1].matrix(torch.device("cpu"), torch.float32))


def test_p_drawn_for_a_trace_alone_is_not_used_after_it():
    from torch._subclasses.fake_tensor import FakeTensorMode

    subspace = Subspace(8, 2, "gaussian", 0)
    with FakeTensorMode():
        subspace.matrix(torch.device("cpu"), torch.float32)
    P = subspace.matrix(torch.device("cpu"), torch.float32)
    assert type(P) is torch.Tensor and torch.equal(P, Subspace(8, 2, "gaussian", 0).matrix(P.device, P.dtype))


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.half, lambda layer: layer.to("meta")])
def test_p_follows_the_layer_and_leaves_none_behind(change):
    layer = lrk.SubspaceLinear(8, 4, rank=2)
    before = reference(projection(layer))
    change(layer)
    assert before.expired()
    P = projection(layer)
    assert (P.device, P.dtype, P.shape) == (layer.weight.device, layer.weight.dtype, (8, 2))
    if not P.is_meta:
        assert torch.allclose(P.float(), projection(lrk.SubspaceLinear(8, 4, rank=2)), rtol=2**-10)


def test_a_copy_has_a_life_of_its_own():
    layers, x = shared(), given()
    layers[0](x)
    twins = copy.deepcopy(nn.ModuleList(layers))
    assert twins[0].subspace is twins[2].subspace is not layers[0].subspace
    twins[0].subspace.move_to(1)
    assert layers[0].subspace.outer_step == 0 and not torch.equal(projection(layers[0]), projection(twins[0]))
