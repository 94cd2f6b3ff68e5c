"""state_bits=8 and rounding="stochastic" in an optimizer: layout, bytes, files, what they do to training."""

import copy

import pytest
import torch
from models import build, same_bits, through_a_file, train
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.storage import eight_bit

KEYS = {"refreshed_at", "step", "basis", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(40, 130), (130, 40), (64, 64), (3, 40, 70), (1, 7)])
def test_state_bytes_are_the_formula(shape, dtype):
    """2·r·(n + 4·⌈n/64⌉) and the basis; codes in one byte, scales in fp32, whatever the dtype of the
    weight."""
    parameter = nn.Parameter(torch.randn(shape).to(dtype))
    rank = min(5, *shape)
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": rank, "state_bits": 8}])
    parameter.grad = torch.randn(shape).to(dtype)
    optimizer.step()
    state = optimizer.state[parameter]
    batch, (m, n) = (shape[0] if len(shape) == 3 else 1), sorted(shape[-2:])
    assert set(state) == KEYS
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    assert state["exp_avg_scale"].dtype == state["exp_avg_sq_scale"].dtype == torch.float32
    tensors = [value for key, value in state.items() if isinstance(value, torch.Tensor) and key != "step"]
    expected = batch * (2 * rank * (n + 4 * -(-n // 64)) + m * rank * dtype.itemsize)
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == expected


@pytest.mark.parametrize("selection", ["importance", "dominant"])
def test_training_follows_32_bits(selection):
    """Over 200 steps, eight refreshes of a basis included."""
    ends = {}
    for bits in (32, 8):
        model, optimizer = build(state_bits=bits, selection=selection, update_proj_gap=25, rank=10)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        ends[bits] = sum(train(model, optimizer, 200, scheduler=scheduler)[-50:]) / 50
    assert ends[8] == pytest.approx(ends[32], rel=0.02)


@pytest.mark.parametrize("options", [{"state_bits": 8}, {"rounding": "stochastic", "dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("save_at", [1, 6, 8])
def test_resume_is_bit_identical(options, save_at):
    straight, optimizer = build(**options)
    losses = train(straight, optimizer, 13)
    stopped, optimizer_before = build(**options)
    train(stopped, optimizer_before, save_at)
    file = through_a_file({"model": stopped.state_dict(), "optimizer": optimizer_before.state_dict()})
    resumed, optimizer_after = build(**options)
    resumed.load_state_dict(file["model"])
    optimizer_after.load_state_dict(file["optimizer"])
    assert train(resumed, optimizer_after, 13 - save_at, start=save_at) == losses[save_at:]
    assert same_bits(straight.state_dict(), resumed.state_dict())
    assert same_bits(optimizer.state_dict(), optimizer_after.state_dict())


def test_bits_cannot_change_after_the_first_step():
    model, optimizer = build()
    train(model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.param_groups[1]["state_bits"] = 8
    with pytest.raises(ValueError, match="the state has 32-bit moments but state_bits=8.*cannot change after the first step"):
        train(model, optimizer, 1)
    optimizer.param_groups[1]["state_bits"] = 32
    assert same_bits(before, (model.state_dict(), optimizer.state_dict()))


def test_a_checkpoint_without_scales_is_refused():
    model, optimizer = build(state_bits=8)
    train(model, optimizer, 2)
    broken = copy.deepcopy(optimizer.state_dict())
    del broken["state"][broken["param_groups"][1]["params"][0]]["exp_avg_scale"]
    with pytest.raises(ValueError, match="the checkpoint's exp_avg_scale is missing"):
        optimizer.load_state_dict(broken)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_skipped_step_leaves_codes_and_scales(found_inf):
    model, optimizer = build(state_bits=8)
    train(model, optimizer, 2)
    state = optimizer.state[model.up.weight]
    before = copy.deepcopy({key: state[key] for key in KEYS})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()
    same = {key for key in KEYS if same_bits(before[key], state[key])}
    assert same == (KEYS if found_inf else {"basis", "refreshed_at"})


def test_a_gradient_that_is_not_finite_shows_in_the_moments():
    model, optimizer = build(state_bits=8)
    train(model, optimizer, 2)
    weight = model.layers[0].weight
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    weight.grad[3, 4] = float("nan")
    optimizer.step()
    state = optimizer.state[weight]
    exp_avg, _ = eight_bit.decode(*(state[key] for key in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")))
    assert exp_avg.isnan().any() and weight.isnan().any()


def small_steps(rounding, steps=400):
    """Weights of 1 with a step of 2⁻¹¹, an eighth of the distance between bf16 neighbours there (a quarter
    below 1)."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 64, "scale": 1.0, "rounding": rounding}], lr=2.0**-11)
    for _ in range(steps):
        parameter.grad = -torch.ones_like(parameter)  # of rank one, the same at every step: N is the sign of R
        optimizer.step()
    return parameter.detach().float() - 1, optimizer


def test_small_updates_survive_stochastic_rounding_only():
    """Each of the 4096 weights makes a random walk with the exact mean; the update itself is P·N, known from
    the state."""
    nearest, _ = small_steps("nearest")
    assert not nearest.any(), "smaller than half a unit in the last place: lost at every step"
    moved, optimizer = small_steps("stochastic")
    [state] = optimizer.state.values()
    exact = 400 * 2.0**-11 * (state["basis"].double() @ torch.sign(state["basis"].double().sum(0))[:, None]).float()
    # 4096 walks of 400 steps, each with a variance under ulp²/4.
    deviation = 2.0**-7 * 0.5 * (400 / moved.numel()) ** 0.5
    assert abs(moved.mean() - exact.mean()) < 6 * deviation + 0.02 * exact.mean().abs()


def test_stochastic_rounding_hangs_on_seed_and_place_alone():
    """Not on what shares a bucket with a matrix, nor on the step at which another one joined."""
    torch.manual_seed(0)
    start, grads = torch.randn(20, 30).bfloat16(), torch.randn(5, 20, 30).bfloat16()
    ends = []
    for others, seed in ((0, 0), (3, 0), (0, 1)):
        params = [nn.Parameter(start.clone()) for _ in range(1 + others)]
        optimizer = lrk.LowRankAdamW([{"params": params, "rank": 4, "rounding": "stochastic", "selection": "random", "seed": seed}])
        for grad in grads:
            for param in params:
                param.grad = grad.clone()
            optimizer.step()
        ends.append([param.detach() for param in params])
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[1][0], ends[1][1]) and not torch.equal(ends[0][0], ends[2][0])


def test_errors_help():
    half, single = nn.Parameter(torch.zeros(8, 8).half()), nn.Parameter(torch.zeros(8, 8))
    for parameter, dtype in ((half, "float16"), (single, "float32")):
        with pytest.raises(ValueError, match=f"rounding='stochastic' is for bfloat16 parameters, got torch.{dtype} .group 0, parameter 0"):
            lrk.LowRankAdamW([{"params": [parameter], "rank": 2, "rounding": "stochastic"}])
    with pytest.raises(ValueError, match="rounding must be one of 'nearest', 'stochastic', got 'stochastik'.*did you mean 'stochastic'"):
        lrk.LowRankAdamW([{"params": [single], "rank": 2, "rounding": "stochastik"}])
    for bits in (16, True, "8", None):
        with pytest.raises(ValueError, match="state_bits must be one of 32, 8, got"):
            lrk.LowRankAdamW([{"params": [single], "rank": 2, "state_bits": bits}])
    with pytest.raises(ValueError, match="state_bits is set but rank is not"):
        lrk.LowRankAdamW([{"params": [single], "state_bits": 8}])


@pytest.mark.parametrize("bits", [32, 8])
def test_a_checkpoint_of_other_moments_or_without_a_count_is_refused(bits):
    model, optimizer = build(state_bits=bits)
    train(model, optimizer, 2)
    before, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["state_bits"] = 40 - bits
    with pytest.raises(ValueError, match=f"moments are torch.* but its state_bits are {40 - bits}"):
        optimizer.load_state_dict(saved)
    saved = copy.deepcopy(before)
    del saved["state"][saved["param_groups"][1]["params"][0]]["step"]
    with pytest.raises(ValueError, match="the checkpoint's step is missing"):
        optimizer.load_state_dict(saved)
    assert same_bits(before, optimizer.state_dict())
