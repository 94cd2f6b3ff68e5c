"""RSOAdamW: what a checkpoint holds, resuming to the bit, copies, and checkpoints that do not fit."""

import copy
import itertools
import math
import pickle
import re

import pytest
import torch
from matrix import representative
from optim.models import Net, batch, same_bits, through_a_file, train
from optim.rso_runs import DEVICE, Shared, build, converted, matrix, random_gradients
from torch import nn

import lowrank_kernels as lrk


def checkpoint(model, optimizer):
    return through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


OPTIONS = [
    {},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64, "distribution": "haar"},
    {"proximal": 0.3, "weight_decay": 0.1},
    {"inner": "sgd", "distribution": "rademacher"},
    {"inner": "sgd", "proximal": 0.3, "dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "rounding": "stochastic"},
    {"net": Shared},
    {"net": Shared, "share": None, "lr": torch.tensor(0.01)},
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "save_at"),
    representative(  # in the first subspace, before and at its end, within a later one, at its end
        itertools.product(OPTIONS, [1, 3, 4, 6, 8]), keep=lambda options, save_at: save_at == 6 or options in (OPTIONS[0], OPTIONS[5])
    ),
    ids=str,
)
def test_resume_is_bit_identical(options, save_at):
    straight, optimizer = build(**options, device=DEVICE)
    losses = train(straight, optimizer, 11)
    stopped, optimizer_before = build(**options, device=DEVICE)
    train(stopped, optimizer_before, save_at)
    file = checkpoint(stopped, optimizer_before)

    resumed, optimizer_after = build(**options, device=DEVICE)
    resumed.load_state_dict(file["model"])
    optimizer_after.load_state_dict(file["optimizer"])
    assert same_bits(optimizer_before.state_dict(), optimizer_after.state_dict())
    assert train(resumed, optimizer_after, 11 - save_at, start=save_at) == losses[save_at:]
    assert same_bits(straight.state_dict(), resumed.state_dict())
    assert same_bits(optimizer.state_dict(), optimizer_after.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("net", [Net, Shared])
def test_copies_go_on_by_themselves(duplicate, optimizer_first, net):
    model, optimizer = build(net=net, proximal=0.1)
    train(model, optimizer, 6)
    if optimizer_first:
        other_optimizer, other = duplicate((optimizer, model))
    else:
        other, other_optimizer = duplicate((model, optimizer))
    expected = train(model, optimizer, 6, start=6)
    assert all(layer.subspace.outer_step == 1 for layer in converted(other).values()), "the original's steps move none of the copy's"
    assert train(other, other_optimizer, 6, start=6) == expected
    assert same_bits(model.state_dict(), other.state_dict())
    assert same_bits(optimizer.state_dict(), other_optimizer.state_dict())


# What is in it.


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_state_is_two_fp32_matrices_of_r_times_out_and_no_p(options):
    model, optimizer = build(**{**options, "rank": 5}, device=DEVICE)
    train(model, optimizer, 6)
    keys = {"momentum_buffer"} if options.get("inner") == "sgd" else {"exp_avg", "exp_avg_sq"}
    keys |= {"displacement"} if options.get("proximal") else set()
    for layer in converted(model).values():
        state = optimizer.state[layer.coordinates]
        assert state.keys() == keys | {"step", "subspace"}
        assert type(state["subspace"]) is int and state["step"].shape == () and state["step"].dtype == torch.float32
        size = 8 if layer.weight.dtype == torch.float64 else 4
        assert sum(state[key].untyped_storage().nbytes() for key in keys) == len(keys) * 5 * layer.out_features * size
        assert all(state[key].shape == (5, layer.out_features) and state[key].device == layer.weight.device for key in keys)
    saved = optimizer.state_dict()
    flat = [value for state in saved["state"].values() for value in state.values()]
    assert all(isinstance(value, (torch.Tensor, int, float)) for value in flat)
    assert same_bits(saved, through_a_file(saved))
    shapes = {tuple(value.shape) for value in [*flat, *model.state_dict().values()] if isinstance(value, torch.Tensor)}
    assert not shapes & {(layer.in_features, 5) for layer in converted(model).values()}
    assert {key for group in saved["param_groups"] for key in group} >= {"outer_step", "inner_step", "inner_steps", "proximal", "inner"}


def test_the_model_of_a_checkpoint_is_that_of_an_unconverted_one():
    model, optimizer = build()
    train(model, optimizer, 6)
    file = checkpoint(model, optimizer)
    dense = Net()
    dense.load_state_dict(file["model"])
    assert torch.equal(dense(batch(0)[0]), model(batch(0)[0]))


def test_loading_shares_no_memory_with_the_dict():
    model, optimizer = build(proximal=0.1)
    train(model, optimizer, 6)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = [0.9, 0.999]  # as from a file of another format
    other_model, other = build(proximal=0.1)
    other.load_state_dict(saved)
    assert isinstance(saved["param_groups"][0]["betas"], list)
    memory = {value.data_ptr() for state in saved["state"].values() for value in state.values() if isinstance(value, torch.Tensor)}
    for state in other.state.values():
        assert not memory & {value.data_ptr() for value in state.values() if isinstance(value, torch.Tensor)}
    before = copy.deepcopy(saved)
    train(other_model, other, 3, start=6)
    assert same_bits(before, saved)


def test_load_hooks_see_and_replace_the_dict():
    model, optimizer = build()
    train(model, optimizer, 6)
    other_model, other = build()
    seen = []

    def replace(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.125
        return state_dict

    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_post_hook(
        lambda loaded: seen.append([layer.subspace.outer_step for layer in converted(other_model).values()])
    )
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.125 and seen == [[1] * 5]
    assert len(other._optimizer_load_state_dict_pre_hooks) == len(other._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("to", [2, 0])
def test_loading_moves_the_ps_before_the_next_forward_pass(to):
    """Also back, and also those that have been drawn already and lie in memory."""
    saved = build(net=Shared)
    train(*saved, 4 * to)
    model, optimizer = build(net=Shared)
    train(model, optimizer, 5)
    addresses = {name: matrix(layer).data_ptr() for name, layer in converted(model).items()}
    optimizer.load_state_dict(saved[1].state_dict())
    for name, layer in converted(model).items():
        assert layer.subspace.outer_step == to and matrix(layer).data_ptr() == addresses[name]
        assert torch.equal(matrix(layer), matrix(converted(saved[0])[name]))


@pytest.mark.parametrize("before, after", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float32)])
def test_a_model_of_another_dtype_goes_on(before, after):
    """States take the width of the weights they now belong to, and fp32 at least."""
    model, optimizer = build(before)
    train(model, optimizer, 6)
    file = checkpoint(model, optimizer)
    model, optimizer = build(after)
    model.load_state_dict(file["model"])
    optimizer.load_state_dict(file["optimizer"])
    for layer in converted(model).values():
        assert optimizer.state[layer.coordinates]["exp_avg"].dtype == after
    assert all(math.isfinite(loss) for loss in train(model, optimizer, 6, start=6))


def test_states_of_any_strides_go_on():
    model, optimizer = build()
    train(model, optimizer, 6)
    file = copy.deepcopy(checkpoint(model, optimizer))
    for state in file["optimizer"]["state"].values():
        state |= {key: value.mT.contiguous().mT for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() == 2}
    other_model, other = build()
    other_model.load_state_dict(file["model"])
    other.load_state_dict(file["optimizer"])
    assert train(other_model, other, 6, start=6) == train(model, optimizer, 6, start=6)


def test_states_of_layers_without_a_gradient_so_far():
    """Reading optimizer.state[p] leaves an empty entry behind."""
    model, optimizer = build()
    model.up.coordinates.requires_grad_(False)
    train(model, optimizer, 5)
    optimizer.state[model.up.coordinates]
    file = checkpoint(model, optimizer)
    other_model, other = build()
    other_model.load_state_dict(file["model"])
    other.load_state_dict(file["optimizer"])
    train(other_model, other, 2, start=5)
    assert other.state[other_model.up.coordinates]["step"] == 2


def test_a_model_that_was_cast_goes_on_in_the_same_states():
    model, _ = build()
    optimizer = lrk.RSOAdamW([layer.coordinates for layer in converted(model).values()], inner_steps=7)
    train(model, optimizer, 5)
    train(model.double(), optimizer, 5, start=5)
    layer = next(iter(converted(model).values()))
    assert {optimizer.state[layer.coordinates][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float64}
    assert layer.coordinates.dtype == torch.float64 and optimizer.state[layer.coordinates]["step"].dtype == torch.float32


@pytest.mark.parametrize("copied", [False, True])
def test_a_group_can_be_added_to_a_resumed_optimizer(copied):
    model, optimizer = build(targets=["layers"])
    train(model, optimizer, 5)
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    lrk.to_subspace(model, rank=3, target_modules=["up", "down"])
    model.down.subspace.move_to(7)  # as another optimizer would have left it
    optimizer.add_param_group({"params": [model.up.coordinates, model.down.coordinates], "inner_steps": 2})
    before = model.up.weight.clone()
    train(model, optimizer, 3, start=5)
    assert not torch.equal(before, model.up.weight)
    assert [group["outer_step"] for group in optimizer.param_groups] == [2, 1]


@pytest.mark.parametrize("other", ["sgd", "adamw"])
def test_a_checkpoint_brings_its_inner_optimizer(other):
    """And resumes bit for bit where inner was changed just before it was saved, so that the states are still
    of the one before."""
    one = {"sgd": "adamw", "adamw": "sgd"}[other]
    model, optimizer = build(inner=one)
    train(model, optimizer, 6)
    optimizer.param_groups[0]["inner"] = other
    file = checkpoint(model, optimizer)
    resumed, optimizer_after = build(inner=one)
    resumed.load_state_dict(file["model"])
    optimizer_after.load_state_dict(file["optimizer"])
    assert optimizer_after.param_groups[0]["inner"] == other
    assert train(resumed, optimizer_after, 5, start=6) == train(model, optimizer, 5, start=6)


def test_another_rank_continues_from_the_models_checkpoint_alone():
    model, optimizer = build(rank=6)
    train(model, optimizer, 6)
    file = checkpoint(model, optimizer)
    other, _ = build(rank=3)
    other.load_state_dict(file["model"])
    x, y = batch(9)
    assert torch.equal(model(x), other(x)), "nothing is left in B"
    start = (model(x) - y).square().mean().item()
    fresh = lrk.RSOAdamW(other.parameters(), lr=1e-3)
    assert train(other, fresh, 1, start=9)[0] == start


# Checkpoints that do not fit.


def saved_by(steps=6, **options):
    model, optimizer = build(**options)
    train(model, optimizer, steps)
    return optimizer.state_dict()


def of_torch_adamw():
    model, optimizer = build()
    adamw = torch.optim.AdamW(optimizer.param_groups[0]["params"])
    random_gradients(lrk.to_dense(model))
    adamw.step()
    return adamw.state_dict()


def of_low_rank_adamw(**options):
    parameters = [nn.Parameter(torch.randn_like(p)) for p in build()[0].parameters() if p.dim() == 2]
    optimizer = lrk.LowRankAdamW([{"params": parameters, **options}])
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer.state_dict()


def broken(change):
    saved = copy.deepcopy(saved_by())
    change(saved)
    return saved


def states_of(saved):
    return [state for state in saved["state"].values() if "subspace" in state]


UNFIT = {
    "another rank": (
        lambda: saved_by(rank=4),
        r"saved at rank 4 and group 0, parameter \d of shape \(6, 40\) has rank 6; convert .* rank=4",
    ),
    "another seed": (lambda: saved_by(seed=1), "subspaces are others .* seed, distribution, target_modules and share"),
    "another distribution": (lambda: saved_by(distribution="haar"), "subspaces are others"),
    "other target_modules": (lambda: saved_by(targets=["layers"]), "parameter group that doesn't match the size"),
    "as many other layers": (
        lambda: _renumbered(),
        "state of coordinates of a SubspaceLinear for group 0, parameter 1 .*, which is an ordinary parameter; convert",
    ),
    "torch's AdamW": (of_torch_adamw, "group 0 has no 'inner_steps'; it was saved for another optimizer"),
    "LowRankAdamW": (lambda: of_low_rank_adamw(rank=4), "group 0 has no 'inner_steps'"),
    "LowRankAdamW, dense": (lambda: of_low_rank_adamw(), "group 0 has no 'inner_steps'"),
    "more groups": (lambda: broken(lambda s: s["param_groups"].append(s["param_groups"][0])), "different number of parameter groups"),
    "a wrong position": (lambda: broken(lambda s: s["param_groups"][0].update(outer_step=-1)), "outer_step must be an int ≥ 0, got -1"),
    "a wrong inner": (
        lambda: broken(lambda s: s["param_groups"][0].update(inner="adam")),
        "inner must be one of 'adamw', 'sgd', got 'adam'",
    ),
    "no moments": (lambda: broken(lambda s: [state.pop("exp_avg") for state in states_of(s)]), "lacks exp_avg, exp_avg_sq or step"),
    "no step": (lambda: broken(lambda s: [state.pop("step") for state in states_of(s)]), "lacks exp_avg, exp_avg_sq or step"),
    "another width": (
        lambda: broken(lambda s: [state.update(exp_avg=torch.zeros(6, 7)) for state in states_of(s)]),
        r"exp_avg is \(6, 7\), expected \(6, 40\) .* another model",
    ),
    "a displacement of another rank": (
        lambda: broken(lambda s: [state.update(displacement=torch.zeros(3, state["exp_avg"].shape[1])) for state in states_of(s)]),
        "saved at rank 3",
    ),
}


def _renumbered():
    """As of a model in which a bias stands where this one has coordinates."""
    saved = copy.deepcopy(saved_by())
    numbers = list(saved["state"])
    saved["state"] = {number: saved["state"][other] for number, other in zip(numbers, reversed(numbers), strict=True)}
    return saved


@pytest.mark.parametrize("case", UNFIT)
def test_a_checkpoint_that_does_not_fit_says_so_and_changes_nothing(case):
    make, message = UNFIT[case]
    saved = make()
    model, optimizer = build()
    train(model, optimizer, 9)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    drawn = {name: matrix(layer).clone() for name, layer in converted(model).items()}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same_bits(before, (model.state_dict(), optimizer.state_dict()))
    assert all(layer.subspace.outer_step == 2 and torch.equal(matrix(layer), drawn[name]) for name, layer in converted(model).items())
    assert not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_load_state_dict_post_hooks
    twin_model, twin = build()
    train(twin_model, twin, 9)
    assert train(model, optimizer, 3, start=9) == train(twin_model, twin, 3, start=9)


def test_another_share_does_not_fit():
    saved = saved_by(net=Shared, share=None)
    _, optimizer = build(net=Shared)
    with pytest.raises(ValueError, match="target_modules and share that it had when the checkpoint was saved"):
        optimizer.load_state_dict(saved)


def test_low_rank_adamw_refuses_a_checkpoint_of_rso():
    saved = saved_by()
    parameters = [nn.Parameter(torch.randn_like(p)) for p in build()[0].parameters() if p.dim() == 2]
    optimizer = lrk.LowRankAdamW([{"params": parameters, "rank": 4}])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="group 0 is low-rank here but dense in the checkpoint"):
        optimizer.load_state_dict(saved)
    assert same_bits(before, optimizer.state_dict())


def test_names_of_parameters_stand_in_messages():
    model, _ = build()
    optimizer = lrk.RSOAdamW(model.named_parameters(), inner_steps=4)
    with pytest.raises(ValueError, match=re.escape("group 0, parameter 'up.coordinates' of shape (6, 40) has rank 6")):
        optimizer.load_state_dict(saved_by(rank=4))


def test_a_new_optimizer_starts_with_the_first_ps():
    model, optimizer = build()
    first = {name: matrix(layer).clone() for name, layer in converted(model).items()}
    train(model, optimizer, 9)
    lrk.RSOAdamW(model.parameters())
    assert all(torch.equal(matrix(layer), first[name]) for name, layer in converted(model).items())
