"""Living in a training loop: schedulers, closures, missing gradients, scalers, hooks, compiled models,
devices, failures."""

import copy
import warnings

import pytest
import torch
from models import batch, build, same_bits, train
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.optim import optimizer as base
from lowrank_kernels.optim import refreshes


def test_the_learning_rate_is_read_each_step():
    model, optimizer = build(weight_decay=0.5)
    train(model, optimizer, 2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2, start=2)
    assert same_bits(before, model.state_dict())


def test_tensor_lr_equals_float_lr():
    runs = [build(lr=lr) for lr in (0.0078125, torch.tensor(0.0078125))]
    assert train(*runs[0], 6) == train(*runs[1], 6)


def test_missing_gradients_and_a_step_count_of_its_own():
    model, optimizer = build()
    train(model, optimizer, 3)
    skipped, others = model.layers[1].weight, model.layers[0].weight
    before = copy.deepcopy(optimizer.state[skipped]), skipped.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    skipped.grad = None
    optimizer.step()
    assert same_bits(before[0], optimizer.state[skipped]) and torch.equal(before[1], skipped)
    assert optimizer.state[others]["step"] == 4
    train(model, optimizer, 5, start=4)
    assert optimizer.state[others]["step"] == 9 and optimizer.state[skipped]["step"] == 8
    optimizer.zero_grad(set_to_none=True)
    weights = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert same_bits(weights, model.state_dict())


def test_a_parameter_trains_the_same_alone_and_among_others():
    """Buckets are an implementation detail: what shares a launch with a matrix does not change its
    numbers."""
    torch.manual_seed(0)
    alone, first, second = (nn.Parameter(torch.ones(20, 30)) for _ in range(3))
    one = lrk.LowRankAdamW([{"params": [alone], "rank": 4, "update_proj_gap": 3}])
    two = lrk.LowRankAdamW([{"params": [first, second], "rank": 4, "update_proj_gap": 3}])
    for _ in range(7):
        alone.grad = torch.randn(20, 30)
        first.grad, second.grad = alone.grad.clone(), torch.randn(20, 30)
        one.step()
        two.step()
    assert torch.allclose(alone, first, atol=1e-5)


def test_frozen_parameters_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    model[0].requires_grad_(False)
    optimizer = lrk.LowRankAdamW(lrk.param_groups(model, rank=4))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    before = model[0].weight.clone()
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before) and len(optimizer.state) == 2
    frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    lrk.LowRankAdamW([{"params": [frozen], "rank": 2}]).step()


