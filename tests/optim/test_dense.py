"""Dense parameters whose weight, gradient and moments do not lie alike in memory, against torch.optim.AdamW
in its plain form."""

import copy

import pytest
import torch
from torch import nn

import lowrank_kernels as lrk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def contiguous(shape):
    return torch.randn(shape, device=DEVICE)


def transposed(shape):
    return torch.randn(shape[::-1], device=DEVICE).permute(*reversed(range(len(shape))))


def with_gaps(shape):
    return torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE)[..., : shape[-1]]


def every_second(shape):
    return torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE)[..., ::2]


def shifted_axes(shape):
    return torch.randn(*shape[1:], shape[0], device=DEVICE).movedim(-1, 0)


LAYOUTS = [contiguous, transposed, with_gaps, every_second, shifted_axes]


def adamw_only(params, **options):
    return lrk.LowRankAdamW([params] if isinstance(params, nn.Parameter) else params, **options)


def rso(params, **options):
    """RSOAdamW must have a converted layer; it is the other parameters that are looked at."""
    model = nn.ModuleDict({"layer": nn.Linear(4, 4, bias=False)})
    lrk.to_subspace(model, rank=2, target_modules=["layer"])
    optimizer = lrk.RSOAdamW([*([params] if isinstance(params, nn.Parameter) else params), *model.parameters()], **options)
    optimizer.model = model  # which would be gone else, and its layer with it
    return optimizer


OPTIMIZERS = [adamw_only, rso]
HYPER = dict(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)


def reference_step(weights, states, grads):
    """AdamW in fp64, by element."""
    (beta1, beta2), lr, eps, wd = HYPER["betas"], HYPER["lr"], HYPER["eps"], HYPER["weight_decay"]
    for weight, state, grad in zip(weights, states, grads, strict=True):
        grad = grad.double()
        state["t"] = t = state.get("t", 0) + 1
        state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * grad
        state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * grad**2
        weight.mul_(1 - lr * wd)
        weight.sub_(lr * (state["m"] / (1 - beta1**t)) / ((state["v"] / (1 - beta2**t)).sqrt() + eps))


@pytest.mark.gpu
@pytest.mark.parametrize("build", OPTIMIZERS)
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 3), (4, 1, 3, 2)], ids=str)
def test_weights_and_gradients_are_paired_by_element(build, of_weight, of_grad, shape):
    torch.manual_seed(0)
    parameter, neighbour = nn.Parameter(of_weight(shape)), nn.Parameter(torch.randn(shape, device=DEVICE))
    optimizer = build([parameter, neighbour], **HYPER)
    expected, states = [parameter.detach().double().clone(), neighbour.detach().double().clone()], [{}, {}]
    for step in range(4):
        grads = [(of_grad if step % 2 else contiguous)(shape) for _ in range(2)]
        parameter.grad, neighbour.grad = (grad.detach() for grad in grads)
        optimizer.step()
        reference_step(expected, states, grads)
    assert (parameter - expected[0]).abs().max() < 1e-6 and (neighbour - expected[1]).abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("build", OPTIMIZERS)
def test_a_weight_that_is_a_part_of_a_tensor_leaves_the_rest_alone(build):
    base = torch.randn(6, 5, device=DEVICE)
    before = base.clone()
    parameter = nn.Parameter(base[:, :3])
    optimizer = build(parameter, lr=0.1)
    for _ in range(3):
        parameter.grad = torch.randn(6, 3, device=DEVICE)
        optimizer.step()
    assert torch.equal(base[:, 3:], before[:, 3:]) and not torch.equal(base[:, :3], before[:, :3])


def test_what_lies_alike_takes_the_fused_kernel(monkeypatch):
    calls = []
    original = lrk.optim.dense.adamw
    monkeypatch.setattr(
        lrk.optim.dense, "adamw", lambda params, *args, **options: calls.append(options["fused"]) or original(params, *args, **options)
    )
    weights = [
        nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(3, 5).mT),
        nn.Parameter(torch.randn(1, 7)),
    ]
    optimizer = lrk.LowRankAdamW(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    weights[2].grad = torch.randn(7, 2)[:, :1].mT.contiguous().as_strided((1, 7), (3, 1))  # a stride that no element takes
    optimizer.step()
    assert calls == [True]


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_resumed_into_another_memory_format(build):
    """A convolution's checkpoint of a contiguous model, loaded into one in channels_last, continues as if
    nothing had happened."""

    def run(formats):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 5, 3)
        state, saved = conv.state_dict(), None
        for part, memory_format in enumerate(formats):
            conv = nn.Conv2d(3, 5, 3).to(memory_format=memory_format)
            conv.load_state_dict(state)
            optimizer = build(list(conv.parameters()), lr=1e-2)
            if saved is not None:
                optimizer.load_state_dict(saved)
                assert optimizer.state[conv.weight]["exp_avg"].stride() == conv.weight.stride()
            for step in range(5):
                x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(10 * part + step))
                optimizer.zero_grad()
                conv(x.to(memory_format=memory_format)).square().mean().backward()
                optimizer.step()
            state, saved = copy.deepcopy(conv.state_dict()), copy.deepcopy(optimizer.state_dict())
        return conv.weight.detach()

    same = run([torch.contiguous_format, torch.contiguous_format])
    assert (run([torch.contiguous_format, torch.channels_last]) - same).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_scaler_skips_what_has_no_fused_kernel(found_inf):
    torch.manual_seed(0)
    parameter = nn.Parameter(with_gaps((4, 3)))
    other = nn.Parameter(parameter.detach().clone())
    scaled, plain = lrk.LowRankAdamW([parameter], lr=0.1), lrk.LowRankAdamW([other], lr=0.1)
    for skipped in (0.0, found_inf, 0.0):
        grad = torch.randn(4, 3, device=DEVICE)
        parameter.grad = grad * 8
        scaled.grad_scale, scaled.found_inf = torch.tensor(8.0, device=DEVICE), torch.tensor(skipped, device=DEVICE)
        scaled.step()
        if not skipped:
            other.grad = grad
            plain.step()
    assert torch.allclose(parameter, other, atol=1e-6)
    assert scaled.state[parameter]["step"] == plain.state[other]["step"] == 3 - found_inf


@pytest.mark.parametrize("build", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moments_follow_a_model_that_is_cast(build, dtype):
    parameter = nn.Parameter(torch.randn(6, 3))
    optimizer = build(parameter, lr=1e-2)
    for cast in (torch.float32, dtype, torch.float32):
        parameter.data = parameter.data.to(cast)
        parameter.grad = torch.randn(6, 3).to(cast)
        optimizer.step()
        assert optimizer.state[parameter]["exp_avg"].dtype == cast
    assert optimizer.state[parameter]["step"] == 3 and parameter.isfinite().all()
