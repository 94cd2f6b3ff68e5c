"""A block whose layers share their input, what autograd saves, and bounds on the error of a product."""

import torch
from tolerances import ACCUMULATION_UNIT, TINY, UNIT
from torch import nn

UNITS = UNIT | {torch.float64: 2.0**-53}


class Block(nn.Module):
    """The linear layers of a decoder block, with the names that share P by default."""

    def __init__(self, width=12, dtype=torch.float64):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, 6)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width)
        self.to(dtype)

    def forward(self, x):
        return x + self.o_proj(torch.tanh(self.q_proj(x)) * self.v_proj(x) + self.k_proj(x).mean(-1, keepdim=True))


class Model(nn.Module):
    """Embedding, blocks and a head, like a language model: the head may be tied to the embedding."""

    def __init__(self, blocks=2, tied=False, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(12, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def projection(layer):
    """P, as the layer uses it."""
    return layer.subspace.matrix(layer.weight.device, layer.weight.dtype)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """What autograd saves while this is entered, but for parameters, each storage once and as a whole."""

    def __init__(self, *modules):
        self.parameters = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self.storages = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def product_error(a, b, dtype, of_a=0.0):
    """E of a·b, (n, k) times (k, m), for an a that is known to `of_a`, the result stored in `dtype`.

    Products and sums in fp32, in fp64 for fp64: (k + 1)·u·|a||b|, as in tolerances.project_error; the store
    adds its u of the result.
    """
    a, b = a.double(), b.double()
    unit = 2.0**-52 if dtype == torch.float64 else ACCUMULATION_UNIT
    terms = a.shape[-1] + 1
    of_dot = terms * unit * (a.abs() @ b.abs()) + terms * TINY
    if isinstance(of_a, torch.Tensor):
        of_dot = of_dot + of_a @ b.abs()
    return of_dot + UNITS[dtype] * ((a @ b).abs() + of_dot)
