"""The contenders of a step: the strongest things a user could pick instead. Each is skipped with a reason
where it is missing.

A contender is `build(params, rank) -> Built`. After it, the states exist, and no further step refreshes.
Gradients are set. The contenders of a case may share the parameters, because the values of a weight do not
change the time of a step. A large model would not fit several times.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import lowrank_kernels as lrk
from lowrank_kernels.backends import reference

from .cases import Unavailable
from .formulas import back_project_, update_moments_
from .shapes import is_right

NEVER = 10**9
"""A gap between refreshes that no benchmark reaches."""
LR, SCALE = 1e-4, 0.25


@dataclass(frozen=True)
class Built:
    """`state` is the object that holds the tensors that stay between steps."""

    step: Callable[[], object]
    state: Any


Build = Callable[[list[nn.Parameter], int], Built]

OURS: dict[str, dict[str, object]] = {
    "lowrank_kernels": {},
    "lowrank_kernels, 8-bit states": {"state_bits": 8},
    "lowrank_kernels, stochastic rounding": {"rounding": "stochastic"},
    "lowrank_kernels, CUDA graph": {"capturable": True},
}
"""Keys of the low-rank group, by contender. The first contender is the one that the others and all baselines
are compared with."""


def low_rank_optimizer(params: list[nn.Parameter], rank: int, keys: dict[str, object]) -> lrk.LowRankAdamW:
    """An optimizer that has made its first step, which chose the bases."""
    group = {"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": SCALE, "power_iters": 0, **keys}
    optimizer = lrk.GaLoreAdamW([group], lr=LR)
    optimizer.step()
    return optimizer


def ours(keys: dict[str, object]) -> Build:
    def build(params: list[nn.Parameter], rank: int) -> Built:
        optimizer = low_rank_optimizer(params, rank, keys)
        return Built(optimizer.step, optimizer.state)

    return build


def ours_in_a_graph(params: list[nn.Parameter], rank: int) -> Built:
    """The step as a replay of a CUDA graph, which needs no work of the host."""
    optimizer = low_rank_optimizer(params, rank, OURS["lowrank_kernels, CUDA graph"])
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return Built(graph.replay, optimizer.state)


def step_one_(weight: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int | Tensor, right: bool) -> None:
    """The reference's formulas for one matrix."""
    projected = reference.project(basis, grad, right)
    normalised = update_moments_(exp_avg, exp_avg_sq, projected, beta1=0.9, beta2=0.999, eps=1e-8, step=step)
    back_project_(weight, basis, normalised, lr=LR, scale=SCALE, weight_decay=0.0, right=right)


def formulas(params: list[nn.Parameter], rank: int, step_one: Callable[..., None] = step_one_) -> Built:
    """The formulas for one matrix after another, as plain PyTorch code does it."""
    states = []
    for param in params:
        m, n = sorted(param.shape)
        r = min(rank, m)
        basis = torch.linalg.qr(torch.randn(m, r, device=param.device))[0].to(param.dtype)
        states.append((basis, *(torch.zeros(r, n, device=param.device) for _ in range(2))))
    count = torch.zeros((), device=params[0].device)  # on the device, so that a compiled step is compiled only once

    @torch.no_grad()
    def step() -> None:
        count.add_(1)
        for param, state in zip(params, states, strict=True):
            step_one(param, param.grad, *state, count, is_right(*param.shape))

    step()
    return Built(step, states)


def compiled_formulas(params: list[nn.Parameter], rank: int) -> Built:
    """`formulas` under torch.compile, with a graph for each shape."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        raise Unavailable("TORCH_COMPILE_DISABLE is set")
    torch.compiler.reset()  # otherwise the graphs of all cases count towards one limit
    return formulas(params, rank, torch.compile(step_one_, fullgraph=True, dynamic=False))


def galore_torch(params: list[nn.Parameter], rank: int) -> Built:
    try:
        with _quiet():
            from galore_torch import GaLoreAdamW
    except ImportError as missing:
        raise _missing(missing, "galore-torch") from missing
    group = {"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": SCALE, "proj_type": "std"}
    optimizer = GaLoreAdamW([group], lr=LR, no_deprecation_warning=True)
    # Its first step would take an SVD of every matrix, which is an hour for a large model. The choice of
    # basis changes neither time nor memory.
    with mock.patch("torch.linalg.svd", _random_factors):
        optimizer.step()
    return Built(optimizer.step, optimizer.state)


def _random_factors(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Random factors with the shapes of the thin SVD's, so that a slice of one keeps as much memory alive."""
    rows, columns = matrix.shape
    thin = min(rows, columns)
    left = torch.randn(rows, thin, dtype=matrix.dtype, device=matrix.device).div_(rows**0.5)
    right = torch.randn(thin, columns, dtype=matrix.dtype, device=matrix.device).div_(columns**0.5)
    return left, torch.ones(thin, dtype=matrix.dtype, device=matrix.device), right


def apollo_torch(params: list[nn.Parameter], rank: int) -> Built:
    """Used only by its documented interface. Its licence is not a free one, so no extra of this package
    includes it."""
    try:
        with _quiet():
            from apollo_torch import APOLLOAdamW
    except ImportError as missing:
        raise _missing(missing, "apollo-torch, whose licence forbids commercial use") from missing
    group = {"params": params, "rank": rank, "proj": "random", "scale_type": "channel", "scale": 1.0, "update_proj_gap": NEVER}
    optimizer = APOLLOAdamW([group | {"proj_type": "std"}], lr=LR)
    optimizer.step()
    return Built(optimizer.step, optimizer.state)


def adamw_fused(params: list[nn.Parameter], rank: int) -> Built:
    """Full-rank AdamW: the cost without any projection. Its states have the weights' dtype."""
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    optimizer.step()
    return Built(optimizer.step, optimizer.state)


def adamw_8bit(params: list[nn.Parameter], rank: int) -> Built:
    """Full-rank AdamW with 8-bit states."""
    try:
        with _quiet():
            from bitsandbytes.optim import AdamW8bit
    except ImportError as missing:
        raise _missing(missing, "bitsandbytes") from missing
    optimizer = AdamW8bit(params, lr=LR)
    optimizer.step()
    return Built(optimizer.step, optimizer.state)


def _missing(error: ImportError, package: str) -> Unavailable:
    return Unavailable(f"{error} (pip install {package}; without a network --wheels FOLDER, with its wheel and those it needs)")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the messages about missing extras that peers and their dependencies print when they are
    imported."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


STEP: dict[str, Build] = {
    **{name: ours_in_a_graph if "CUDA graph" in name else ours(keys) for name, keys in OURS.items()},
    "galore-torch": galore_torch,
    "apollo-torch": apollo_torch,
    "formulas in PyTorch": formulas,
    "formulas, torch.compile": compiled_formulas,
    "AdamW(fused=True), full rank": adamw_fused,
    "bitsandbytes AdamW8bit, full rank": adamw_8bit,
}


def require(name: str, device: str) -> None:
    """Raises Unavailable if a contender needs a GPU and there is none."""
    if "CUDA graph" in name and device == "cpu":
        raise Unavailable("it needs a GPU")


def applies(name: str, dtype: torch.dtype) -> bool:
    """False if a contender would be the same as another one: only bf16 weights are rounded stochastically."""
    return "stochastic" not in name or dtype == torch.bfloat16


def make_params(weights: list[tuple[int, int]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Weights and gradients of a model, the same for every contender."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in weights:
        param = nn.Parameter((torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype))
        param.grad = (torch.randn(shape, generator=generator, device=device) * 0.01).to(dtype)
        params.append(param)
    return params
