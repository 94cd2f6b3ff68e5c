"""The step's formulas in plain PyTorch: the truth that every kernel is tested against, and what runs where there is no kernel.

Orientation. G' = G on the left side and Gᵀ on the right, of shape (m, n); likewise W'. P is (m, r); R, M, V, N are (r, n) on
both sides. Every function takes one matrix or a batch (…, rows, cols) and any float dtype. Arithmetic runs in the widest dtype
of its inputs and at least fp32, and rounds once, when the result is stored. In fp64 these functions are exact enough to judge
everything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import eight_bit
from .rounding import round_stochastically


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


def update_moments_(
    exp_avg: Tensor, exp_avg_sq: Tensor, projected: Tensor, *, beta1: float, beta2: float, eps: float, step: int | Tensor
) -> Tensor:
    """M = β1·M + (1−β1)·R and V = β2·V + (1−β2)·R² in place; returns N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε), as torch.optim.AdamW.

    All (…, r, n). `step` is t, the number of this update, from 1.
    """
    exp_avg.mul_(beta1).add_(projected, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
    return (exp_avg / (1 - beta1**step)) / ((exp_avg_sq / (1 - beta2**step)).sqrt() + eps)


@contextlib.contextmanager
def kept_where(found_inf: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """What is written to `tensors` inside is undone where found_inf ≠ 0, without asking the device."""
    before = [] if found_inf is None else [tensor.clone() for tensor in tensors]
    yield
    for tensor, kept in zip(tensors, before, strict=False):
        tensor.copy_(torch.where(found_inf.to(tensor.device) != 0, kept, tensor))


def updated_weight(
    weight: Tensor, basis: Tensor, normalised: Tensor, *, lr: float | Tensor, scale: float, weight_decay: float, right: bool
) -> Tensor:
    """(1 − lr·wd)·W' − lr·α·P·N, not rounded yet: weight as stored; basis (…, m, r); normalised (…, r, n)."""
    dtype = compute_dtype(weight, normalised)
    update = basis.to(dtype) @ normalised.to(dtype)
    return (1 - lr * weight_decay) * weight.to(dtype) - (lr * scale) * orient(update, right)


def back_project_(
    weight: Tensor,
    basis: Tensor,
    normalised: Tensor,
    *,
    lr: float | Tensor,
    scale: float,
    weight_decay: float,
    right: bool,
    rounding_seed: Tensor | None = None,
    step: int | Tensor | None = None,
) -> None:
    """W' = (1 − lr·wd)·W' − lr·α·P·N in place: decay first, one rounding. weight as stored; basis (…, m, r); normalised (…, r, n).

    rounding_seed: (1,) int64, for one bf16 weight rounded stochastically at update number `step`.
    """
    updated = updated_weight(weight, basis, normalised, lr=lr, scale=scale, weight_decay=weight_decay, right=right)
    weight.copy_(updated if rounding_seed is None else round_stochastically(updated, rounding_seed, step))


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
    device_lr: Tensor | None = None,
    device_steps: Sequence[Tensor] | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    rounding_seeds: Tensor | None = None,
) -> None:
    """One AdamW step in the subspace for each matrix of a bucket, in place on weights and moments. Nothing moves where found_inf ≠ 0.

    device_lr: one fp32 element instead of lr. device_steps: for each matrix one fp32 element, the updates it has had before this
    one, instead of step − 1. exp_avg_scales, exp_avg_sq_scales: the moments are 8-bit codes in blocks, see eight_bit.py; N comes
    from the new moments before they are coded again. rounding_seeds: (B,) int64, for bf16 weights rounded stochastically.
    """
    for index, (weight, grad, basis) in enumerate(zip(weights, grads, bases, strict=True)):
        state = [exp_avgs[index], exp_avg_sqs[index]]
        scales = [exp_avg_scales[index], exp_avg_sq_scales[index]] if exp_avg_scales else []
        count = device_steps[index].double() + 1 if device_steps else step
        with kept_where(found_inf, [weight, *state, *scales]):
            projected = project(basis, grad, right)
            exp_avg, exp_avg_sq = eight_bit.decode(*state, *scales, projected.dtype) if scales else state
            normalised = update_moments_(exp_avg, exp_avg_sq, projected, beta1=beta1, beta2=beta2, eps=eps, step=count)
            if scales:
                eight_bit.encode_(exp_avg, exp_avg_sq, *state, *scales)
            rate = lr if device_lr is None else device_lr.double().reshape(())
            seed = None if rounding_seeds is None else rounding_seeds[index : index + 1]
            options = dict(scale=scale, weight_decay=weight_decay, right=right, rounding_seed=seed, step=count)
            back_project_(weight, basis, normalised, lr=rate, **options)
