"""The parts of the example's block that keep less: their gradients, and how much they keep."""

import lean
import llama
import pytest
import torch
import torch.nn.functional as F

import lowrank_kernels as lrk


def exact(*shape):
    """fp32 numbers that bf16 holds too, so that keeping them in bf16 loses nothing."""
    return torch.randn(shape).bfloat16().float().requires_grad_()


def check(ours, eager, inputs, tolerance=1e-5):
    found, expected = ours(*inputs), eager(*inputs)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)
    dy = torch.randn_like(found)
    inputs = [each for each in inputs if each.requires_grad]
    for one, other in zip(torch.autograd.grad(found, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        assert one.dtype == other.dtype and (one - other).norm() <= tolerance * other.norm()


def test_rms_norm():
    norm = llama.RMSNorm(24)
    torch.nn.init.normal_(norm.weight)
    check(lambda x, w: lean.RMSNorm.apply(x, w, norm.eps), lambda x, w: norm(x), [exact(3, 5, 24), norm.weight])


def test_swiglu():
    check(lean.SwiGLU.apply, lambda gate, up: F.silu(gate) * up, [exact(3, 5, 24), exact(3, 5, 24)])


def test_attention():
    cos, sin = llama.rotary_angles(torch.arange(7), 8)

    def eager(q, k, v):
        return F.scaled_dot_product_attention(llama.rotate(q, cos, sin), llama.rotate(k, cos, sin), v, is_causal=True)

    check(lambda q, k, v: lean.Attention.apply(q, k, v, cos, sin, llama.rotate), eager, [exact(2, 3, 7, 8) for _ in range(3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_model_are_off_by_a_rounding_to_bf16(dtype):
    models = [llama.Llama(llama.SIZES["tiny"], 256, lean=how).initialize(0).to(dtype) for how in (False, True)]
    tokens = torch.randint(0, 256, (2, 33))
    losses = [llama.loss(model, tokens) for model in models]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, eager), ours in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (eager.grad - ours.grad).norm() <= 2.0**-6 * eager.grad.norm(), name


def kept_bytes(size, *, how, rank, dtype=torch.float32):
    """Of one block, for 2 × 128 positions."""
    model = llama.Llama(size, 256, lean=how).initialize(0).to(dtype)
    if rank:
        lrk.to_subspace(model.layers, rank=rank, target_modules=".*proj")
    cos, sin = llama.rotary_angles(torch.arange(128), model.head_dim)
    x = torch.randn(2, 128, size.hidden, dtype=dtype, requires_grad=True)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.layers[0](x, cos, sin)
    y.sum().backward()
    return sum(found.values())


def test_with_rso_a_block_keeps_less_than_two_fifths():
    """Of a LLaMA 60M block in fp32 with a quarter of the width as the rank."""
    size = llama.SIZES["60m"]
    eager, ours = kept_bytes(size, how=False, rank=None), kept_bytes(size, how=True, rank=128)
    assert ours <= 0.4 * eager
    angles = 2 * 128 * 32 * 4
    tokens, d, f = 2 * 128, size.hidden, size.intermediate
    assert ours == tokens * 2 * (2 * d + 3 * d + 2 * f) + tokens * 4 * 4 * 128 + angles
