"""AdamW's step on plain lists of tensors with all its numbers as arguments, for tests, cases and
comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank_kernels.backends import Bucket, Hyper, reference
from lowrank_kernels.lifts.back_projection import BackProjection
from lowrank_kernels.rules.adamw import AdamW
from lowrank_kernels.storage import EightBit, Plain, eight_bit


def update_moments_(m: Tensor, v: Tensor, r: Tensor, *, beta1: float, beta2: float, eps: float, step: float | Tensor) -> Tensor:
    """N of R (…, r, n). M and V are updated in place."""
    return AdamW().update(r, {"exp_avg": m, "exp_avg_sq": v}, step, betas=(beta1, beta2), eps=eps)


def updated_weight(
    weight: Tensor, basis: Tensor, normalised: Tensor, *, lr: float | Tensor, scale: float, weight_decay: float, right: bool
) -> Tensor:
    """(1 − lr·wd)·W' − lr·α·P·N in the stored orientation, not rounded yet."""
    updated = weight.to(reference.compute_dtype(weight, normalised), copy=True)
    back_project_(updated, basis, normalised, lr=lr, scale=scale, weight_decay=weight_decay, right=right)
    return updated


def back_project_(weight: Tensor, basis: Tensor, normalised: Tensor, *, right: bool, **numbers: float | Tensor) -> None:
    """W' = (1 − lr·wd)·W' − lr·α·P·N in place."""
    dtype = reference.compute_dtype(weight, normalised)
    reference.move_(weight, BackProjection().direction(basis.to(dtype), normalised.to(dtype)), right=right, **numbers)


def bucket_of(
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
    right: bool,
    step: int = 1,
    found_inf: Tensor | None = None,
    device_lr: Tensor | None = None,
    device_steps: Sequence[Tensor] | None = None,
    exp_avg_scales: list[Tensor] | None = None,
    exp_avg_sq_scales: list[Tensor] | None = None,
    rounding_seeds: Tensor | None = None,
) -> tuple[Bucket, Hyper]:
    """A bucket, checked as the optimizer checks what it makes. step: the number of this update, used where
    there are no device_steps, which hold one less."""
    states = dict(zip(eight_bit.MOMENTS, (exp_avgs, exp_avg_sqs), strict=True))
    if exp_avg_scales:
        states |= dict(zip(eight_bit.SCALES, (exp_avg_scales, exp_avg_sq_scales), strict=True))
    steps = device_steps or [torch.tensor(step - 1.0, device=weights[0].device) for _ in weights]
    bucket = Bucket(weights, bases, states, list(steps), right, grads=grads, found_inf=found_inf, rounding_seeds=rounding_seeds)
    storage = EightBit() if exp_avg_scales else Plain()
    options = {"betas": (beta1, beta2), "eps": eps}
    hyper = Hyper(AdamW(), BackProjection(), storage, lr if device_lr is None else device_lr, scale, weight_decay, options)
    bucket.check(hyper)
    return bucket, hyper


def adamw_step_(*lists: list[Tensor], run: Callable[[Bucket, Hyper], None] = reference.step, **options) -> None:
    """One step on weights, grads, bases, exp_avgs, exp_avg_sqs; see bucket_of."""
    run(*bucket_of(*lists, **options))
