"""What only LowRankAdafactor has: its keys, and a first moment that a group may leave out."""

import inspect

import pytest
import torch
from models import Net, build, train
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.optim import keys
from lowrank_kernels.rules import Rule


def test_the_constructor_has_the_declared_defaults():
    parameters = inspect.signature(lrk.LowRankAdafactor).parameters
    found = {name: parameter.default for name, parameter in parameters.items() if name not in ("params", "unsupported")}
    assert found == keys.defaults((*keys.ADAMW, *keys.ADAFACTOR, keys.CAPTURABLE))
    assert all(key.name in lrk.LowRankAdafactor.__doc__ for key in keys.ADAFACTOR)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"clip_threshold": 0.0}, "clip_threshold must be finite and > 0, got 0.0"),
        ({"beta2_decay": 0.8}, r"beta2_decay must lie in \[-inf, 0\), got 0.8"),
        ({"first_moment": 1}, "first_moment must be True or False, got 1"),
    ],
    ids=str,
)
def test_values_out_of_range(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lrk.LowRankAdafactor([{"params": [nn.Parameter(torch.ones(8, 12))], "rank": 2}], **bad)
    with pytest.raises((ValueError, TypeError), match=message):
        lrk.LowRankAdafactor([{"params": [nn.Parameter(torch.ones(8, 12))], "rank": 2, **bad}])


def test_groups_have_keys_of_their_own():
    groups = lrk.param_groups(Net(), rank=4, first_moment=False, clip_threshold=2.0)
    optimizer = lrk.LowRankAdafactor(groups, beta2_decay=-0.5)
    dense, low_rank = optimizer.param_groups
    assert dense["first_moment"] and not low_rank["first_moment"] and low_rank["clip_threshold"] == 2.0
    assert low_rank["beta2_decay"] == -0.5


@pytest.mark.parametrize("before", [True, False])
def test_the_first_moment_cannot_come_or_go_during_a_run(before):
    model, optimizer = build(optimizer=lrk.LowRankAdafactor)
    group = optimizer.param_groups[1]
    group["first_moment"] = before
    train(model, optimizer, 2)
    group["first_moment"] = not before
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    found = "has exp_avg, which the group's method does not keep" if before else "has no exp_avg, which the group's method needs"
    with pytest.raises(ValueError, match=f"{found}, with lift='back_projection', first_moment={not before}"):
        train(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_checkpoint_of_another_method_is_refused():
    _, optimizer = build()
    train(*build(), 1)
    model, adamw = build()
    train(model, adamw, 2)
    with pytest.raises(ValueError, match="group 0 has no 'beta2_decay'; it was saved for another optimizer"):
        build(optimizer=lrk.LowRankAdafactor)[1].load_state_dict(adamw.state_dict())


class OnlyV(Rule):
    name = "only_v"
    keys = ()

    def state(self, rank, n):
        return {"exp_avg_sq": (rank, n)}

    def update(self, projected, state, step):
        state["exp_avg_sq"].mul_(0.9).addcmul_(projected, projected, value=0.1)
        return projected / (state["exp_avg_sq"].sqrt() + 1e-8)


class WithOnlyV(lrk.LowRankAdamW):
    rule = OnlyV()


def test_a_rule_that_keeps_v_alone_in_8_bits():
    model, optimizer = build(optimizer=WithOnlyV, state_bits=8)
    train(model, optimizer, 3)
    state = optimizer.state[model.up.weight]
    assert state["exp_avg_sq"].dtype == torch.uint8 and "exp_avg_sq_scale" in state
    resumed, again = build(optimizer=WithOnlyV, state_bits=8)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert train(resumed, again, 3, start=3) == train(model, optimizer, 3, start=3)
    model.bfloat16()
    train(model, optimizer, 1)
