"""What is compared: this package and the strongest things a user could pick instead, each skipped with a reason where it is missing.

A step contender is `build(params, rank) -> step()`. Gradients are set, and no step after the first one refreshes. All contenders of a
case share the parameters: a large model would not fit several times, and what a weight holds does not change the time of a step. A
refresh contender finds one basis for each gradient.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lowrank_kernels as lrk
from lowrank_kernels import range_finder, reference

from . import shapes

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


def refresh_contenders(grads: list[Tensor], rank: int, exact: bool) -> dict[str, Callable[[], list[Tensor]]]:
    """Each returns a basis (…, m, r) for each of the gradients (…, m, n). A full SVD only where `exact`: a model takes it an hour."""
    arguments = (rank, shapes.OVERSAMPLE, shapes.POWER_ITERS)
    contenders = {
        "lowrank_kernels": lambda grad: lrk.ops.range_finder(grad, rank, oversample=shapes.OVERSAMPLE, power_iters=shapes.POWER_ITERS),
        "PyTorch version": lambda grad: range_finder.range_finder(grad, *arguments),
        "torch.svd_lowrank": lambda grad: torch.svd_lowrank(grad.float(), q=rank, niter=shapes.POWER_ITERS),  # it takes no bf16
        "torch.linalg.svd": lambda grad: torch.linalg.svd(grad.float(), full_matrices=False),
    }
    if not exact:
        del contenders["torch.linalg.svd"]
    return {name: lambda find=find: [find(grad)[0][..., :rank] for grad in grads] for name, find in contenders.items()}


CHECKED = ("lowrank_kernels", "PyTorch version")
"""Refresh contenders that must reach the bars below; of the others it is recorded what they reach."""
ORTHONORMAL, ENERGY = 1e-5, 0.95


def make_gradients(case: shapes.RefreshCase, device: str) -> list[Tensor]:
    """(count, m, n) for each chunk, m ≤ n; of a model as it stores them, so transposed where rows are more."""
    generator = torch.Generator(device).manual_seed(0)
    grads = []
    for count, rows, columns in case.chunks():
        grad = torch.randn(count, rows, columns, generator=generator, device=device)
        if case.spectrum == "1/i":
            terms = min(rows, columns, 4 * case.rank)
            left = torch.randn(count, rows, terms, generator=generator, device=device) / torch.arange(1, terms + 1, device=device)
            grad = grad.mul_(0.01).baddbmm_(left, torch.randn(count, terms, columns, generator=generator, device=device))
        grad = grad.to(case.dtype)
        grad = grad[0] if isinstance(case.model, tuple) else grad
        grads.append(grad.mT if rows > columns else grad)
    return grads


def first(batch: Tensor) -> Tensor:
    """The first matrix of a batch (count, m, n), or the only one (m, n), in fp64."""
    return (batch[0] if batch.dim() > 2 else batch).double()


@torch.no_grad()
def best_energies(grads: list[Tensor], rank: int) -> list[Tensor]:
    """Σ_{i≤r} σᵢ² of the first matrix of each batch."""
    return [torch.linalg.eigvalsh(first(grad) @ first(grad).mT)[-rank:].sum() for grad in grads]


@torch.no_grad()
def check_bases(bases: list[Tensor], grads: list[Tensor], best: list[Tensor]) -> tuple[float, float]:
    """In fp64: the largest ‖PᵀP − I‖₂ of all bases, and the smallest ‖PᵀG‖²_F / `best` of the first one of each batch."""
    defects, energies = [], []
    for basis, grad, most in zip(bases, grads, best, strict=True):
        identity = torch.eye(basis.shape[-1], dtype=torch.float64, device=basis.device)
        defects.append(torch.linalg.matrix_norm(basis.double().mT @ basis.double() - identity, ord=2).max().item())
        energies.append(((first(basis).mT @ first(grad)).square().sum() / most).item())
    return max(defects), min(energies)


def peak_bytes(run: Callable[[], list[Tensor]], on_gpu: bool) -> tuple[list[Tensor], int]:
    """What `run` returns, and the most bytes that were allocated while it ran, its results included.

    On a CPU by torch's profiler, which sees every allocation and release of torch's allocator on this thread, inside C++ operators too.
    It does not see what a BLAS, LAPACK or oneDNN packs in buffers of its own, nor tensors made inside worker threads.
    """
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or it prints when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return result, max(allocated, default=0)


def make_params(weights: list[tuple[int, int]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Weights and gradients of a model, the same for every contender."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in weights:
        param = nn.Parameter((torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype))
        param.grad = (torch.randn(shape, generator=generator, device=device) * 0.01).to(dtype)
        params.append(param)
    return params


@torch.no_grad()
def check_step(weights: list[tuple[int, int]], rank: int, dtype: torch.dtype, device: str) -> float:
    """‖ΔW − exact ΔW‖ / ‖exact ΔW‖ of one step of ours, the worst over shapes, against fp64 on the basis that it chose."""
    worst = 0.0
    for shape in sorted(set(weights)):
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
