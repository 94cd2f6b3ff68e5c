"""print(optimizer) is a line a group."""

import pytest
import torch
from torch import nn

import lowrank_kernels as lrk


def weights():
    return [nn.Parameter(torch.zeros(8, 12)) for _ in range(3)]


def test_a_line_a_group_with_what_differs_from_the_defaults():
    one, two, three = weights()
    optimizer = lrk.LowRankAdamW(
        [{"params": [one, two], "rank": 4, "selection": "random"}, {"params": [three], "lr": 0.5}], betas=(0.8, 0.9)
    )
    assert repr(optimizer).splitlines() == [
        "LowRankAdamW(",
        '    group 0: 2 parameters, rank=4, selection="random", betas=(0.8, 0.9)',
        "    group 1: 1 parameter, lr=0.5, betas=(0.8, 0.9)",
        ")",
    ]


@pytest.mark.parametrize("kind", [lrk.GaLoreAdamW, lrk.FiraAdamW, lrk.ApolloAdamW, lrk.LowRankAdafactor, lrk.LowRankAdamMini])
def test_what_a_class_prescribes_is_no_difference(kind):
    optimizer = kind([{"params": weights(), "rank": 4}])
    assert repr(optimizer).splitlines()[1] == "    group 0: 3 parameters, rank=4"


def test_own_keys_of_a_class_and_the_position_are_shown():
    (one, *_) = weights()
    optimizer = lrk.LowRankAdafactor([{"params": [one], "rank": 4}], first_moment=False)
    one.grad = torch.randn(8, 12)
    optimizer.step()
    assert repr(optimizer).splitlines()[1] == "    group 0: 1 parameter, rank=4, calls=1, first_moment=False"


def test_names_of_parameters_are_left_out():
    """torch puts them into the group."""
    model = lrk.to_subspace(nn.Linear(8, 12), rank=4)
    optimizer = lrk.RSOAdamW(model.named_parameters(), inner_steps=7, moments="carry", lr=torch.tensor(0.25))
    assert "param_names" in optimizer.param_groups[0]
    assert repr(optimizer).splitlines()[1] == '    group 0: 3 parameters, lr=tensor(0.2500), inner_steps=7, moments="carry"'
