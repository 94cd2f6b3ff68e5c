"""The step's formulas in plain PyTorch: the truth that every kernel is tested against, and what runs where there is no kernel.

Orientation. G' = G on the left side and Gᵀ on the right, of shape (m, n); likewise W'. P is (m, r); R, M, V, N are (r, n) on
both sides. Every function takes one matrix or a batch (…, rows, cols) and any float dtype. Arithmetic runs in the widest dtype
of its inputs and at least fp32, and rounds once, when the result is stored. In fp64 these functions are exact enough to judge
everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def orient(matrix: Tensor, right: bool) -> Tensor:
    """G → G', W → W' (and back): the transpose, as a view, on the right side."""
    return matrix.mT if right else matrix


def project(basis: Tensor, grad: Tensor, right: bool) -> Tensor:
    """R = PᵀG'. basis (…, m, r); grad as stored → (…, r, n), fp32 (fp64 for fp64 inputs)."""
    dtype = compute_dtype(basis, grad)
    return basis.mT.to(dtype) @ orient(grad, right).to(dtype)


def update_moments_(exp_avg: Tensor, exp_avg_sq: Tensor, projected: Tensor, *, beta1: float, beta2: float, eps: float, step: int) -> Tensor:
    """M = β1·M + (1−β1)·R and V = β2·V + (1−β2)·R² in place; returns N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε), as torch.optim.AdamW.

    All (…, r, n). `step` is t, the number of this update, from 1.
    """
    exp_avg.mul_(beta1).add_(projected, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
    return (exp_avg / (1 - beta1**step)) / ((exp_avg_sq / (1 - beta2**step)).sqrt() + eps)


def back_project_(weight: Tensor, basis: Tensor, normalised: Tensor, *, lr: float, scale: float, weight_decay: float, right: bool) -> None:
    """W' = (1 − lr·wd)·W' − lr·α·P·N in place: decay first, one rounding. weight as stored; basis (…, m, r); normalised (…, r, n)."""
    dtype = compute_dtype(weight, normalised)
    update = basis.to(dtype) @ normalised.to(dtype)
    weight.copy_((1 - lr * weight_decay) * weight.to(dtype) - (lr * scale) * orient(update, right))


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
    """One AdamW step in the subspace for each matrix of a bucket, in place on weights and moments. Nothing moves where found_inf ≠ 0."""
    for weight, grad, basis, exp_avg, exp_avg_sq in zip(weights, grads, bases, exp_avgs, exp_avg_sqs, strict=True):
        kept = None if found_inf is None else [(t, t.clone()) for t in (weight, exp_avg, exp_avg_sq)]
        projected = project(basis, grad, right)
        normalised = update_moments_(exp_avg, exp_avg_sq, projected, beta1=beta1, beta2=beta2, eps=eps, step=step)
        back_project_(weight, basis, normalised, lr=lr, scale=scale, weight_decay=weight_decay, right=right)
        for tensor, before in kept or ():
            tensor.copy_(torch.where(found_inf.to(tensor.device) != 0, before, tensor))
