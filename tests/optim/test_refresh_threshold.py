"""refresh_threshold: matrices whose bases hardly change keep them longer. diagnostics: what refreshes
found."""

import copy
import math

import pytest
import torch
from models import build, same_bits, train
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.optim import periods
from lowrank_kernels.optim.arriving import Arriving


def run(grad_of, steps, start=0, optimizer=None, parameters=None, **keys):
    """The steps at which each parameter got another basis. grad_of: (number of the parameter, step) → its
    gradient."""
    if optimizer is None:
        parameters = [nn.Parameter(torch.zeros(grad_of(number, 0).shape)) for number in range(2)]
        group = {"params": parameters, "rank": 2, "update_proj_gap": 3, "svd": "exact", "selection": "dominant"} | keys
        optimizer = lrk.LowRankAdamW([group], lr=0.0)
    refreshed = [[], []]
    for step in range(start, start + steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = grad_of(number, step)
        before = [optimizer.state[parameter].get("refreshed_at") for parameter in parameters]
        optimizer.step()
        for number, parameter in enumerate(parameters):
            if optimizer.state[parameter]["refreshed_at"] != before[number]:
                refreshed[number].append(step)
    return refreshed, optimizer, parameters


def steady_and_changing(number, step):
    """Parameter 0 has the same two directions for ever, parameter 1 new ones at each step."""
    generator = torch.Generator().manual_seed(step)
    if number == 1:
        return torch.randn(8, 12, generator=generator)
    basis = torch.linalg.qr(torch.randn(8, 2, generator=torch.Generator().manual_seed(99)))[0]
    return basis @ torch.randn(2, 12, generator=generator) + 1e-3 * torch.randn(8, 12, generator=generator)


def test_bases_that_stay_are_kept_longer_and_longer():
    refreshed, optimizer, parameters = run(steady_and_changing, 46, refresh_threshold=0.9, max_update_proj_gap=12)
    # The gap doubles at each refresh to 6 and 12, and no further.
    assert refreshed[0] == [0, 3, 9, 21, 33, 45]
    assert refreshed[1] == list(range(0, 46, 3))
    assert [optimizer.state[parameter]["periods"].item() for parameter in parameters] == [4, 1]


@pytest.mark.parametrize("keys", [{}, {"refresh_threshold": 1.0}, {"refresh_threshold": 0.9, "max_update_proj_gap": 3}], ids=str)
def test_without_it_all_refresh_in_each_period(keys):
    refreshed, optimizer, parameters = run(steady_and_changing, 20, **keys)
    assert refreshed[0] == refreshed[1] == list(range(0, 20, 3))
    assert keys.get("refresh_threshold", 1.0) < 1 or all("periods" not in optimizer.state[parameter] for parameter in parameters)


def test_with_stagger_the_turns_stay():
    refreshed, _, _ = run(steady_and_changing, 30, refresh_threshold=0.9, max_update_proj_gap=6, update_proj_gap=4, stagger=True)
    assert refreshed[1] == [0, *range(2, 30, 4)]  # the second of two takes the middle of the period
    assert refreshed[0] == [0, *range(4, 30, 4)]  # 6 // 4 = 1 period at most
    refreshed, _, _ = run(steady_and_changing, 30, refresh_threshold=0.9, max_update_proj_gap=8, update_proj_gap=4, stagger=True)
    assert refreshed[0] == [0, 4, 12, 20, 28]


def test_experts_lengthen_only_together():
    def grad_of(number, step):
        return torch.stack([steady_and_changing(0, step), steady_and_changing(number, step + 100)])

    refreshed, _, _ = run(grad_of, 13, refresh_threshold=0.9)
    assert refreshed[0] == [0, 3, 9] and refreshed[1] == [0, 3, 6, 9, 12]


def test_a_basis_that_a_bad_gradient_kept_says_nothing():
    def grad_of(number, step):
        return torch.full((8, 12), torch.nan) if step in (3, 6) else torch.randn(8, 12)

    refreshed, optimizer, parameters = run(grad_of, 10, refresh_threshold=0.9)
    assert refreshed[0] == [0, 3, 6, 9] and optimizer.state[parameters[0]]["periods"] == 1


@pytest.mark.parametrize("save_at", [2, 4, 10, 20])
def test_resume(save_at):
    keys = {"refresh_threshold": 0.9, "max_update_proj_gap": 12, "diagnostics": True}
    whole, optimizer, _ = run(steady_and_changing, 40, **keys)
    first, stopped, parameters = run(steady_and_changing, save_at, **keys)
    resumed_parameters = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    group = {"params": resumed_parameters, "rank": 2, "update_proj_gap": 3, "svd": "exact", "selection": "dominant"} | keys
    resumed = lrk.LowRankAdamW([group], lr=0.0)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    rest, resumed, _ = run(steady_and_changing, 40 - save_at, save_at, resumed, resumed_parameters)
    assert [a + b for a, b in zip(first, rest, strict=True)] == whole
    assert same_bits(resumed.state_dict(), optimizer.state_dict())


def test_the_longest_gap_is_that_of_the_group_now():
    refreshed, optimizer, parameters = run(steady_and_changing, 22, refresh_threshold=0.9, max_update_proj_gap=12)
    assert refreshed[0] == [0, 3, 9, 21]
    optimizer.param_groups[0].update(max_update_proj_gap=6)
    assert run(steady_and_changing, 15, 22, optimizer, parameters)[0][0] == [27, 33]
    optimizer.param_groups[0].update(max_update_proj_gap=12, update_proj_gap=9)  # one period of 9 at most
    assert run(steady_and_changing, 28, 37, optimizer, parameters)[0][0] == [37, 45, 54, 63]


def test_in_inference_mode_and_out_of_it():
    expected = run(steady_and_changing, 30, refresh_threshold=0.9)[0]
    first, optimizer, parameters = run(steady_and_changing, 2, refresh_threshold=0.9)
    with torch.inference_mode():
        second = run(steady_and_changing, 6, 2, optimizer, parameters)[0]
    for parameter in parameters:
        assert not optimizer.state[parameter]["periods"].is_inference()
    rest = run(steady_and_changing, 22, 8, optimizer, parameters)[0]
    assert [a + b + c for a, b, c in zip(first, second, rest, strict=True)] == expected


@pytest.mark.parametrize("selection", ["random", "gaussian"])
def test_bases_that_follow_no_gradient_are_refused(selection):
    group = {"params": [nn.Parameter(torch.ones(8, 12))], "rank": 2, "selection": selection, "refresh_threshold": 0.5}
    with pytest.raises(ValueError, match=f"refresh_threshold=0.5 compares bases that follow .* selection='{selection}' draws them"):
        lrk.LowRankAdamW([group])


def test_how_late_the_host_learns_of_it_changes_nothing(monkeypatch):
    """As on a GPU: the host asks when a period ends, and waits then."""
    waited = []

    class Late(Arriving):
        def has_arrived(self):
            return False

        def values(self):
            waited.append(self)
            return super().values()

    at_once = run(steady_and_changing, 30, refresh_threshold=0.9)[0]
    monkeypatch.setattr(periods, "Arriving", Late)
    assert run(steady_and_changing, 30, refresh_threshold=0.9)[0] == at_once and waited


def test_it_can_be_switched_on_and_off_during_a_run():
    refreshed, optimizer, parameters = run(steady_and_changing, 5)
    optimizer.param_groups[0].update(refresh_threshold=0.9)
    assert run(steady_and_changing, 20, 5, optimizer, parameters)[0][0] == [6, 12, 24]
    optimizer.param_groups[0].update(refresh_threshold=1.0)
    assert run(steady_and_changing, 9, 25, optimizer, parameters)[0][0] == [27, 30, 33]


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (2, 8, 12)], ids=str)
@pytest.mark.parametrize("selection", ["dominant", "importance", "random"])
def test_diagnostics_against_their_definitions(shape, selection):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(shape))
    group = {"params": [parameter], "rank": 3, "update_proj_gap": 2, "selection": selection, "diagnostics": True}
    optimizer = lrk.LowRankAdamW([group], lr=0.1)
    assert optimizer.diagnostics() == []
    old = None
    for step, size in enumerate((1.0, 1.0, 1e-15, 1.0, 1e15)):
        parameter.grad = size * torch.randn(shape)
        optimizer.step()
        if step % 2:
            continue
        rows = optimizer.diagnostics()
        grads = (parameter.grad.mT if shape[-2] > shape[-1] else parameter.grad).double().view(-1, 8, 12)
        bases = optimizer.state[parameter]["basis"].double().view(-1, 8, 3)
        assert [row["expert"] for row in rows] == (list(range(shape[0])) if len(shape) == 3 else [None])
        for number, (row, grad, basis) in enumerate(zip(rows, grads, bases, strict=True)):
            squares = torch.linalg.svdvals(grad / grad.norm()).square()
            assert row["param"] == 0 and row["refreshed_at"] == step
            assert row["effective_rank"] == pytest.approx(1 / squares.square().sum().item(), rel=1e-4)
            assert row["captured_energy"] == pytest.approx(((basis.mT @ grad).norm() / grad.norm()).square().item(), rel=1e-4)
            if old is None:
                assert math.isnan(row["overlap"])
            else:
                assert row["overlap"] == pytest.approx((basis.mT @ old[number]).square().sum().item() / 3, rel=1e-4)
        old = bases.clone()


