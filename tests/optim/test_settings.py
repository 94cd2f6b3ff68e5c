"""What is set is either obeyed or refused: keys of every kind of group, arguments of constructors, groups
that are not what they seem."""

import warnings

import pytest
import torch
from models import Net, build, train
from torch import nn

import lowrank_kernels as lrk


def groups_of(kind):
    torch.manual_seed(0)
    if kind == "dense":
        return lrk.LowRankAdamW, {"params": [nn.Parameter(torch.randn(5))]}
    if kind == "low-rank":
        return lrk.LowRankAdamW, {"params": [nn.Parameter(torch.randn(5, 6))], "rank": 2}
    model = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    lrk.to_subspace(model, rank=2)
    return lrk.RSOAdamW, {"params": list(model.parameters()), "model": model}


every_kind = pytest.mark.parametrize("kind", ["dense", "low-rank", "rso"])


@every_kind
@pytest.mark.parametrize(
    "key, value",
    [
        ("maximize", True),
        ("amsgrad", True),
        ("differentiable", True),
        ("foreach", False),
        ("fused", True),
        ("decoupled_weight_decay", False),
    ],
)
def test_what_torchs_adamw_knows_and_is_not_supported(kind, key, value):
    optimizer, group = groups_of(kind)
    with pytest.raises(ValueError, match=rf"{key}={value} is not supported \(group 0\)"):
        optimizer([group | {key: value}])
    built = optimizer([group])
    saved = built.state_dict()
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=rf"{key}={value} is not supported"):
        built.load_state_dict(saved)


@every_kind
def test_torchs_defaults_of_what_is_not_supported_pass(kind):
    optimizer, group = groups_of(kind)
    defaults = dict(maximize=False, amsgrad=False, differentiable=False, foreach=None, fused=None)
    optimizer([group | defaults])
    optimizer([group], **defaults)


@every_kind
@pytest.mark.parametrize("key", ["use_muon", "lr_mult", "lr_scale", "group_name", "layer_id", "initial_lr", 7])
def test_foreign_keys_pass_and_are_kept(kind, key):
    optimizer, group = groups_of(kind)
    built = optimizer([group | {key: 3}])
    assert built.param_groups[0][key] == built.state_dict()["param_groups"][0][key] == 3


@every_kind
@pytest.mark.parametrize("key, meant", [("weight_deca", "weight_decay"), ("maximise", "maximize"), ("beta", "betas")])
def test_near_misses_of_adamws_keys(kind, key, meant):
    optimizer, group = groups_of(kind)
    with pytest.raises(ValueError, match=rf"unknown key '{key}' in a group \(group 0\); did you mean '{meant}'"):
        optimizer([group | {key: 1}])


@pytest.mark.parametrize(
    "kind, key, meant",
    [
        ("dense", "update_gap", "update_proj_gap"),
        ("low-rank", "update_gap", "update_proj_gap"),
        ("dense", "ranks", "rank"),
        ("rso", "inner_step_", "inner_step"),
        ("rso", "proximl", "proximal"),
    ],
)
def test_near_misses_of_own_keys(kind, key, meant):
    optimizer, group = groups_of(kind)
    with pytest.raises(ValueError, match=rf"unknown key '{key}' .* did you mean '{meant}"):
        optimizer([group | {key: 1}])


@every_kind
def test_names_that_are_not_as_many_as_parameters(kind):
    optimizer, group = groups_of(kind)
    with pytest.raises(ValueError, match=r"has \d parameters and 7 param_names"):
        optimizer([group | {"param_names": list("abcdefg")}])


@pytest.mark.parametrize("optimizer", [lrk.GaLoreAdamW, lrk.I3SAdamW])
def test_a_method_without_a_low_rank_group_warns(optimizer):
    with pytest.warns(UserWarning, match=rf"{optimizer.__name__} has no group with rank .*param_groups") as caught:
        optimizer(nn.Linear(4, 4).parameters())
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer(lrk.param_groups(nn.Linear(4, 4), rank=2))
        lrk.LowRankAdamW(nn.Linear(4, 4).parameters())


@pytest.mark.parametrize(
    "optimizer, options, message",
    [
        (lrk.GaLoreAdamW, dict(rank=16), r"GaLoreAdamW\(\) takes no 'rank', which belongs to a group: GaLoreAdamW\(.*param_groups\("),
        (lrk.I3SAdamW, dict(update_proj_gap=16), "takes no 'update_proj_gap', which belongs to a group"),
        (lrk.LowRankAdamW, dict(amsgrad=True), r"LowRankAdamW\(\) does not support amsgrad=True"),
        (lrk.LowRankAdamW, dict(weight_deca=0.1), "unexpected keyword argument 'weight_deca'; did you mean 'weight_decay'"),
        (lrk.LowRankAdamW, dict(zzz=1), "unexpected keyword argument 'zzz'$"),
        (lrk.RSOAdamW, dict(rank=16), r"RSOAdamW\(\) takes no 'rank', which belongs to .*to_subspace"),
        (lrk.RSOAdamW, dict(fused=True), "does not support fused=True"),
    ],
)  # fmt: skip
def test_arguments_that_a_constructor_does_not_have(optimizer, options, message):
    with pytest.raises(TypeError, match=message):
        optimizer(nn.Linear(4, 4).parameters(), **options)


def test_param_groups_takes_the_model():
    with pytest.raises(TypeError, match="model must be an nn.Module, got generator; pass the model itself"):
        lrk.param_groups(Net().parameters(), rank=4)
    with pytest.raises(TypeError, match="pass the model itself"):
        lrk.to_subspace(list(Net().parameters()), rank=4)


