"""RSOAdamW under a GradScaler: on a CPU, and by the way that a step takes on a GPU, which does not look at
found_inf."""

import copy

import pytest
import torch
from optim.models import batch, same_bits, train
from optim.rso_runs import DEVICE, build, converted, everything, matrix, random_gradients
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels import backends
from lowrank_kernels.optim import optimizer as base


@pytest.mark.gpu
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"proximal": 0.2}, {"inner": "sgd"}, {"dtype": torch.bfloat16}], ids=str)
def test_a_scaler_of_powers_of_two_changes_nothing(options, unscale_first):
    plain, scaled = (build(**options, device=DEVICE) for _ in range(2))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    for step in range(9):
        random_gradients(plain[0], step)
        plain[1].step()
        random_gradients(scaled[0], step, scale=1024.0)
        scaler.scale(torch.zeros((), device=DEVICE))  # which makes the scale
        if unscale_first:
            scaler.unscale_(scaled[1])
        scaler.step(scaled[1])
        scaler.update()
        for p, q in zip(plain[0].parameters(), scaled[0].parameters(), strict=True):
            assert p.grad is None or torch.equal(p.grad, q.grad), "left unscaled, as torch's fused AdamW does"
    assert same_bits(everything(*plain), everything(*scaled))


def test_any_scale_to_rounding_and_clipping_after_unscaling():
    plain, scaled = build(), build()
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    for step in range(9):
        for (model, optimizer), factor in ((plain, None), (scaled, scaler)):
            x, y = batch(step)
            loss = (model(x) - y).square().mean()
            (loss if factor is None else factor.scale(loss)).backward()
            if factor is not None:
                factor.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if factor is None:
                optimizer.step()
            else:
                factor.step(optimizer)
                factor.update()
            optimizer.zero_grad()
    for a, b in zip(plain[0].parameters(), scaled[0].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_16_bit_gradients_are_unscaled_in_fp32():
    layer = lrk.SubspaceLinear(8, 12, bias=False, rank=8, dtype=torch.float16)
    optimizer = lrk.RSOAdamW(layer.parameters(), lr=0.1, eps=1e-12)
    before = layer.weight.clone()
    layer.coordinates.grad = torch.full((8, 12), 2.0**-12, dtype=torch.float16)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)
    optimizer.step()
    expected = before.double() - 0.1 * matrix(layer).double().sum(1).expand(12, 8)
    assert torch.allclose(layer.weight.double(), expected, atol=2.0**-8), "2⁻²⁸ underflows in fp16"


def leave_garbage_where_skipped(monkeypatch):
    """N filled with NaN where found_inf is set: on a GPU it is what the memory held."""
    update = backends.update

    def garbage(bucket, hyper, projected):
        found = update(bucket, hyper, projected)
        return found if bucket.found_inf is None else found.masked_fill_(bucket.found_inf != 0, float("nan"))

    monkeypatch.setattr(backends, "update", garbage)


@pytest.mark.gpu
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
@pytest.mark.parametrize("options", [{}, {"proximal": 0.2}, {"inner": "sgd"}, {"dtype": torch.bfloat16}, {"inner_steps": 1}], ids=str)
@pytest.mark.parametrize("bad_steps", [(0,), (0, 1, 4), (3, 7)], ids=str)
def test_a_skipped_step_leaves_every_bit_and_counts_for_inner_steps(monkeypatch, bad_steps, options, as_on_a_gpu):
    device = DEVICE
    if as_on_a_gpu and device == "cpu":
        monkeypatch.setattr(base, "HOST", ())
        leave_garbage_where_skipped(monkeypatch)
    model, optimizer = build(device=device, **options)
    inner_steps, layers = optimizer.param_groups[0]["inner_steps"], converted(model)
    scaler = torch.amp.GradScaler(device, init_scale=64.0, growth_interval=10**6)
    for step in range(10):
        parameter = next(model.parameters())
        x, y = batch(step, parameter.dtype, device)
        scaler.scale((model(x) - y).square().mean()).backward()
        if step in bad_steps:
            model.down.coordinates.grad[0] = float("nan")
            model.up.bias.grad[0] = float("inf")
        weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        group = optimizer.param_groups[0]
        assert (group["outer_step"], group["inner_step"]) == divmod(step + 1, inner_steps)
        assert all(layer.subspace.outer_step == group["outer_step"] for layer in layers.values())
        assert all(layer.weight.isfinite().all() for layer in layers.values())
        if step in bad_steps:
            assert same_bits(weights, model.state_dict())
            after = optimizer.state_dict()["state"]
            for index, state in states.items():
                fresh = group["inner_step"] == 0 and "subspace" in state
                wanted = {
                    key: torch.zeros_like(value) if fresh and isinstance(value, torch.Tensor) else value for key, value in state.items()
                }
                assert same_bits(wanted, after[index])
    # Since the last border, the steps that were made.
    start = 10 - optimizer.param_groups[0]["inner_step"]
    assert optimizer.state[model.up.coordinates]["step"] == sum(step not in bad_steps for step in range(start, 10))


def test_the_way_of_a_gpu_gives_the_same_bits(monkeypatch):
    runs = []
    for host in (("cpu",), ()):
        monkeypatch.setattr(base, "HOST", host)
        model, optimizer = build(proximal=0.2, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        train(model, optimizer, 9, scaler=scaler)
        runs.append(everything(model, optimizer))
    assert same_bits(*runs)
