"""The public surface as a user types it; `make lint` checks it with mypy --strict, and py.typed promises
it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lowrank_kernels as lrk
from lowrank_kernels.rules import Rule


def low_rank(model: nn.Module) -> torch.optim.Optimizer:
    groups = lrk.param_groups(model, rank=128, target_modules="all-linear", update_proj_gap=200, scale=0.25)
    by_group: list[lrk.LowRankAdamW] = [
        lrk.LowRankAdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        lrk.GaLoreAdamW(groups, lr=1e-2, capturable=True),
        lrk.I3SAdamW(groups),
        lrk.FiraAdamW(groups),
    ]
    by_group[1].refresh()
    loss: object = by_group[0].step(lambda: 0.0)
    assert loss is not None
    return by_group[0]


def rso(model: nn.Module) -> nn.Module:
    converted: nn.Module = lrk.to_subspace(model, rank=128, distribution="haar", seed=1, share=[["q", "k"]])
    optimizer = lrk.RSOAdamW(converted.parameters(), lr=1e-3, inner_steps=200, proximal=0.1, inner="sgd", momentum=0.9)
    optimizer.step()
    layer = lrk.SubspaceLinear(8, 4, bias=False, rank=2)
    out: Tensor = layer.forward(torch.ones(1, 8))
    assert out.shape == (1, 4)
    return lrk.to_dense(converted)


def operators(grad: Tensor) -> Tensor:
    basis, sigma = lrk.ops.range_finder(grad, 4, oversample=8, power_iters=1, seed=0)
    indices: Tensor = lrk.ops.sample_importance(sigma, 2, seed=0)
    version: str = lrk.__version__
    assert version
    return lrk.subspace_overlap(basis, basis) + indices


def watched(model: nn.Module, optimizer: lrk.LowRankAdamW) -> str:
    found: lrk.Report = lrk.report(model, [optimizer, torch.optim.SGD(model.parameters())])
    total: int = found.bytes.total + found.adamw.states
    reason: str = found.unprojected[0].reason
    steps: int = found.groups[0].next_refresh
    overlaps: list[float] = [each.overlap for each in found.parameters]
    figures: dict[str, float] = optimizer.diagnostics(flat=True)
    rows: list[dict[str, Any]] = optimizer.diagnostics()
    estimate: lrk.Memory = lrk.estimate_memory(model, "galore", rank=8, shards=2)
    assert total and steps and overlaps and figures and rows and estimate.peak
    return reason + str(lrk.report(model, optimizer))


class Sign(Rule):
    name = "sign"

    def state(self, rank: int, n: int) -> dict[str, tuple[int, int]]:
        return {}

    def update(self, projected: Tensor, state: dict[str, Tensor], step: float | Tensor, **options: Any) -> Tensor:
        return projected.sign()
