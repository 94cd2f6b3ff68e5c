"""RSOAdamW: when a new P comes, what may change between steps, and that buckets of layers are an
implementation detail."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim.models import Net, same_bits, train
from optim.rso_runs import DEVICE, Shared, build, converted, matrix, random_gradients
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels import philox
from lowrank_kernels.optim import rso_buckets
from lowrank_kernels.subspaces import draw_projection

STEPS = st.lists(
    st.fixed_dictionaries(
        {"grad": st.sampled_from(["there", "there", "there", "missing", "skipped"])},
        optional={
            "lr": st.floats(0, 0.1),
            "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
            "eps": st.sampled_from([1e-8, 1e-3]),
            "weight_decay": st.sampled_from([0.0, 0.3]),
            "inner_steps": st.integers(1, 5),
            "proximal": st.sampled_from([0.0, 0.5]),
            "inner": st.sampled_from(["adamw", "sgd"]),
            "momentum": st.sampled_from([0.0, 0.5]),
        },
    ),
    min_size=1,
    max_size=16,
)


class Follower:
    """One layer by the formulas of the docstring, in plain fp64, with whatever the group's values are at each
    step."""

    def __init__(self, layer):
        self.subspace = copy.deepcopy(layer.subspace)
        self.W = layer.weight.detach().clone()
        self.outer_step = self.inner_step = self.t = 0
        self.inner, self.B = None, None

    @property
    def P(self):
        self.subspace.move_to(self.outer_step)
        return self.subspace.matrix(self.W.device, self.W.dtype)

    def update(self, dB, lr, betas, eps, weight_decay, proximal, inner, momentum, **_):
        if self.inner != inner:
            self.inner, self.t, self.M, self.V = inner, 0, torch.zeros_like(dB), torch.zeros_like(dB)
        if proximal and self.B is None:
            self.B = torch.zeros_like(dB)
        R = dB + proximal * self.B if proximal else dB
        self.t += 1
        if inner == "adamw":
            self.M = betas[0] * self.M + (1 - betas[0]) * R
            self.V = betas[1] * self.V + (1 - betas[1]) * R**2
            N = self.M / (1 - betas[0] ** self.t) / ((self.V / (1 - betas[1] ** self.t)).sqrt() + eps)
        else:
            N = self.M = momentum * self.M + R
        self.W = (1 - lr * weight_decay) * self.W - lr * (self.P @ N).mT
        if self.B is not None:
            self.B = (1 - lr * weight_decay) * self.B - lr * N

    def count(self, inner_steps):
        self.inner_step += 1
        if self.inner_step >= inner_steps:
            self.outer_step, self.inner_step, self.t = self.outer_step + 1, 0, 0
            if self.inner:
                self.M, self.V = torch.zeros_like(self.M), torch.zeros_like(self.V)
            self.B = None if self.B is None else torch.zeros_like(self.B)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_whatever_changes_between_steps_the_formulas_hold(steps):
    torch.manual_seed(0)
    layer = lrk.SubspaceLinear(7, 9, rank=3, dtype=torch.float64)
    optimizer = lrk.RSOAdamW(layer.parameters(), lr=0.05, inner_steps=3)
    follower, group = Follower(layer), optimizer.param_groups[0]
    for number, changes in enumerate(steps):
        group.update({key: value for key, value in changes.items() if key != "grad"})
        dB = torch.randn(3, 9, dtype=torch.float64)
        layer.coordinates.grad = None if changes["grad"] == "missing" else dB.clone()
        optimizer.found_inf = torch.tensor(float(changes["grad"] == "skipped"))
        optimizer.step()
        if changes["grad"] == "there":
            follower.update(dB, **{key: value for key, value in group.items() if key not in ("params", "inner_steps")})
        follower.count(group["inner_steps"])
        assert (group["outer_step"], group["inner_step"]) == (follower.outer_step, follower.inner_step), number
        assert torch.allclose(layer.weight, follower.W, rtol=1e-10, atol=1e-12), number
        assert torch.equal(matrix(layer), follower.P)
        state = optimizer.state.get(layer.coordinates, {})
        assert state.get("step", 0) == follower.t
        if follower.B is not None:
            assert torch.allclose(state["displacement"], follower.B, rtol=1e-10, atol=1e-12)
        assert ("momentum_buffer" in state) == (follower.inner == "sgd") and ("exp_avg" in state) == (follower.inner == "adamw")


def test_inner_steps_lowered_below_the_position_end_the_outer_step_with_the_next_call():
    model, optimizer = build(inner_steps=10)
    train(model, optimizer, 6)
    optimizer.param_groups[0]["inner_steps"] = 3
    train(model, optimizer, 1, start=6)
    assert (optimizer.param_groups[0]["outer_step"], optimizer.param_groups[0]["inner_step"]) == (1, 0)


@pytest.mark.gpu
def test_a_learning_rate_in_a_tensor_is_the_float():
    runs = [build(lr=lr, device=DEVICE) for lr in (0.0078125, torch.tensor(0.0078125))]
    assert train(*runs[0], 6) == train(*runs[1], 6)
    for model, optimizer in runs:
        lr = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = lr.zero_() if isinstance(lr, torch.Tensor) else 0.0
        before = copy.deepcopy(model.state_dict())
        train(model, optimizer, 2, start=6)
        assert same_bits(before, model.state_dict()), "the rate is read at each step"


@settings(max_examples=25, deadline=None)
@given(
    inner_steps=st.integers(1, 5), steps=st.integers(0, 12), proximal=st.sampled_from([0.0, 0.5]), inner=st.sampled_from(["adamw", "sgd"])
)
def test_every_inner_steps_calls_come_a_new_p_and_a_fresh_start(inner_steps, steps, proximal, inner):
    model, optimizer = build(inner_steps=inner_steps, proximal=proximal, inner=inner)
    for step in range(steps):
        random_gradients(model, step)
        optimizer.step()
    outer_step, inner_step = divmod(steps, inner_steps)
    group = optimizer.param_groups[0]
    assert (group["outer_step"], group["inner_step"]) == (outer_step, inner_step)
    for layer in converted(model).values():
        seed = philox.derive_seed(layer.subspace.fingerprint, outer_step)
        drawn = draw_projection("gaussian", layer.in_features, 6, seed=seed, device="cpu", dtype=torch.float32)
        assert torch.equal(matrix(layer), drawn)
        state = optimizer.state.get(layer.coordinates, {})
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        assert tensors.pop("step", 0) == inner_step
        assert all(value.any() == (inner_step > 0) for value in tensors.values())
        assert not layer.coordinates.any(), "W has already moved"


@pytest.mark.parametrize("distribution", ["gaussian", "haar", "rademacher"])
def test_ps_differ_between_outer_steps_layers_and_seeds(distribution):
    drawn = []
    for seed in (0, 1):
        model, optimizer = build(net=Shared, inner_steps=1, seed=seed, distribution=distribution)
        for _ in range(3):
            drawn += [matrix(layer).clone() for name, layer in converted(model).items() if "k_proj" not in name and "v_proj" not in name]
            optimizer.step()
    assert len(drawn) == 2 * 3 * 6
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_layers_that_share_p_move_on_together():
    model, optimizer = build(net=Shared, inner_steps=2)
    for step in range(5):
        block = model.blocks[0]
        assert block["q_proj"].subspace is block["k_proj"].subspace is block["v_proj"].subspace
        assert block["q_proj"].subspace.outer_step == model.enter.subspace.outer_step == step // 2
        train(model, optimizer, 1, start=step)


def test_groups_of_different_inner_steps_each_keep_their_own_time():
    torch.manual_seed(0)
    model = lrk.to_subspace(Net(), rank=4)
    optimizer = lrk.RSOAdamW([{"params": model.up.parameters(), "inner_steps": 2}, {"params": model.layers.parameters(), "inner_steps": 3}])
    for step in range(7):
        random_gradients(model, step)
        optimizer.step()
    assert [(group["outer_step"], group["inner_step"]) for group in optimizer.param_groups] == [(3, 1), (2, 1)]
    assert model.up.subspace.outer_step == 3 and model.layers[0].subspace.outer_step == 2 and model.down.subspace.outer_step == 0


class Mixed(nn.Module):
    """Layers of several shapes and dtypes, two of each."""

    def __init__(self, _=None):
        super().__init__()
        shapes = [(12, 20), (12, 30), (40, 12)]
        self.layers = nn.ModuleList(
            nn.Linear(*shape, dtype=dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16, torch.float64) for _ in range(2)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"proximal": 0.5}, {"inner": "sgd"}], ids=str)
@pytest.mark.parametrize("part_elements", [1, 2 * 6 * 20, 2**25])
def test_a_layer_moves_by_the_same_bits_alone_and_among_others(monkeypatch, part_elements, options):
    """Buckets and their parts are an implementation detail."""
    together, optimizer = build(net=Mixed, device=DEVICE, weight_decay=0.1, **options)
    alone = copy.deepcopy(together)
    monkeypatch.setattr(rso_buckets, "PART_ELEMENTS", part_elements)
    for step in range(6):
        random_gradients(together, step)
        optimizer.step()
    for index, layer in enumerate(alone.layers):
        one = lrk.RSOAdamW(layer.parameters(), lr=1e-2, inner_steps=4, weight_decay=0.1, **options)
        for step in range(6):
            random_gradients(alone, step)
            one.step()
        assert torch.equal(layer.weight, together.layers[index].weight), layer
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        state = dict(one.state[layer.coordinates])
        assert same_bits(state, dict(optimizer.state[together.layers[index].coordinates]))
        assert all(value.dtype == wide for key, value in state.items() if key not in ("step", "subspace"))
