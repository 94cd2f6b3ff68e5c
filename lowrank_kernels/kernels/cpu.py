"""The step on a CPU, in plain PyTorch, over a bucket of equal shapes.

Same formulas as reference.py. What makes it faster: half precision is multiplied in fp32 (bf16 products are emulated where the
CPU has no native ones, and their results would be rounded to bf16); small matrices are stacked into one batched product; moments
go through torch's fused AdamW kernel, one pass over memory; fp32 weights take decay and update in the product itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

STACK_BELOW = 256 * 256
"""Elements of a matrix up to which copying the bucket into one stack costs less than a product call for each (benchmarks/NOTES.md)."""


def project(bases: list[Tensor], grads: list[Tensor], right: bool) -> Tensor:
    """R = PᵀG' for each matrix: (m, r) bases, gradients as stored → (batch, r, n) fp32 (fp64 for fp64)."""
    dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    oriented = [grad.mT if right else grad for grad in grads]
    if len(grads) > 1 and grads[0].numel() <= STACK_BELOW:
        return torch.stack(bases).to(dtype).mT @ torch.stack(oriented).to(dtype)
    projected = torch.empty(len(grads), bases[0].shape[-1], oriented[0].shape[-1], dtype=dtype)
    for out, basis, grad in zip(projected, bases, oriented, strict=True):
        torch.mm(basis.mT.to(dtype), grad.to(dtype), out=out)
    return projected


def update_moments_(
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], projected: Tensor, *, beta1: float, beta2: float, eps: float, step: int
) -> Tensor:
    """Moments in place; returns N (batch, r, n). AdamW with lr 1 from zero weights moves them to exactly −N."""
    normalised = torch.zeros_like(projected)
    adamw(
        list(normalised.unbind()),
        list(projected.unbind()),
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.tensor(step - 1.0) for _ in exp_avgs],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=1.0,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
    return normalised.neg_()


def back_project_(
    weights: list[Tensor], bases: list[Tensor], normalised: Tensor, *, lr: float, scale: float, weight_decay: float, right: bool
) -> None:
    """W' = (1 − lr·wd)·W' − lr·α·P·N in place, one rounding."""
    decay, rate = 1 - lr * weight_decay, -lr * scale
    dtype = normalised.dtype
    oriented = [weight.mT if right else weight for weight in weights]
    if len(weights) > 1 and weights[0].numel() <= STACK_BELOW:
        stacked = torch.stack(oriented).to(dtype)
        stacked.baddbmm_(torch.stack(bases).to(dtype), normalised, beta=decay, alpha=rate)
        torch._foreach_copy_(oriented, list(stacked.unbind()))
        return
    for weight, basis, update in zip(oriented, bases, normalised, strict=True):
        if weight.dtype == dtype:
            weight.addmm_(basis.to(dtype), update, beta=decay, alpha=rate)
        else:
            weight.copy_(weight.to(dtype).addmm_(basis.to(dtype), update, beta=decay, alpha=rate))


def adamw_step_(
    weights: list[Tensor],
    grads: list[Tensor],
    bases: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    step: int,
    right: bool,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step in the subspace for each matrix of a bucket; see reference.adamw_step_."""
    if found_inf is not None and found_inf.item():  # on a CPU reading it costs nothing
        return
    projected = project(bases, grads, right)
    normalised = update_moments_(exp_avgs, exp_avg_sqs, projected, beta1=beta1, beta2=beta2, eps=eps, step=step)
    back_project_(weights, bases, normalised, lr=lr, scale=scale, weight_decay=weight_decay, right=right)
