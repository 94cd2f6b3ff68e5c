"""RSOAdamW: the rule against a naive one in fp64, schedule, state and resume, and what training code relies on."""

import copy
import io

import pytest
import torch
from optim.models import Net, batch, same_bits, train
from torch import nn
from torch.nn import functional as F

import lowrank_kernels as lrk
from lowrank_kernels.nn import layer_of


def build(dtype=torch.float32, rank=6, lr=1e-2, model=None, device="cpu", share="auto", distribution="gaussian", seed=0, **options):
    torch.manual_seed(0)
    model = (model or Net(dtype)).to(device)
    lrk.to_subspace(model, rank=rank, share=share, distribution=distribution, seed=seed)
    return model, lrk.RSOAdamW(model.parameters(), lr=lr, **({"inner_steps": 4} | options))


def converted(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, lrk.SubspaceLinear)}


class Naive:
    """RSO as the paper has it: explicit W₀ and B, y = x·(W₀ᵀ + P·B), autograd for B, torch.optim.AdamW (or SGD) on it, merged by hand.

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