def test_diagnostics_name_parameters_and_wait_for_the_first_basis():
    model, optimizer = build(diagnostics=True)
    train(model, optimizer, 3)
    assert [row["param"] for row in optimizer.diagnostics()] == [
        name for name, parameter in model.named_parameters() if parameter in optimizer.state and "basis" in optimizer.state[parameter]
    ]
    parameter = nn.Parameter(torch.zeros(2, 8, 12))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 3, "diagnostics": True}], lr=0.1)
    seen = []
    for expert in (0, 0, 1, 1):
        parameter.grad = torch.zeros(2, 8, 12)
        parameter.grad[expert] = torch.randn(8, 12)
        optimizer.step()
        seen.append([row["captured_energy"] for row in optimizer.diagnostics()])
    assert seen[0][0] > 0.1 and math.isnan(seen[0][1]) and seen[1][0] == seen[0][0]
    assert seen[2][0] == seen[0][0] and seen[2][1] > 0.1 and seen[3] == seen[2]


@pytest.mark.parametrize("shape", [(8, 12), (2, 8, 12)], ids=str)
def test_a_basis_that_comes_late_has_none_to_overlap_with(shape):
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 3, "update_proj_gap": 2, "diagnostics": True}], lr=0.1)
    for step in range(5):
        parameter.grad = torch.randn(shape) if step >= 2 else torch.zeros(shape)
        optimizer.step()
        if step == 2:
            assert all(math.isnan(row["overlap"]) and row["captured_energy"] > 0 for row in optimizer.diagnostics())
    assert all(0 < row["overlap"] <= 1 for row in optimizer.diagnostics())


def test_without_orthonormal_bases_only_the_effective_rank_is_given():
    parameter = nn.Parameter(torch.zeros(8, 12))
    optimizer = lrk.ApolloAdamW([{"params": [parameter], "rank": 3, "update_proj_gap": 1, "diagnostics": True}], lr=0.1)
    for _ in range(2):
        parameter.grad = torch.randn(8, 12)
        optimizer.step()
    (row,) = optimizer.diagnostics()
    assert math.isnan(row["overlap"]) and math.isnan(row["captured_energy"]) and 1 < row["effective_rank"] < 8


def test_diagnostics_change_nothing():
    (model, optimizer), (other, plain) = build(diagnostics=True), build()
    assert train(model, optimizer, 9) == train(other, plain, 9)
    assert plain.diagnostics() == [] and all("refresh_diagnostics" not in state for state in plain.state.values())
