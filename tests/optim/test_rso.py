"""RSOAdamW: the rule against naive ones, and against what it comes to in special cases."""

import copy

import pytest
import torch
from optim.models import batch, same_bits, train
from optim.rso_runs import DEVICE, build, converted, matrix, random_gradients
from tolerances import UNIT, assert_within, back_project_error, moments_error, normalised_error
from torch import nn
from torch.nn import functional as F

import lowrank_kernels as lrk
from benchmarks import formulas
from lowrank_kernels.backends import cpu


class Naive:
    """RSO as the paper has it: explicit W₀ and B, y = x·(W₀ᵀ + P·B), autograd for B, torch.optim.AdamW (or
    SGD) on it, merged by hand.

    Decay of the whole weight: W₀ decays beside B. The proximal term is part of the loss.
    """

    def __init__(self, model, subspaces, lr, weight_decay, inner_steps, proximal, inner, momentum=0.9):
        self.model, self.subspaces, self.inner_steps, self.proximal, self.inner = model, subspaces, inner_steps, proximal, inner
        self.lr, self.weight_decay, self.momentum, self.calls = lr, weight_decay, momentum, 0
        self.layers = {name: module for name, module in model.named_modules() if name in subspaces}
        others = [p for name, p in model.named_parameters() if name.removesuffix(".weight") not in self.layers]
        self.dense = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay)
        for layer in self.layers.values():
            layer.start = layer.weight.detach().clone()
            del layer.weight
        self.redraw()

    def redraw(self):
        for name, layer in self.layers.items():
            layer.P = self.subspaces[name](self.calls // self.inner_steps)
            layer.B = torch.zeros(layer.P.shape[1], layer.out_features, dtype=layer.P.dtype, requires_grad=True)
        coordinates = [layer.B for layer in self.layers.values()]
        if self.inner == "adamw":
            self.coordinates = torch.optim.AdamW(coordinates, lr=self.lr, weight_decay=self.weight_decay)
        else:
            self.coordinates = torch.optim.SGD(coordinates, lr=self.lr, momentum=self.momentum)

    def loss(self, x, y):
        for layer in self.layers.values():
            layer.forward = lambda x, layer=layer: F.linear(x, layer.start + (layer.P @ layer.B).mT, layer.bias)
        return (self.model(x) - y).square().mean()

    def step(self, x, y):
        loss = self.loss(x, y)
        penalty = sum(layer.B.square().sum() for layer in self.layers.values())
        (loss + 0.5 * self.proximal * penalty).backward()
        with torch.no_grad():
            for layer in self.layers.values():
                layer.start *= 1 - self.lr * self.weight_decay
                if self.inner == "sgd":
                    layer.B *= 1 - self.lr * self.weight_decay
        for optimizer in (self.dense, self.coordinates):
            optimizer.step()
            optimizer.zero_grad()
        self.calls += 1
        if self.calls % self.inner_steps == 0:
            with torch.no_grad():
                for layer in self.layers.values():
                    layer.start += (layer.P @ layer.B).mT
            self.redraw()
        return loss.item()


@pytest.mark.parametrize("inner", ["adamw", "sgd"])
@pytest.mark.parametrize("proximal", [0.0, 0.3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("distribution", ["gaussian", "haar", "rademacher"])
def test_three_outer_steps_are_the_naive_ones_in_fp64(inner, proximal, weight_decay, distribution):
    options = dict(lr=1e-2, weight_decay=weight_decay, inner_steps=4, proximal=proximal, inner=inner)
    model, optimizer = build(torch.float64, distribution=distribution, **options)
    naive_model = lrk.to_dense(copy.deepcopy(model))

    def subspaces(layer):
        def draw(outer_step):
            other = copy.deepcopy(layer.subspace)
            other.move_to(outer_step)
            return other.matrix(torch.device("cpu"), torch.float64).clone()

        return draw

    naive = Naive(naive_model, {name: subspaces(layer) for name, layer in converted(model).items()}, **options)
    for step in range(12):
        x, y = batch(step, torch.float64)
        expected = naive.step(x, y)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(expected, rel=1e-11)
        for name, layer in converted(model).items():
            twin = naive.layers[name]
            merged = twin.start + (twin.P @ twin.B).mT.detach()
            assert (layer.weight - merged).norm() <= 1e-12 * merged.norm()
            assert torch.allclose(layer.bias, twin.bias, rtol=1e-11, atol=1e-14)
    assert optimizer.param_groups[0]["outer_step"] == 3


@pytest.mark.gpu
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_is_b_kept_aside_and_merged_at_the_end_to_rounding(dtype, weight_decay):
    """Errors of a step (tolerances.py), each carried on by 1 − lr·wd: at most their sum. The moments' own
    pass from step to step."""
    lr, adam = 0.02, dict(beta1=0.9, beta2=0.999, eps=1e-8)
    torch.manual_seed(0)
    layer = lrk.SubspaceLinear(33, 20, rank=5, dtype=dtype, device=DEVICE)
    optimizer = lrk.RSOAdamW(layer.parameters(), lr=lr, weight_decay=weight_decay, inner_steps=100)
    P, start = matrix(layer).double(), layer.weight.double().mT
    B, M, V = (torch.zeros(5, 20, dtype=torch.float64, device=DEVICE) for _ in range(3))
    bound, errors = torch.zeros_like(start), (0.0, 0.0)
    tf32 = 2.0**-11 if dtype == torch.float32 and DEVICE == "cuda" and torch.get_float32_matmul_precision() != "highest" else 0.0
    rounds_n = dtype == torch.bfloat16 and (DEVICE == "cuda" or cpu.NATIVE_BF16)
    for step in range(1, 13):
        before = layer.weight.detach().mT
        layer.coordinates.grad = torch.randn_like(layer.coordinates)
        R = layer.coordinates.grad.double()
        errors = moments_error(M, V, R, 0.9, 0.999, state_errors=errors)
        N = formulas.update_moments_(M, V, R, **adam, step=step)
        of_n = normalised_error(M, V, errors, **adam, step=step, correction=8 * UNIT[torch.float32])
        bound = abs(1 - lr * weight_decay) * bound + back_project_error(
            before, P, N, lr=lr, scale=1.0, weight_decay=weight_decay, store=UNIT[dtype], normalised_error=of_n,
            operand_unit=(2 * UNIT[dtype] if rounds_n else 0.0) + tf32, basis_unit=tf32,
        )  # fmt: skip
        optimizer.step()
        B = (1 - lr * weight_decay) * B - lr * N
        start = (1 - lr * weight_decay) * start
        assert_within(layer.weight.mT, start + P @ B, bound, "W")
    assert bound.norm() <= 13 * (2 * UNIT[dtype] + 2e-6) * (layer.weight.norm() + (P @ B).norm()), "and the bound is not a large one"


@pytest.mark.parametrize("lr, nearest", [(1e-4, 0.3), (3e-5, 0.7)])
def test_stochastic_rounding_of_bf16_weights_keeps_small_updates(lr, nearest):
    """ΔW of an outer step against the same in fp32: to nearest most of it is lost. Stochastically each of the
    200 stores adds noise of variance at most u²/4, u the distance of neighbours, 2⁻⁷ and less of a weight of
    0.02: together √200·u/2 = 1e-3·0.8, in the mean of the 65,536 elements 256 times less, so what remains is
    looked at along ΔW."""

    def moved(dtype, rounding):
        torch.manual_seed(0)
        layer = nn.Linear(256, 256, bias=False)
        nn.init.normal_(layer.weight, std=0.02)
        layer.to(torch.bfloat16).to(dtype)
        start = layer.weight.detach().double().clone()
        optimizer = lrk.RSOAdamW(lrk.to_subspace(layer, rank=64).parameters(), lr=lr, inner_steps=1000, rounding=rounding)
        generator = torch.Generator().manual_seed(1)
        mean = torch.randn(64, 256, generator=generator) * 0.05
        for _ in range(200):
            layer.coordinates.grad = (mean + torch.randn(64, 256, generator=generator)).to(dtype)
            optimizer.step()
        return layer.weight.detach().double() - start

    exact, lost, kept = moved(torch.float32, "nearest"), moved(torch.bfloat16, "nearest"), moved(torch.bfloat16, "stochastic")
    along = [(exact * each).sum() / exact.square().sum() for each in (lost, kept)]
    assert 1 - along[0] > nearest
    assert abs(1 - along[1]) < 0.03


def test_of_full_rank_with_a_haar_p_an_outer_step_is_adamw_in_a_rotated_frame():
    """PᵀP = P·Pᵀ = I: W·P moves as torch's AdamW moves it along the gradient of W·P."""
    torch.manual_seed(0)
    layer = lrk.SubspaceLinear(12, 20, rank=12, distribution="haar", dtype=torch.float64)
    P = matrix(layer).clone()
    assert torch.allclose(P.mT @ P, torch.eye(12, dtype=torch.float64), atol=1e-12)
    rotated = nn.Parameter(layer.weight.detach() @ P)
    bias = nn.Parameter(layer.bias.detach().clone())
    ours = lrk.RSOAdamW(layer.parameters(), lr=0.01, weight_decay=0.1, inner_steps=10)
    theirs = torch.optim.AdamW([rotated, bias], lr=0.01, weight_decay=0.1)
    for step in range(9):
        x = torch.randn(30, 12, dtype=torch.float64)
        (layer(x).tanh().square().sum() + layer(x)[step].sum()).backward()
        y = F.linear(x, rotated @ P.mT, bias)
        (y.tanh().square().sum() + y[step].sum()).backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert torch.allclose(layer.weight, rotated @ P.mT, rtol=1e-10, atol=1e-12)
        assert torch.allclose(layer.bias, bias, rtol=1e-10, atol=1e-12)


def test_sgd_without_momentum_moves_by_the_projected_gradient():
    """W ← W − lr·G·P·Pᵀ, with G of the same layer unconverted."""
    model, optimizer = build(torch.float64, lr=0.05, inner="sgd", momentum=0.0, inner_steps=3)
    for step in range(7):
        dense = lrk.to_dense(copy.deepcopy(model))
        x, y = batch(step, torch.float64)
        for each in (model, dense):
            (each(x) - y).square().mean().backward()
        twins = dict(dense.named_modules())
        expected = {
            name: layer.weight - 0.05 * twins[name].weight.grad @ matrix(layer) @ matrix(layer).mT
            for name, layer in converted(model).items()
        }
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in converted(model).items():
            assert torch.allclose(layer.weight, expected[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("outer_step", [0, 2])
def test_the_first_step_in_a_subspace_has_the_size_of_the_learning_rate(outer_step):
    """M̂ = R and V̂ = R²: Wᵀ moves by −lr·P·sign(dB), whatever came before."""
    model, optimizer = build(torch.float64, eps=0.0)
    train(model, optimizer, 4 * outer_step)
    random_gradients(model)
    before = {name: layer.weight.detach().clone() for name, layer in converted(model).items()}
    optimizer.step()
    for name, layer in converted(model).items():
        moved = -1e-2 * (matrix(layer) @ layer.coordinates.grad.sign()).mT
        assert torch.allclose(layer.weight - before[name], moved, rtol=1e-9, atol=1e-14)


@pytest.mark.gpu
@pytest.mark.parametrize("inner", ["adamw", "sgd"])
def test_weight_decay_is_of_the_whole_weight(inner):
    model, optimizer = build(weight_decay=0.5, lr=0.1, inner=inner, device=DEVICE)
    start = {name: layer.weight.double() for name, layer in converted(model).items()}
    for _ in range(10):
        random_gradients(model, scale=0.0)
        optimizer.step()
    for name, layer in converted(model).items():
        assert_within(layer.weight, start[name] * 0.95**10, 20 * UNIT[torch.float32] * start[name].abs(), "W")


@pytest.mark.gpu
def test_parameters_outside_get_the_bits_of_torchs_fused_adamw():
    model, optimizer = build(lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), device=DEVICE)
    coordinates = {id(layer.coordinates) for layer in converted(model).values()}
    ours = [p for p in model.parameters() if p.requires_grad and id(p) not in coordinates]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    adamw = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), fused=True)
    assert ours
    for step in range(6):
        random_gradients(model, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q) and same_bits(dict(optimizer.state[p]), dict(adamw.state[q]))


def test_it_trains():
    model, optimizer = build(lr=0.01, inner_steps=10)
    x, y = batch(0)
    losses = []
    for _ in range(300):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", ["zero", "of rank 1", 1e30, 1e-30], ids=str)
@pytest.mark.parametrize("inner, proximal", [("adamw", 0.0), ("adamw", 0.1), ("sgd", 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_no_rank_and_of_any_size_leave_everything_finite(dtype, inner, proximal, gradient):
    lr = 1e-35 if inner == "sgd" and gradient == 1e30 else 1e-2
    model, optimizer = build(dtype, lr=lr, inner=inner, proximal=proximal, device=DEVICE)
    for step in range(9):
        random_gradients(model, step, scale=gradient if isinstance(gradient, float) else 0.0)
        if gradient == "of rank 1":
            for layer in converted(model).values():
                layer.coordinates.grad[0] = 1.0
        optimizer.step()
        assert all(layer.weight.isfinite().all() for layer in converted(model).values())


def test_every_layer_update_and_outer_step_is_rounded_by_its_own_bits():
    """Weights that only decay, from the same values each time: what differs is the rounding."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(40, 40, bias=False), "k_proj": nn.Linear(40, 40, bias=False)}).bfloat16()
    start = model["q_proj"].weight.detach().clone()
    optimizer = lrk.RSOAdamW(lrk.to_subspace(model, rank=4).parameters(), lr=1e-2, weight_decay=0.1, inner_steps=2, rounding="stochastic")
    found = []
    for _ in range(4):
        for layer in model.values():
            with torch.no_grad():
                layer.weight.copy_(start)
            layer.coordinates.grad = torch.zeros_like(layer.coordinates)
        optimizer.step()
        found += [layer.weight.detach().clone() for layer in model.values()]
    assert not any(torch.equal(a, b) for index, a in enumerate(found) for b in found[:index])
    # To nearest, a decay by a thousandth would move no weight.
    assert torch.stack(found).double().sub(start.double() * (1 - 1e-3)).mean().abs() < 1e-5
