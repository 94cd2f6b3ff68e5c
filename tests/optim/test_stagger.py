"""Staggered refreshes: who refreshes when, with which draws, and what that leaves alone."""

import copy
import math
from collections import Counter

import pytest
import torch
from models import batch, build, same_bits, train
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels import ops
from lowrank_kernels.optim import optimizer as base
from lowrank_kernels.subspaces import SELECTIONS

SHAPES = ((8, 12), (12, 8), (8, 12), (2, 8, 12), (8, 2, 3, 2))  # two of a shape, both sides, experts, a convolution


def matrices(count, shapes=SHAPES):
    return [nn.Parameter(torch.ones(shapes[i % len(shapes)])) for i in range(count)]


def random_group(params, gap, **keys):
    """Random bases come from the draws alone, so a basis changes where there is a refresh with a new number,
    and nowhere else."""
    return {"params": params, "rank": 3, "update_proj_gap": gap, "selection": "random", **keys}


def take_step(optimizer, without=()):
    for group in optimizer.param_groups:
        for param in group["params"]:
            missing = not param.requires_grad or any(param is other for other in without)
            param.grad = None if missing else torch.randn_like(param)
    optimizer.step()


def bases(optimizer):
    return {param: state["basis"].clone() for param, state in optimizer.state.items() if "basis" in state}


def refreshes(optimizer, steps, missing=lambda step: ()):
    """Of each parameter of the low-rank groups, in order: the steps at which its basis changed. `missing`
    have no gradient."""
    found = {param: [] for group in optimizer.param_groups if "rank" in group for param in group["params"]}
    before = bases(optimizer)
    for step in range(steps):
        take_step(optimizer, missing(step))
        after = bases(optimizer)
        for param, basis in after.items():
            if param not in before or not torch.equal(basis, before[param]):
                found[param].append(step)
        before = after
    return list(found.values())


@pytest.mark.parametrize("keys", [{}, {"stagger": False}])
@pytest.mark.parametrize("gap", [1, 4])
def test_without_it_all_refresh_together(gap, keys):
    optimizer = lrk.LowRankAdamW([random_group(matrices(5), gap, **keys)])
    assert refreshes(optimizer, 3 * gap + 1) == [[0, gap, 2 * gap, 3 * gap]] * 5


@pytest.mark.parametrize(
    "count, gap, expected",
    [
        (1, 3, [[0, 3, 6]]),
        (2, 3, [[0, 3, 6], [0, 1, 4, 7]]),
        (3, 3, [[0, 3, 6], [0, 1, 4, 7], [0, 2, 5, 8]]),
        (5, 3, [[0, 3, 6], [0, 3, 6], [0, 1, 4, 7], [0, 1, 4, 7], [0, 2, 5, 8]]),
        (2, 1, [list(range(9))] * 2),
    ],
)
def test_the_first_nine_steps(count, gap, expected):
    optimizer = lrk.LowRankAdamW([random_group(matrices(count), gap, stagger=True)])
    assert refreshes(optimizer, 9) == expected


