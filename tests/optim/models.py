"""A small network with one parameter of every kind, the methods, and the loop that trains it."""

import functools
import io

import torch
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.optim import methods


class Net(nn.Module):
    """Tall, wide and square matrices, several of a shape, with biases that stay dense."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.up = nn.Linear(12, 40)
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(3))
        self.down = nn.Linear(40, 10)
        self.to(dtype)

    def forward(self, x):
        x = torch.tanh(self.up(x))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.down(x)


def build(dtype=torch.float32, optimizer=lrk.LowRankAdamW, lr=1e-2, weight_decay=0.1, device="cpu", capturable=False, **options):
    torch.manual_seed(0)
    model = Net(dtype).to(device)
    groups = lrk.param_groups(model, **({"rank": 6, "update_proj_gap": 4} | options))
    return model, optimizer(groups, lr=lr, weight_decay=weight_decay, capturable=capturable)


OF_A_METHOD = {"ApolloMiniAdamW": {"rank": 1}}
METHODS = {name: functools.partial(build, optimizer=getattr(lrk, name), **OF_A_METHOD.get(name, {})) for name in methods.__all__} | {
    "LowRankAdafactor without M": functools.partial(build, optimizer=functools.partial(lrk.LowRankAdafactor, first_moment=False)),
    "FiraAdamW with I3S": functools.partial(build, optimizer=lrk.FiraAdamW, selection="importance"),
}
"""Builds of every method that projects gradients. What all methods share is tested on all of them."""


def batch(step, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 12, generator=generator)
    return x.to(device, dtype), torch.randn(16, 10, generator=generator).to(device, dtype)


def train(model, optimizer, steps, start=0, scaler=None, scheduler=None):
    losses = []
    parameter = next(model.parameters())
    for step in range(start, start + steps):
        x, y = batch(step, parameter.dtype, parameter.device)
        loss = (model(x) - y).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same_bits(a, b):
    """Whether two nests of dicts, lists, numbers and tensors are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b
