"""Random draws are keyed by a parameter's name, where one is known, and checkpoints keep what they were made
with."""

import copy

import pytest
import torch
from models import Net, batch, build, same_bits, train
from torch import nn

import lowrank_kernels as lrk

OPTIONS = dict(rank=4, update_proj_gap=2, selection="random", seed=5)


def bases_of(model, *optimizers):
    """Name of each projected parameter → its basis after two refreshes from the same gradients."""
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    states = {param: state for optimizer in optimizers for param, state in optimizer.state.items()}
    return {name: states[param]["basis"] for name, param in model.named_parameters() if "basis" in states[param]}


def model_and_groups(**options):
    torch.manual_seed(0)
    model = Net()
    return model, lrk.param_groups(model, **(OPTIONS | options))


def test_one_optimizer_for_each_parameter_draws_as_one_for_all():
    model, groups = model_and_groups()
    whole = bases_of(model, lrk.LowRankAdamW(groups))
    model, (dense, low_rank) = model_and_groups()
    each = bases_of(
        model, *(lrk.LowRankAdamW([{**low_rank, "params": [param]}]) for param in low_rank["params"]), lrk.LowRankAdamW([dense])
    )
    assert same_bits(whole, each) and len(whole) == 5
    assert not torch.equal(each["layers.0.weight"], each["layers.1.weight"])


@pytest.mark.parametrize("selection", ["random", "importance"])
def test_a_draw_hangs_on_the_name_and_not_on_the_place(selection):
    model, groups = model_and_groups(selection=selection)
    first = bases_of(model, lrk.LowRankAdamW(groups))
    model, (dense, low_rank) = model_and_groups(selection=selection)
    shuffled = [{**low_rank, "params": low_rank["params"][::-1]}, dense]
    assert same_bits(first, bases_of(model, lrk.LowRankAdamW(shuffled)))


def test_names_that_torch_knows():
    """Of optimizers built from named_parameters(); without any the index counts."""

    def draw(names, places):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.ones(8, 6)) for _ in places]
        listed = [(name, param) for name, param in zip(names, params, strict=True)] if names else params
        optimizer = lrk.LowRankAdamW([{"params": listed, **OPTIONS}])
        for param in params:
            param.grad = torch.ones(8, 6)
        optimizer.step()
        return [optimizer.state[params[place]]["basis"] for place in places], [optimizer.state[param].get("draw_key") for param in params]

    (a, b), keys = draw(["a", "b"], [0, 1])
    (a2, b2), _ = draw(["b", "a"], [1, 0])
    assert torch.equal(a, a2) and torch.equal(b, b2) and not torch.equal(a, b) and None not in keys
    (zero, one), keys = draw(None, [0, 1])
    assert not torch.equal(zero, one) and keys == [None, None]


def test_wrappers_do_not_change_names():
    torch.manual_seed(0)
    plain, inside = Net(), Net()
    inside.load_state_dict(plain.state_dict())
    compiled = torch.compile(inside, backend="eager")
    first = bases_of(plain, lrk.LowRankAdamW(lrk.param_groups(plain, **OPTIONS)))
    second = bases_of(inside, lrk.LowRankAdamW(lrk.param_groups(compiled, **OPTIONS)))
    assert same_bits(first, second)


@pytest.mark.parametrize("saved_with_names", [True, False])
def test_a_checkpoint_keeps_what_it_was_made_with(saved_with_names):
    """Rounding and bases of a resumed run are those of the run that was saved, whatever the optimizer that
    takes over knows."""

    def fresh(named):
        model, optimizer = build(rank=4, update_proj_gap=2, selection="random", dtype=torch.bfloat16, rounding="stochastic")
        if not named:
            for param in model.parameters():
                del param._lowrank_kernels_name
        return model, optimizer

    model, optimizer = fresh(saved_with_names)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 4, start=3)
    other, resumed = fresh(not saved_with_names)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, 4, start=3)
    assert same_bits(other.state_dict(), model.state_dict()) and same_bits(resumed.state_dict(), optimizer.state_dict())


def test_messages_name_the_parameter():
    model = Net()
    groups = lrk.param_groups(model, rank=4)
    groups[1]["params"].append(model.up.bias)
    with pytest.raises(ValueError, match="parameter 'up.bias' of shape"):
        lrk.LowRankAdamW(groups[1:])
