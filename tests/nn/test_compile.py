"""SubspaceLinear under torch.compile: one graph, the values of eager mode, Z alone saved, no new graph with a
new P."""

import copy

import pytest
import torch
from nn.layers import Block, Saved, projection
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lowrank_kernels as lrk

TOKENS, RANK = 10, 4


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()


def gradients(module, y, x):
    return torch.autograd.grad(y.square().sum(), [x, *(p for p in module.parameters() if p.requires_grad)])


def check_equal(found, expected):
    """To the rounding of fp64: the compiler may sum in another order."""
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def build(share="auto"):
    torch.manual_seed(0)
    return lrk.to_subspace(Block(), rank=RANK, share=share), torch.randn(2, TOKENS // 2, 12, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("drawn", [False, True])
def test_one_graph_for_all_outer_steps(compiler, drawn):
    model, x = build()
    if drawn:
        model(x)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for outer_step in range(3):
        for layer in model.children():
            layer.subspace.move_to(outer_step)
        twin = copy.deepcopy(model)
        for _ in range(2):
            check_equal(gradients(model, compiled(x), x), gradients(twin, twin(x), x))
    assert compiler.frame_count == 1


def test_the_step_in_between(compiler):
    model, x = build()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for each, forward in ((model, compiled), (twin, twin)):
        optimizer = lrk.RSOAdamW(each.parameters(), lr=1e-2, inner_steps=2)
        for _ in range(6):
            forward(x.detach()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert compiler.frame_count == 1


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, out, dtype=torch.float64) for out in (12, 6, 9))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize("share, zs", [("auto", 1), (None, 3)])
def test_what_is_saved(compiler, share, zs):
    """The compiler sees that products of one x and one P are equal, and saves one."""
    model = lrk.to_subspace(Three(), rank=RANK, share=share)
    x = torch.randn(TOKENS, 12, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    with Saved(model) as saved:
        outputs = compiled(x)
    dys = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, dys)
    for layer, dy in zip(model.children(), dys, strict=True):
        assert torch.allclose(layer.coordinates.grad, (x.detach() @ projection(layer)).mT @ dy)
    assert saved.bytes == zs * TOKENS * RANK * 8


def test_other_dtypes_and_modes(compiler):
    model, x = build()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    expected = model(x)
    check_equal([compiled(x)], [expected])
    with torch.no_grad():
        check_equal([compiled(x)], [expected])
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x.float()), model(x.float())
    assert (found - expected).norm() <= 2**-6 * expected.norm()
    model.double()
    for layer in model.children():
        layer.subspace.move_to(1)
    twin = copy.deepcopy(model)
    check_equal(gradients(model, compiled(x), x), gradients(twin, twin(x), x))


@pytest.mark.parametrize("tokens", [(), (3,), (2, 3)])
def test_the_output_may_be_changed_in_place(compiler, tokens):
    layer = lrk.SubspaceLinear(12, 6, dtype=torch.float64, rank=RANK)
    x = torch.randn(1, 12, dtype=torch.float64).expand(*tokens, 12) if tokens else torch.randn(12, dtype=torch.float64)
    x = x.requires_grad_()

    def forward(x):
        y = layer(x)
        y += 1
        return y.relu_()

    expected = gradients(layer, forward(x), x)
    check_equal(gradients(layer, torch.compile(forward, fullgraph=True, backend=compiler)(x), x), expected)


def test_a_model_that_was_compiled_before(compiler):
    torch.manual_seed(0)
    model, x = Block(), torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    expected = compiled(x)
    lrk.to_subspace(compiled, rank=RANK)
    twin = copy.deepcopy(model)
    check_equal([compiled(x)], [expected])
    check_equal(gradients(model, compiled(x), x), gradients(twin, twin(x), x))
    lrk.to_dense(compiled)
    compiled(x).sum().backward()
    assert model.q_proj.weight.grad is not None
