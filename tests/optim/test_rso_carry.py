"""scale and moments="carry" of RSOAdamW, against their formula in fp64."""

import copy

import pytest
import torch
from optim.models import batch, same_bits, train
from optim.rso_runs import build, converted, everything, matrix, random_gradients, resumed_from
from torch import nn

import lowrank_kernels as lrk


class Naive:
    """One layer's W, moved by the formula, with every sum written out."""

    def __init__(self, layer, inner_steps, *, lr, scale, weight_decay, proximal, moments):
        self.layer, self.inner_steps, self.moments = layer, inner_steps, moments
        self.lr, self.scale, self.weight_decay, self.proximal = lr, scale, weight_decay, proximal
        self.weight = layer.weight.detach().clone().mT
        self.first_moment, self.second_moment, self.moved = (torch.zeros_like(layer.coordinates.detach()) for _ in range(3))
        self.since_redraw = self.since_reset = 0

    def step(self, projection, grad):
        self.since_redraw += 1
        self.since_reset += 1
        r = grad + self.proximal * self.moved
        self.first_moment = 0.9 * self.first_moment + 0.1 * r
        self.second_moment = 0.999 * self.second_moment + 0.001 * r * r
        m, v = self.first_moment / (1 - 0.9**self.since_redraw), self.second_moment / (1 - 0.999**self.since_reset)
        n = m / (v.sqrt() + 1e-8)
        kept = 1 - self.lr * self.weight_decay
        self.moved = kept * self.moved - self.lr * self.scale * n
        self.weight = kept * self.weight - self.lr * self.scale * projection @ n
        if self.since_redraw == self.inner_steps:
            self.since_redraw = 0
            self.moved = torch.zeros_like(n)
            self.first_moment = torch.zeros_like(n)
            if self.moments == "carry":
                rows = [self.second_moment[:, column].sum() / len(n) for column in range(n.shape[1])]
                self.second_moment = torch.stack(rows).repeat(len(n), 1)
            else:
                self.second_moment, self.since_reset = torch.zeros_like(n), 0


@pytest.mark.parametrize("moments", ["reset", "carry"])
@pytest.mark.parametrize("proximal", [0.0, 0.3])
@pytest.mark.parametrize("inner_steps", [1, 4])
def test_against_the_formula(moments, proximal, inner_steps):
    options = dict(lr=1e-2, scale=0.3, weight_decay=0.2, proximal=proximal, moments=moments)
    model, optimizer = build(torch.float64, inner_steps=inner_steps, **options)
    twins = {name: Naive(layer, inner_steps, **options) for name, layer in converted(model).items()}
    for step in range(11):
        random_gradients(model, step)
        projections = {name: matrix(layer).clone() for name, layer in converted(model).items()}
        optimizer.step()
        for name, layer in converted(model).items():
            twins[name].step(projections[name], layer.coordinates.grad)
            assert (layer.weight.mT - twins[name].weight).norm() <= 1e-12 * twins[name].weight.norm()
    for state in optimizer.state.values():
        if "subspace" in state:
            assert state["step"] == (11 if moments == "carry" else 11 % inner_steps)


def test_scale_moves_layers_and_nothing_else():
    (one, whole), (other, halved) = build(scale=1.0, weight_decay=0.0), build(scale=0.5, weight_decay=0.0)
    before = copy.deepcopy(one.state_dict())
    for model, optimizer in ((one, whole), (other, halved)):
        random_gradients(model)
        optimizer.step()
    for key, start in before.items():
        moved, half = one.state_dict()[key] - start, other.state_dict()[key] - start
        assert torch.allclose(half, (0.5 if key.endswith("weight") else 1.0) * moved, rtol=1e-3, atol=1e-7), key


@pytest.mark.parametrize("save_at", [3, 4, 6])
@pytest.mark.parametrize("proximal", [0.0, 0.1])
def test_resume_is_bit_identical(save_at, proximal):
    options = {"moments": "carry", "scale": 0.7, "proximal": proximal}
    straight, optimizer = build(**options)
    losses = train(straight, optimizer, 10)
    stopped, before = build(**options)
    train(stopped, before, save_at)
    resumed, after = resumed_from(stopped, before, **options)
    assert train(resumed, after, 10 - save_at, start=save_at) == losses[save_at:]
    assert same_bits(everything(resumed, after), everything(straight, optimizer))


