"""What is compared: this package and the strongest things a user could pick instead, each skipped with a reason where it is missing.

A step contender is `build(params, rank) -> step()`. Gradients are set, and no step after the first one refreshes. All contenders of a
case share the parameters: a large model would not fit several times, and what a weight holds does not change the time of a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lowrank_kernels as lrk
from lowrank_kernels import reference

NEVER = 10**9
"""A gap between refreshes that no benchmark reaches."""
LR, SCALE = 1e-4, 0.25

Step = Callable[[], object]


def ours(params: list[nn.Parameter], rank: int) -> Step:
    return low_rank_optimizer(params, rank).step


def low_rank_optimizer(params: list[nn.Parameter], rank: int) -> lrk.LowRankAdamW:
    """After its first step, which chose the bases."""
    group = {"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": SCALE, "power_iters": 0}
    optimizer = lrk.GaLoreAdamW([group], lr=LR)
    optimizer.step()
    return optimizer


def formulas(params: list[nn.Parameter], rank: int) -> Step:
    """The reference's formulas typed in, one matrix after another: what plain PyTorch code does."""
    states = []
    for param in params:
        m, n = sorted(param.shape)
        r = min(rank, m)
        basis = torch.linalg.qr(torch.randn(m, r, device=param.device))[0].to(param.dtype)
        states.append((basis, *(torch.zeros(r, n, device=param.device) for _ in range(2))))
    count = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal count
        count += 1
        for param, (basis, exp_avg, exp_avg_sq) in zip(params, states, strict=True):
            right = param.shape[0] >= param.shape[1]
            projected = reference.project(basis, param.grad, right)
            update = reference.update_moments_(exp_avg, exp_avg_sq, projected, beta1=0.9, beta2=0.999, eps=1e-8, step=count)
            reference.back_project_(param, basis, update, lr=LR, scale=SCALE, weight_decay=0.0, right=right)

    return step


def galore_torch(params: list[nn.Parameter], rank: int) -> Step:
    logging.disable(logging.WARNING)  # an import of its dependencies complains of missing extras
    try:
        from galore_torch import GaLoreAdamW
    finally:
        logging.disable(logging.NOTSET)
    group = {"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": SCALE, "proj_type": "std"}
    optimizer = GaLoreAdamW([group], lr=LR, no_deprecation_warning=True)
    return optimizer.step


def adamw_fused(params: list[nn.Parameter], rank: int) -> Step:
    """Full-rank AdamW: the cost of not projecting at all. Its states have the weights' dtype."""
    return torch.optim.AdamW(params, lr=LR, fused=True).step


STEP_CONTENDERS: dict[str, Callable[[list[nn.Parameter], int], Step]] = {
    "lowrank_kernels": ours,
    "galore-torch": galore_torch,
    "formulas in PyTorch": formulas,
    "AdamW(fused=True), full rank": adamw_fused,
}


def refresh_contenders(grad: Tensor, rank: int) -> dict[str, Step]:
    return {
        "lowrank_kernels": lambda: lrk.ops.range_finder(grad, rank),
        "torch.svd_lowrank": lambda: torch.svd_lowrank(grad, q=rank, niter=1),
        "torch.linalg.svd": lambda: torch.linalg.svd(grad, full_matrices=False),
    }


def make_params(shapes: list[tuple[int, int]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Weights and gradients of a model, the same for every contender."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        param = nn.Parameter((torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype))
        param.grad = (torch.randn(shape, generator=generator, device=device) * 0.01).to(dtype)
        params.append(param)
    return params


@torch.no_grad()
def check_step(shapes: list[tuple[int, int]], rank: int, dtype: torch.dtype, device: str) -> float:
    """‖ΔW − exact ΔW‖ / ‖exact ΔW‖ of one step of ours, the worst over shapes, against fp64 on the basis that it chose."""
    worst = 0.0
    for shape in sorted(set(shapes)):
        params = make_params([shape] * 2, dtype, device)
        optimizer = low_rank_optimizer(params, rank)
        before = [param.detach().double().clone() for param in params]
        states = [{key: value.double().clone() for key, value in optimizer.state[p].items() if key != "step"} for p in params]
        optimizer.param_groups[0]["lr"] = 1.0  # so that the update is not lost in the weight's rounding
        optimizer.step()
        for param, weight, state in zip(params, before, states, strict=True):
            exact = weight.clone()
            reference.adamw_step_(
                [exact],
                [param.grad.double()],
                [state["basis"]],
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                lr=1.0,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.0,
                scale=SCALE,
                step=2,
                right=shape[0] >= shape[1],
            )
            worst = max(worst, ((param.double() - exact).norm() / (exact - weight).norm()).item())
    return worst