@pytest.mark.parametrize(
    "count, gap", [(1, 5), (2, 5), (3, 8), (4, 8), (7, 8), (5, 5), (6, 5), (7, 3), (9, 4), (12, 4), (13, 6), (1, 1), (6, 1)]
)
def test_refreshes_are_spread_over_the_period(count, gap):
    optimizer = lrk.LowRankAdamW([random_group(matrices(count), gap, stagger=True)])
    found = refreshes(optimizer, 3 * gap + 1)
    for steps in found:
        assert steps[0] == 0 and 1 <= steps[1] <= gap
        assert all(later - earlier == gap for earlier, later in zip(steps[1:], steps[2:], strict=False))
        assert len(steps) == len([step for step in range(1, 3 * gap + 1) if step % gap == steps[1] % gap]) + 1
    together = Counter(step for steps in found for step in steps)
    assert together.pop(0) == count, "at the first step every matrix needs a basis"
    assert all(count // gap <= together[step] <= math.ceil(count / gap) for step in range(1, 3 * gap + 1))
    busy = sorted(together)
    pauses = {later - earlier for earlier, later in zip(busy, busy[1:], strict=False)}
    assert pauses <= {max(1, gap // count), max(1, math.ceil(gap / count))}, "evenly, not in a bunch"


def test_each_refresh_draws_anew_and_what_it_would_have_drawn_without_it():
    """The n-th refresh of a parameter has the number n, staggered or not, so the first two differ as much as
    any."""
    drawn = []
    for stagger in (True, False):
        torch.manual_seed(0)
        optimizer = lrk.LowRankAdamW([random_group(matrices(5), 4, stagger=stagger)])
        sequences = [[] for _ in range(5)]
        for _ in range(17):
            take_step(optimizer)
            for sequence, basis in zip(sequences, bases(optimizer).values(), strict=True):
                if not sequence or not torch.equal(sequence[-1], basis):
                    sequence.append(basis)
        drawn.append(sequences)
    for staggered, together in zip(*drawn, strict=True):
        assert len(staggered) >= len(together) == 5
        for basis, expected in zip(staggered, together, strict=False):
            assert torch.allclose(basis, expected, atol=1e-6)
        for number, basis in enumerate(staggered):
            assert not any(torch.allclose(basis, other, atol=1e-2) for other in staggered[:number])


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("options, equal", [({"update_proj_gap": 1}, True), ({"update_proj_gap": 4}, False)])
def test_at_a_gap_of_one_it_changes_nothing(selection, options, equal):
    plain, staggered = (build(selection=selection, stagger=stagger, **options) for stagger in (False, True))
    assert (train(*plain, 6) == train(*staggered, 6)) is equal
    assert same_bits(plain[0].state_dict(), staggered[0].state_dict()) is equal
    assert same_bits(plain[1].state_dict()["state"], staggered[1].state_dict()["state"]) is equal


def test_a_parameter_alone_in_its_group_has_nobody_to_take_turns_with():
    runs = []
    for stagger in (False, True):
        torch.manual_seed(0)
        (weight,) = matrices(1)
        optimizer = lrk.LowRankAdamW([{"params": [weight], "rank": 3, "update_proj_gap": 3, "stagger": stagger}])
        for _ in range(8):
            take_step(optimizer)
        runs.append((weight.detach(), optimizer.state_dict()["state"]))
    assert same_bits(*runs)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("save_at", [1, 2, 3, 6])  # gap 4, five matrices: offsets 0, 0, 1, 2, 3
def test_resume_is_bit_identical(selection, save_at):
    straight, optimizer = build(selection=selection, stagger=True)
    losses = train(straight, optimizer, 11)
    stopped, before = build(selection=selection, stagger=True)
    train(stopped, before, save_at)
    resumed, after = build(selection=selection, stagger=True)
    resumed.load_state_dict(stopped.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert train(resumed, after, 11 - save_at, start=save_at) == losses[save_at:]
    assert same_bits(straight.state_dict(), resumed.state_dict())
    assert same_bits(optimizer.state_dict(), after.state_dict())


def test_missing_gradients_and_frozen_parameters_shift_nobody():
    params = matrices(6, shapes=((8, 12),))
    frozen, absent, sometimes = params[0], params[2], params[4]
    frozen.requires_grad_(False)
    optimizer = lrk.LowRankAdamW([random_group(params, 6, stagger=True)])
    found = refreshes(optimizer, 13, missing=lambda step: [absent, sometimes] if step in (3, 4) else [absent])
    assert found[0] == found[2] == []
    assert [found[i] for i in (1, 3, 5)] == [[0, 1, 7], [0, 3, 9], [0, 5, 11]]
    assert found[4] == [0, 5, 10], "it missed its turn and takes it with its next gradient"


def test_each_group_takes_its_own_turns():
    params = matrices(8, shapes=((8, 12),))
    groups = [
        {"params": [nn.Parameter(torch.ones(5))]},
        random_group(params[:2], 4, stagger=True),
        random_group(params[2:5], 4),
        random_group(params[5:7], 4, stagger=True),  # shares a bucket with the first one
    ]
    optimizer = lrk.LowRankAdamW(groups)
    optimizer.add_param_group(random_group(params[7:], 3, stagger=True))
    halves = [[0, 4, 8], [0, 2, 6]]
    assert refreshes(optimizer, 9) == [*halves, [0, 4, 8], [0, 4, 8], [0, 4, 8], *halves, [0, 3, 6]]
    take_step(optimizer)
    late = matrices(2)
    optimizer.add_param_group(random_group(late, 4, stagger=True))
    assert refreshes(optimizer, 7)[-2:] == [[0, 4], [0, 2, 6]], "a new group counts from its own first step"


def test_the_experts_of_a_parameter_refresh_together():
    first, experts = nn.Parameter(torch.ones(8, 12)), nn.Parameter(torch.ones(3, 8, 12))
    optimizer = lrk.LowRankAdamW([random_group([first, experts], 4, stagger=True)])
    before = None
    for step in range(9):
        take_step(optimizer)
        basis = optimizer.state[experts]["basis"].clone()
        if before is not None:
            changed = [not torch.equal(old, new) for old, new in zip(before, basis, strict=True)]
            assert changed == [step in (2, 6)] * 3
            assert not torch.equal(basis[0], basis[1])
        before = basis


def test_a_bucket_keeps_one_update_and_one_refresh_a_step(monkeypatch):
    """Of four matrices of a shape two are due at a time: one call chooses both bases, one moves all four."""
    optimizer = lrk.LowRankAdamW([random_group(matrices(4, shapes=((8, 12),)), 2, stagger=True)])
    moved, chosen, step, choose_bases = [], [], base.backends.step, ops.choose_bases
    monkeypatch.setattr(base.backends, "step", lambda bucket, hyper: moved.append(len(bucket)) or step(bucket, hyper))

    def spy(grads, *rest, places, **options):
        chosen.append([place for place, _ in places])
        return choose_bases(grads, *rest, places=places, **options)

    monkeypatch.setattr(ops, "choose_bases", spy)
    for _ in range(4):
        take_step(optimizer)
    assert moved == [4] * 4
    assert chosen == [[0, 1, 2, 3], [2, 3], [0, 1], [2, 3]]


def test_the_basis_in_use_belongs_to_the_matrix():
    """The update of each member takes its own basis, the new one or the kept one: W moves within its
    columns."""
    params = matrices(4, shapes=((8, 12),))
    optimizer = lrk.LowRankAdamW([random_group(params, 3, stagger=True)], lr=0.1)
    for _ in range(8):
        before = [param.detach().clone() for param in params]
        take_step(optimizer)
        for param, old in zip(params, before, strict=True):
            basis, moved = optimizer.state[param]["basis"], param.detach() - old
            assert moved.norm() > 0.01
            assert (moved - basis @ (basis.mT @ moved)).norm() < 1e-5 * moved.norm() + 1e-6  # W rounds at 2⁻²⁴, 96 entries


@pytest.mark.parametrize("what", ["choose", "step"])
def test_a_failure_leaves_those_whose_turn_it_is_as_they_were(monkeypatch, what):
    """A step that failed after its bases were chosen has them; taken again, it moves the rest."""
    params, twins = (matrices(4, shapes=((8, 12),)) for _ in range(2))
    optimizer, other = (lrk.LowRankAdamW([random_group(each, 2, stagger=True)]) for each in (params, twins))

    def step(each, number):
        torch.manual_seed(number)
        take_step(each)

    step(optimizer, 0)
    step(other, 0)
    before = copy.deepcopy([optimizer.state[param] for param in params]), [param.detach().clone() for param in params]
    target = {"choose": (ops, "choose_bases"), "step": (base.backends, "step")}[what]
    with monkeypatch.context() as patched:
        patched.setattr(*target, lambda *_, **__: (_ for _ in ()).throw(MemoryError("no")))
        with pytest.raises(MemoryError):
            step(optimizer, 1)
    same = {"step", "exp_avg", "exp_avg_sq"} | ({"basis", "refreshed_at"} if what == "choose" else set())
    for param, state, weight in zip(params, *before, strict=True):
        assert torch.equal(param, weight) and all(same_bits(state[key], optimizer.state[param][key]) for key in same)
    for number in range(1, 4):
        step(optimizer, number)
        step(other, number)
    assert same_bits(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("bad_steps", [(0,), (1, 2, 5), (6, 7)])
def test_a_step_that_a_scaler_skips_does_not_count(bad_steps):
    (model, optimizer), (plain_model, plain_optimizer) = build(stagger=True), build(stagger=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**6)
    good = 0
    for attempt in range(11):
        x, y = batch(good)
        scaler.scale((model(x) - y).square().mean()).backward()
        before = bases(optimizer)
        if attempt in bad_steps:
            model.down.bias.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if attempt in bad_steps:
            assert all(torch.equal(optimizer.state[param]["basis"], basis) for param, basis in before.items())
        else:
            train(plain_model, plain_optimizer, 1, start=good)
            good += 1
    assert same_bits(plain_model.state_dict(), model.state_dict())


def test_a_checkpoint_older_than_the_key_goes_on_as_it_began():
    model, optimizer = build()
    train(model, optimizer, 3)
    older = copy.deepcopy(optimizer.state_dict())
    del older["param_groups"][1]["stagger"]
    resumed, loaded = build(stagger=True)
    resumed.load_state_dict(model.state_dict())
    loaded.load_state_dict(older)
    assert loaded.param_groups[1]["stagger"] is False
    assert train(model, optimizer, 6, start=3) == train(resumed, loaded, 6, start=3)


def test_it_can_be_switched_on_during_a_run():
    optimizer = lrk.LowRankAdamW([random_group(matrices(2), 4)])
    assert refreshes(optimizer, 5) == [[0, 4]] * 2
    optimizer.param_groups[0]["stagger"] = True
    assert refreshes(optimizer, 8) == [[3, 7], [1, 5]], "steps 8, 12 and 6, 10 of the run"


@pytest.mark.parametrize("wrong", [1, 0, "yes", None])
def test_what_is_no_bool_is_refused_wherever_it_comes_from(wrong):
    message = f"stagger must be True or False, got {wrong!r} \\(group 1\\)"
    with pytest.raises(TypeError, match=message):
        build(stagger=wrong)
    model, optimizer = build(stagger=True)
    train(model, optimizer, 1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["stagger"] = wrong
    with pytest.raises(TypeError, match=message):
        optimizer.load_state_dict(saved)
    assert same_bits(before, (model.state_dict(), optimizer.state_dict()))
    optimizer.param_groups[1]["stagger"] = wrong
    with pytest.raises(TypeError, match=message):
        train(model, optimizer, 1)
    optimizer.param_groups[1]["stagger"] = True
    assert same_bits(before, (model.state_dict(), optimizer.state_dict()))


def test_it_needs_a_rank():
    with pytest.raises(ValueError, match="stagger is set but rank is not .* add rank"):
        lrk.LowRankAdamW([{"params": matrices(1), "stagger": True}])