def test_tied_parameters_are_updated_once():
    torch.manual_seed(0)
    tied, single = nn.Parameter(torch.ones(10, 12)), nn.Parameter(torch.ones(10, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the duplicate
        twice = lrk.LowRankAdamW([{"params": [tied, tied], "rank": 3}])
    once = lrk.LowRankAdamW([{"params": [single], "rank": 3}])
    for _ in range(3):
        tied.grad = torch.randn(10, 12)
        single.grad = tied.grad.clone()
        twice.step()
        once.step()
    assert torch.equal(tied, single) and twice.state[tied]["step"] == 3

    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[1].weight = model[0].weight
    assert [len(group["params"]) for group in lrk.param_groups(model, rank=3)] == [2, 1]


def test_add_param_group_after_steps():
    model, optimizer = build()
    train(model, optimizer, 3)
    extra = nn.Parameter(torch.randn(12, 9))
    optimizer.add_param_group({"params": [extra], "rank": 3, "update_proj_gap": 2})
    state_before = copy.deepcopy(optimizer.state[model.layers[0].weight])
    extra.grad = torch.randn(12, 9)
    optimizer.step()
    assert optimizer.state[extra]["step"] == 1 and optimizer.state[extra]["basis"].shape == (9, 3)
    assert same_bits(state_before, optimizer.state[model.layers[0].weight])
    with pytest.raises(ValueError, match="rank must be a positive int, got 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4, 4))], "rank": 0})
    assert len(optimizer.param_groups) == 3
    reloaded = lrk.LowRankAdamW([*lrk.param_groups(model, rank=6, update_proj_gap=4), {"params": [extra], "rank": 3, "update_proj_gap": 2}])
    reloaded.load_state_dict(optimizer.state_dict())
    assert same_bits(reloaded.state_dict()["state"], optimizer.state_dict()["state"])


def test_named_parameters():
    model = nn.Linear(8, 6)
    optimizer = lrk.LowRankAdamW([{"params": [("layer.weight", model.weight)], "rank": 2}])
    assert optimizer.param_groups[0]["param_names"] == ["layer.weight"]
    with pytest.raises(ValueError, match=r"group 0, parameter 'layer.bias' of shape \(6,\)"):
        lrk.LowRankAdamW([{"params": [("layer.bias", model.bias)], "rank": 2}])


def test_grad_scaler_with_finite_gradients_changes_nothing():
    plain, scaled = build(), build()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert train(*plain, 7) == train(*scaled, 7, scaler=scaler)
    assert same_bits(plain[0].state_dict(), scaled[0].state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("bad_steps", [(0,), (0, 1, 4), (5, 6)])
def test_grad_scaler_skips_a_step_as_if_it_had_not_been(bad_steps, unscale_first):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, optimizer = build(device=device)
    scaler = torch.amp.GradScaler(device, init_scale=64.0, growth_interval=10**6)
    plain_model, plain_optimizer = build(device=device)
    good = 0
    for attempt in range(10):
        x, y = batch(good, device=device)
        scaler.scale((model(x) - y).square().mean()).backward()
        if attempt in bad_steps:
            model.down.bias.grad[0] = float("inf")
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if attempt in bad_steps:
            assert same_bits(before[0], model.state_dict())
            for index, state in before[1].items():
                assert same_bits(state, optimizer.state_dict()["state"][index])
        else:
            train(plain_model, plain_optimizer, 1, start=good)
            good += 1
    assert same_bits(plain_model.state_dict(), model.state_dict())
    assert optimizer.state[model.up.weight]["step"] == good


@pytest.mark.parametrize("first_in_order", [False, True])
def test_parameters_that_join_after_a_skipped_first_step(first_in_order):
    """A step that was skipped leaves no state, and is none for the schedule."""
    first, second = (nn.Parameter(torch.ones(8, 12)) for _ in range(2))
    params = [first, second] if first_in_order else [second, first]
    optimizer = lrk.LowRankAdamW([{"params": params, "rank": 2}])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    (scaler.scale(first.sum()) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not optimizer.state.get(first) and not optimizer.state.get(second) and optimizer.param_groups[0]["calls"] == 0
    first.grad, second.grad = torch.randn(8, 12), torch.randn(8, 12)
    optimizer.step()
    assert optimizer.state[first]["step"] == optimizer.state[second]["step"] == 1


def test_16_bit_gradients_are_unscaled_in_fp32_as_torch_does():
    ours, theirs = (nn.Parameter(torch.zeros(8, 12, dtype=torch.float16)) for _ in range(2))
    low_rank = lrk.LowRankAdamW([{"params": [ours], "rank": 8, "scale": 1.0}], lr=0.1, eps=1e-12)
    adamw = torch.optim.AdamW([theirs], lr=0.1, eps=1e-12, weight_decay=0.0, fused=True)
    for parameter, optimizer in ((ours, low_rank), (theirs, adamw)):
        parameter.grad = torch.full((8, 12), 2.0**-12, dtype=torch.float16)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)
        optimizer.step()
    assert theirs.abs().min() > 0.09 and ours.norm() > 0.09, "2⁻²⁸ underflows in fp16"
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(8, 12), (3, 8, 12), (8, 3, 2, 2)])
def test_a_failed_step_under_a_scaler_can_be_repeated(monkeypatch, dtype, shape):
    good, bad = nn.Parameter(torch.randn(shape).to(dtype)), nn.Parameter(torch.randn(9, 13).to(dtype))
    optimizer = lrk.LowRankAdamW([{"params": [good, bad], "rank": 2}])
    good.grad, bad.grad = torch.randn_like(good), torch.randn_like(bad)
    if len(shape) == 4:
        good.grad = good.grad.to(memory_format=torch.channels_last)
    before = good.grad.clone(), bad.grad.clone()
    step = base.backends.step

    def failing(bucket, hyper):
        if bucket.weights[0] is bad:
            raise RuntimeError("no")
        step(bucket, hyper)

    monkeypatch.setattr(base.backends, "step", failing)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert torch.equal(bad.grad, before[1]) and torch.equal(good.grad, before[0] / 4)
    assert optimizer.state[good]["step"] == 1 and optimizer.state[bad]["step"] == 0


def test_complex_dense_parameters_under_a_scaler():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    plain = nn.Parameter(parameter.detach().clone())
    optimizer, adamw = lrk.LowRankAdamW([parameter], lr=0.1), lrk.LowRankAdamW([plain], lr=0.1)
    for found_inf in (0.0, 1.0, 0.0):
        grad = torch.randn(3, dtype=torch.complex64)
        parameter.grad = grad * 8
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
        optimizer.step()
        if not found_inf:
            plain.grad = grad.clone()
            adamw.step()
        assert torch.allclose(parameter, plain)


def test_grad_scaler_leaves_unscaled_gradients_as_torch_does():
    model, optimizer = build()
    theirs = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in model.parameters()], fused=True)
    for parameter, other in zip(model.parameters(), theirs.param_groups[0]["params"], strict=True):
        parameter.grad = torch.randn_like(parameter) * 8
        other.grad = parameter.grad.clone()
    for each in (optimizer, theirs):
        each.grad_scale, each.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        each.step()
    for parameter, other in zip(model.parameters(), theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_gradients_that_are_not_finite_without_a_scaler_keep_the_basis():
    model, optimizer = build(update_proj_gap=1)
    train(model, optimizer, 2)
    weight = model.layers[0].weight
    basis = optimizer.state[weight]["basis"].clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    weight.grad[3, 4] = float("nan")
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["basis"], basis)
    assert optimizer.state[weight]["exp_avg"].isnan().any(), "as in torch's AdamW, the moments take the NaN"
    assert optimizer.state[model.layers[1].weight]["exp_avg"].isfinite().all()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_model(backend):
    model, optimizer = build()
    compiled = torch.compile(model, backend=backend)
    losses = train(compiled, optimizer, 6)
    assert losses[0] == pytest.approx(train(*build(), 1)[0], rel=1e-5)
    groups = lrk.param_groups(compiled, rank=6, target_modules="layers.*")
    assert len(groups[1]["params"]) == 3, "the wrapper's prefix is not part of a name"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
