"""Optimizers on sharded parameters beside the same ones on whole parameters, given the same gradients."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import lowrank_kernels as lrk

STEPS, GAP, LR = 20, 6, 1e-2
SHAPES = [(24, 40), (40, 24), (24, 40), (25, 33), (3, 40), (4, 12, 20)]
"""Even and uneven ones, two of a shape, one with fewer rows than processes, experts."""
FOR_FOUR = [*SHAPES[2:], (5, 4), (2, 6, 8)]
"""Also one whose last process has nothing of either side, and fewer experts than processes."""
SHAPES_OF = {"unsharded": [(24, 40), (40, 24), (25, 33), (16, 16)], "convolution": [(12, 3, 2, 2), (9, 2, 3, 3)]}
METHODS = {
    "GaLore": lrk.GaLoreAdamW,
    "I3S": lrk.I3SAdamW,
    "Fira": lrk.FiraAdamW,
    "Fira, I3S": lrk.FiraAdamW,
    "stagger": lrk.I3SAdamW,
    "random": lrk.LowRankAdamW,
    "8 bits": lrk.I3SAdamW,
    "Adafactor": lrk.LowRankAdafactor,
    "Adafactor without M": lrk.LowRankAdafactor,
    "Adam-mini": lrk.LowRankAdamMini,
    "APOLLO": lrk.ApolloAdamW,
    "APOLLO-Mini": lrk.ApolloMiniAdamW,
    "rotate": lrk.LowRankAdamW,
    "reset, adaptive": lrk.LowRankAdamW,
    "unsharded": lrk.GaLoreAdamW,
    "exact": lrk.GaLoreAdamW,
    "convolution": lrk.I3SAdamW,
    "bf16, stochastic": lrk.I3SAdamW,
}
OPTIONS = {
    "Fira, I3S": dict(selection="importance"),
    "stagger": dict(stagger=True),
    "random": dict(selection="random"),
    "8 bits": dict(state_bits=8),
    "Adafactor without M": dict(first_moment=False),
    "APOLLO-Mini": dict(rank=1),
    "rotate": dict(moments="rotate"),
    "reset, adaptive": dict(moments="reset", refresh_threshold=0.3, max_update_proj_gap=12, diagnostics=True),
    "unsharded": dict(proj_type="unsharded"),
    "exact": dict(svd="exact"),
    "bf16, stochastic": dict(rounding="stochastic"),
}
MESHES = {
    "Shard(0)": ((-1,), [Shard(0)]),
    "Shard(1)": ((-1,), [Shard(1)]),
    "HSDP, Shard(0)": ((2, -1), [Replicate(), Shard(0)]),
    "HSDP, Shard(1)": ((2, -1), [Replicate(), Shard(1)]),
    "replicated": ((-1,), [Replicate()]),
}
"""Shapes of the mesh, and placements."""


def mesh_of(kind):
    shape, placements = MESHES[kind]
    world = processes()
    shape = tuple(world // 2 if size == -1 and len(shape) > 1 else world if size == -1 else size for size in shape)
    return init_device_mesh("cpu", shape), placements


def processes():
    return torch.distributed.get_world_size()


def spread(tensor, mesh, placements):
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def gradient(shape, place, step, dtype):
    generator = torch.Generator().manual_seed(1000 * place + step)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    decay = torch.logspace(0, -1, shape[-1], dtype=torch.float64)
    return (grad * decay).to(dtype)


def build(method, dtype, place=None, **options):
    """Parameters, whole or spread by place = (mesh, placements), and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES_OF.get(method, SHAPES if processes() == 2 else FOR_FOUR)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    params = [torch.nn.Parameter(weight if place is None else spread(weight, *place)) for weight in weights]
    group = dict(params=params, rank=3, update_proj_gap=GAP) | OPTIONS.get(method, {}) | options
    return params, METHODS[method]([group], lr=LR, weight_decay=0.1)


def run(method, dtype, place=None, **options):
    params, optimizer = build(method, dtype, place, **options)
    start = [param.detach().clone() for param in params]
    for number in range(STEPS):
        step(params, optimizer, number, dtype, place)
    return params, optimizer, start


def step(params, optimizer, number, dtype, place=None):
    for index, param in enumerate(params):
        grad = gradient(tuple(param.shape), index, number, dtype)
        param.grad = grad if place is None else spread(grad, *place)
    optimizer.step()


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value
