"""Models converted for RSOAdamW, and what the tests of it do with them."""

import copy

import torch
from optim.models import Net, through_a_file
from torch import nn

import lowrank_kernels as lrk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Shared(nn.Module):
    """Layers beside each other that read the same input, as in a decoder, and ones that do not."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.enter = nn.Linear(12, 24)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"q_proj": nn.Linear(24, 24), "k_proj": nn.Linear(24, 24), "v_proj": nn.Linear(24, 32), "o_proj": nn.Linear(32, 24)}
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(24)
        self.leave = nn.Linear(24, 10)
        self.to(dtype)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = x + block["o_proj"]((block["q_proj"](x) * block["k_proj"](x)).mean(-1, keepdim=True) + torch.tanh(block["v_proj"](x)))
        return self.leave(self.norm(x))


def build(
    dtype=torch.float32,
    rank=6,
    lr=1e-2,
    net=Net,
    device="cpu",
    share="auto",
    distribution="gaussian",
    seed=0,
    targets="all-linear",
    principal_rank=None,
    **options,
):
    torch.manual_seed(0)
    model = net(dtype).to(device)
    lrk.to_subspace(
        model, rank=rank, target_modules=targets, share=share, distribution=distribution, seed=seed, principal_rank=principal_rank
    )
    return model, lrk.RSOAdamW(model.parameters(), lr=lr, **({"inner_steps": 4} | options))


def converted(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, lrk.SubspaceLinear)}


def matrix(layer):
    """P, the layer's own."""
    return layer.subspace.matrix(layer.weight.device, layer.weight.dtype)


def random_gradients(model, step=0, scale=1.0):
    """The same for every model of these parameters, whatever its weights."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = (scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(parameter)


def everything(model, optimizer):
    """Weights, states and the position, to compare bit by bit."""
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def resumed_from(model, optimizer, **options):
    """A fresh run of `build` that goes on from a checkpoint of this one."""
    file = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, after = build(**options)
    resumed.load_state_dict(file["model"])
    after.load_state_dict(file["optimizer"])
    return resumed, after