@pytest.mark.parametrize("keys", [{"selection": "random", "update_proj_gap": 2}, {"selection": "dominant", "update_proj_gap": 10}], ids=str)
def test_groups_on_several_devices(keys):
    """Singular vectors have free signs, which moments carried over a refresh see: the dominant ones are
    chosen once only."""
    torch.manual_seed(0)
    here, there = nn.Parameter(torch.ones(20, 30)), nn.Parameter(torch.ones(20, 30, device="cuda"))
    dense_here, dense_there = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5, device="cuda"))
    optimizer = lrk.LowRankAdamW([{"params": [here, there], "rank": 4, **keys}, {"params": [dense_here, dense_there]}], lr=0.1)
    for _ in range(5):
        for a, b in ((here, there), (dense_here, dense_there)):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.to("cuda")
        optimizer.step()
    assert torch.allclose(here, there.cpu(), atol=1e-3) and torch.allclose(dense_here, dense_there.cpu())
    assert optimizer.state[there]["basis"].is_cuda and not optimizer.state[here]["basis"].is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be synchronised with")
def test_a_step_between_refreshes_does_not_synchronise():
    model, optimizer = build(device="cuda", update_proj_gap=1000)
    train(model, optimizer, 3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_failed_step_leaves_the_failing_bucket_and_those_after_it(monkeypatch):
    model, optimizer = build()
    train(model, optimizer, 4)  # the next step refreshes
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    calls = []

    def failing(bucket, hyper):
        calls.append(tuple(bucket.weights[0].shape))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return step(bucket, hyper)

    step = base.backends.step
    monkeypatch.setattr(base.backends, "step", failing)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert calls == [(40, 12), (40, 40)]
    unchanged = [f"layers.{i}.weight" for i in range(3)] + ["down.weight"]
    parameters = dict(model.named_parameters())
    for name in unchanged:
        assert torch.equal(parameters[name], before[0][name])
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for name in unchanged:
        number = index[id(parameters[name])]
        now, then = optimizer.state_dict()["state"][number], before[1]["state"][number]
        assert all(same_bits(now[key], then[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    monkeypatch.setattr(base.backends, "step", step)
    optimizer.step()


def test_a_refresh_that_runs_out_of_memory_moves_nothing(monkeypatch):
    model, optimizer = build()
    train(model, optimizer, 4)  # the next step refreshes
    before = copy.deepcopy((model.up.weight, optimizer.state[model.up.weight]))
    monkeypatch.setattr(refreshes.ops, "choose_bases", lambda *a, **k: (_ for _ in ()).throw(MemoryError("no")))
    with pytest.raises(MemoryError):
        train(model, optimizer, 1, start=4)
    assert torch.equal(before[0], model.up.weight) and same_bits(before[1], optimizer.state[model.up.weight])


def test_a_first_step_that_failed_can_be_taken_again(monkeypatch):
    (model, optimizer), twin = build(), build()
    grads = [torch.randn_like(parameter) for parameter in model.parameters()]
    for each in (model, twin[0]):
        for parameter, grad in zip(each.parameters(), grads, strict=True):
            parameter.grad = grad.clone()
    with monkeypatch.context() as patch:
        patch.setattr(base.backends, "step", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no")))
        with pytest.raises(RuntimeError, match="no"):
            optimizer.step()
    low_rank = optimizer.param_groups[1]["params"]
    assert all(optimizer.state.get(parameter, {}).get("step", 0) == 0 for parameter in low_rank)
    optimizer.step()
    twin[1].step()
    for parameter, other in zip(low_rank, twin[1].param_groups[1]["params"], strict=True):
        assert torch.equal(parameter, other) and same_bits(optimizer.state[parameter], twin[1].state[other])


def test_bad_gradients_are_refused_before_anything_moves():
    dense, low_rank, table = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(8, 9)), nn.Parameter(torch.randn(8, 9))
    optimizer = lrk.LowRankAdamW([{"params": [dense]}, {"params": [low_rank, table], "rank": 2}])
    dense.grad, low_rank.grad = torch.randn(5), torch.randn(8, 9)
    before = [p.detach().clone() for p in (dense, low_rank, table)]
    table.grad = torch.randn(8, 9).to_sparse()
    with pytest.raises(TypeError, match=r"the gradient is sparse .* in group 1, parameter 1 of shape \(8, 9\); make it dense"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip((dense, low_rank, table), before, strict=True)) and not optimizer.state
    sparse_dense = lrk.LowRankAdamW([table])
    with pytest.raises(TypeError, match="the gradient is sparse .* in group 0"):
        sparse_dense.step()