@pytest.mark.parametrize("change", [dict(rank=3), dict(update_proj_gap=9), dict(scale=0.5), dict(seed=4)])
def test_a_checkpoint_of_other_settings_says_so(change):
    model, optimizer = build()
    train(model, optimizer, 2)
    _, other = build(**change)
    ((key, value),) = change.items()
    with pytest.warns(UserWarning, match=rf"{key} {value} becomes {optimizer.param_groups[1][key]} \(group 1\)"):
        other.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(optimizer.state_dict())


def test_a_checkpoint_of_other_inner_steps_says_so():
    optimizer, group = groups_of("rso")
    saved = optimizer([dict(group)], inner_steps=5).state_dict()
    other = optimizer([dict(group)], inner_steps=7)
    with pytest.warns(UserWarning, match=r"inner_steps 7 becomes 5 \(group 0\)"):
        other.load_state_dict(saved)


def test_a_checkpoint_whose_settings_the_parameters_cannot_follow():
    def optimizer(dtype, **keys):
        return lrk.LowRankAdamW([{"params": [nn.Parameter(torch.randn(6, 8).to(dtype))], "rank": 2, **keys}])

    saved = optimizer(torch.bfloat16, rounding="stochastic").state_dict()
    with pytest.raises(ValueError, match="rounding='stochastic' is for bfloat16 parameters, got torch.float32"):
        optimizer(torch.float32).load_state_dict(saved)


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("dense step", 3, "checkpoint's step must be a tensor, got 3"),
        ("dense step", torch.tensor(-1.0), "checkpoint's step must be a whole number ≥ 0"),
        ("dense step", torch.tensor(2.5), "whole number ≥ 0"),
        ("dense step", torch.tensor(float("inf")), "whole number ≥ 0"),
        ("low-rank step", float("inf"), "whole number ≥ 0, got inf"),
        ("dense exp_avg", "zeros", "checkpoint's exp_avg must be a tensor, got 'zeros'"),
        ("dense exp_avg_sq", torch.zeros(3), r"checkpoint's exp_avg_sq is \(3,\), expected \(40,\)"),
        ("low-rank step", -1, "checkpoint's step must be a whole number ≥ 0, got -1"),
        ("low-rank step", "3", "whole number ≥ 0, got '3'"),
        ("low-rank step", float("nan"), "whole number ≥ 0, got nan"),
        ("low-rank exp_avg", "zeros", "checkpoint's exp_avg must be a tensor, got 'zeros'"),
        ("low-rank basis", [1.0], r"checkpoint's basis must be a tensor, got \[1.0\]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["galore", "rso"])
def test_a_damaged_checkpoint(method, place, value, message):
    if method == "galore":
        model, optimizer = build()
    else:
        model = lrk.to_subspace(Net(), rank=3)
        optimizer = lrk.RSOAdamW(model.parameters())
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    kind, key = place.split()
    low_rank = "basis" if method == "galore" else "subspace"
    if key == "basis" and method == "rso":
        pytest.skip("it has none")
    wanted = (40,) if kind == "dense" else None
    state = next(
        s for s in saved["state"].values() if (low_rank in s) == (kind == "low-rank") and wanted in (None, tuple(s["exp_avg"].shape))
    )
    state[key] = value
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_checkpoint_of_galore_torch_is_called_what_it_is():
    class Projector:
        rank = 2

    parameter = nn.Parameter(torch.randn(6, 8))
    optimizer = lrk.GaLoreAdamW([{"params": [parameter], "rank": 2}])
    saved = optimizer.state_dict()
    for key in set(saved["param_groups"][0]) - {
        "params",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "rank",
        "update_proj_gap",
        "scale",
        "proj_type",
    }:
        del saved["param_groups"][0][key]
    saved["state"] = {0: {"step": 3, "projector": Projector(), "exp_avg": torch.zeros(2, 8), "exp_avg_sq": torch.zeros(2, 8)}}
    with pytest.raises(ValueError, match="the checkpoint is one of galore-torch"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_low_rank_states_follow_a_model_that_is_cast(dtype, state_bits):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(3, 6, 8))]
    optimizer = lrk.LowRankAdamW([{"params": params, "rank": 2, "state_bits": state_bits, "update_proj_gap": 3}], lr=0.1)
    for cast in (torch.float32, torch.float32, dtype, dtype, torch.float32):
        for param in params:
            param.data = param.data.to(cast)
            param.grad = torch.randn(param.shape).to(cast)
        before = [param.detach().clone() for param in params]
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            state, wide = optimizer.state[param], torch.promote_types(cast, torch.float32)
            assert state["basis"].dtype == cast and state["exp_avg"].dtype == (torch.uint8 if state_bits == 8 else wide)
            assert not torch.equal(param, old) and param.isfinite().all()
    assert optimizer.state[params[0]]["step"] == 5


def test_stochastic_rounding_of_a_model_that_is_cast_is_refused():
    parameter = nn.Parameter(torch.randn(6, 8).bfloat16())
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 2, "rounding": "stochastic"}])
    for cast in (torch.bfloat16, torch.float32):
        parameter.data = parameter.data.to(cast)
        parameter.grad = torch.randn(6, 8).to(cast)
        if cast == torch.bfloat16:
            optimizer.step()
    before = parameter.detach().clone()
    with pytest.raises(ValueError, match="rounding='stochastic' is for bfloat16"):
        optimizer.step()
    assert torch.equal(parameter, before)