def test_the_choice_may_change_during_a_run():
    """Each redraw goes by the value that it finds."""
    model, optimizer = build(inner_steps=3)
    group, ages = optimizer.param_groups[0], []
    for step in range(15):
        group["moments"] = "carry" if 3 <= step < 9 else "reset"
        random_gradients(model, step)
        optimizer.step()
        state = optimizer.state[next(iter(converted(model).values())).coordinates]
        ages.append(state["step"].item())
        assert bool(state["exp_avg_sq"].any()) == (ages[-1] > 0)
    assert ages == [1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 0]


def test_a_checkpoint_of_before_goes_on():
    model, optimizer = build()
    train(model, optimizer, 6)
    file = copy.deepcopy(optimizer.state_dict())
    for group in file["param_groups"]:
        for key in ("scale", "moments"):
            del group[key]
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, 5, start=6)
    resumed, after = build()
    resumed.load_state_dict(weights)
    after.load_state_dict(file)
    train(resumed, after, 5, start=6)
    assert same_bits(everything(resumed, after), everything(model, optimizer))


def test_a_layer_that_joins_later_has_counts_of_its_own():
    """Its first step has the size of any first step, and those of the others stay as they would be without
    it."""
    torch.manual_seed(0)
    layers = nn.ModuleList([lrk.SubspaceLinear(16, 8, rank=4, bias=False, seed=seed) for seed in range(3)])
    alone = copy.deepcopy(layers)
    optimizer, other = (lrk.RSOAdamW(each.parameters(), lr=1e-2, inner_steps=3, moments="carry") for each in (layers, alone))
    for step in range(11):
        for number in (0, 1, 2) if step >= 6 else (0, 1):
            grad = torch.randn(4, 8)
            layers[number].coordinates.grad = grad.clone()
            alone[number].coordinates.grad = grad.clone() if number < 2 else None
        late = layers[2].weight.detach().clone()
        optimizer.step()
        other.step()
        if step == 6:  # |N| is 1 at a first step
            projection = matrix(layers[2])
            sizes = torch.linalg.lstsq(projection, (layers[2].weight - late).mT).solution.abs()
            assert torch.allclose(sizes, torch.full_like(sizes, 1e-2), rtol=1e-3)
        for number in (0, 1):
            assert torch.equal(layers[number].weight, alone[number].weight)
    assert optimizer.state[layers[2].coordinates]["step"] == 5 and optimizer.state[layers[0].coordinates]["step"] == 11


def test_states_of_another_inner_optimizer_start_anew():
    """A layer that was not used since then."""
    torch.manual_seed(0)
    layers = nn.ModuleList([lrk.SubspaceLinear(16, 8, rank=4, bias=False, seed=seed) for seed in range(2)])
    optimizer = lrk.RSOAdamW(layers.parameters(), lr=1e-2, inner_steps=4, inner="sgd")
    for step in range(9):
        for number, layer in enumerate(layers):
            layer.coordinates.grad = torch.randn(4, 8) if number == 0 or step in (0, 7) else None
        optimizer.step()
        if step == 0:
            optimizer.param_groups[0].update(inner="adamw", moments="carry")
    state = optimizer.state[layers[1].coordinates]
    assert "momentum_buffer" not in state and state["step"] == 1


def test_refusals():
    layer = lrk.SubspaceLinear(8, 8, rank=2)
    with pytest.raises(ValueError, match="moments='carry' is for inner='adamw', whose V it carries over, got inner='sgd' .group 0"):
        lrk.RSOAdamW(layer.parameters(), inner="sgd", moments="carry")
    with pytest.raises(ValueError, match="moments must be one of 'reset', 'carry', got 'keep'"):
        lrk.RSOAdamW(layer.parameters(), moments="keep")


def test_training():
    model, optimizer = build(moments="carry", inner_steps=5, weight_decay=0.0)
    x, y = batch(0)
    losses = []
    for _ in range(100):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
