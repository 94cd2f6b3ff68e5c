"""SubspaceLinear where it trains: on a GPU where there is one, else on the CPU."""

import pytest
import torch
from nn.layers import Block, Saved, product_error, projection
from tolerances import assert_within
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lrk

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
RANK, TOKENS = 4, 70


@pytest.fixture(autouse=True)
def fp32_sums():
    """The bounds are those of sums in fp32, which cuBLAS may be allowed to cut short."""
    flags, matmul = (
        ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_tf32"),
        torch.backends.cuda.matmul,
    )
    before = [getattr(matmul, flag) for flag in flags]
    for flag in flags:
        setattr(matmul, flag, False)
    yield
    for flag, value in zip(flags, before, strict=True):
        setattr(matmul, flag, value)


def converted(dtype, **options):
    torch.manual_seed(0)
    return lrk.to_subspace(Block(dtype=dtype).to(DEVICE), rank=RANK, **options)


@DTYPES
@pytest.mark.parametrize("shape", [(TOKENS,), (2, 35), ()], ids=str)
def test_values_and_gradients(dtype, shape):
    layer = lrk.SubspaceLinear(130, 33, dtype=dtype, device=DEVICE, rank=17)
    x = torch.randn(*shape, 130, device=DEVICE).to(dtype).requires_grad_()
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    dy = torch.randn_like(y)
    y.backward(dy)
    rows, dy_rows, P = x.detach().double().reshape(-1, 130), dy.double().reshape(-1, 33), projection(layer).double()
    assert P.device.type == DEVICE
    of_z = product_error(rows, P, dtype)
    assert_within(layer.coordinates.grad, (rows @ P).mT @ dy_rows, product_error((rows @ P).mT, dy_rows, dtype, of_z.mT), "dB")
    exact = dy_rows @ layer.weight.double()
    assert_within(x.grad.reshape(exact.shape), exact, product_error(dy_rows, layer.weight.detach(), dtype), "dx")


@pytest.mark.parametrize("distribution", ["gaussian", "haar", "rademacher"])
def test_p_is_the_same_on_every_device(distribution):
    model = converted(torch.float32, distribution=distribution)
    there = projection(model.q_proj).cpu()
    model.cpu()
    assert_within(there, projection(model.q_proj), 2e-5 * torch.ones_like(there), "P")


@DTYPES
def test_layers_that_read_one_tensor_save_one_z(dtype):
    model = converted(dtype)
    layers, x = [model.q_proj, model.k_proj, model.v_proj], torch.randn(TOKENS, 12, device=DEVICE).to(dtype)
    with Saved(*layers) as saved:
        outputs = [layer(x) for layer in layers]
    assert saved.bytes == TOKENS * RANK * dtype.itemsize
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert all(layer.coordinates.grad.device == x.device for layer in layers)


def test_under_autocast_products_run_in_16_bits_and_gradients_have_the_parameters_dtype():
    layer = lrk.SubspaceLinear(64, 48, device=DEVICE, rank=RANK)
    x = torch.randn(TOKENS, 64, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16), Saved(layer) as saved:
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert TOKENS * RANK * 2 in [storage.nbytes() for storage in saved.storages.values()], "Z has 16 bits"
    y.sum().backward()
    assert layer.coordinates.grad.dtype == x.grad.dtype == torch.float32


@DTYPES
def test_activation_checkpointing_changes_no_gradient(dtype):
    model, x = converted(dtype), torch.randn(TOKENS, 12, device=DEVICE).to(dtype)
    model(x).float().square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).float().square().sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert expected


@DTYPES
def test_training_and_back_to_dense(dtype):
    """Two outer steps on one device: all layers move, and the dense model computes what the converted one
    did."""
    model, x = converted(dtype), torch.randn(TOKENS, 12, device=DEVICE).to(dtype)
    optimizer = lrk.RSOAdamW(model.parameters(), lr=1e-2, inner_steps=2)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    weights = [(p, b) for p, b in zip(model.parameters(), before, strict=True) if p.dim() == 2 and not p.requires_grad]
    assert len(weights) == 4 and all(not torch.equal(p, b) for p, b in weights)
    expected = model(x)
    lrk.to_dense(model)
    assert torch.equal(model(x), expected)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert states and all(state.device.type == DEVICE for state in states)
