"""The launches of a step's parts on plain lists of tensors, with all numbers as arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_kernels.backends.bucket import Bucket, Hyper
from lowrank_kernels.backends.triton import composed, moments, table
from lowrank_kernels.backends.triton import project as projection
from lowrank_kernels.lifts.back_projection import BackProjection
from lowrank_kernels.rules.adamw import AdamW
from lowrank_kernels.storage import Plain, eight_bit


def hyper_of(lr=0.0, scale=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8) -> Hyper:
    return Hyper(AdamW(), BackProjection(), Plain(), lr, scale, weight_decay, {"betas": (beta1, beta2), "eps": eps})


def counts(step: int, like: Sequence[Tensor]) -> list[Tensor]:
    """The counters before update number `step`."""
    return [torch.tensor(step - 1.0, device=like[0].device) for _ in like]


def project(bases: list[Tensor], grads: list[Tensor], right: bool) -> Tensor:
    """R (B, r, n)."""
    bucket = Bucket(grads, bases, {}, counts(1, bases), right, grads=grads)
    return projection.launch(bucket, table.rows_of(bucket))


def update_moments_(
    *states: list[Tensor], projected: Tensor, out: Tensor | None = None, step: int = 1, device_steps: list[Tensor] | None = None,
    found_inf: Tensor | None = None, **adam: float,
) -> Tensor:  # fmt: skip
    """N, into `out` or over R. states: exp_avgs and exp_avg_sqs, and their scales for 8-bit ones."""
    count, rank, n = projected.shape
    names = (*eight_bit.MOMENTS, *eight_bit.SCALES)
    nothing = torch.empty((1, max(rank, n)), dtype=torch.float32, device=projected.device)
    bucket = Bucket(
        [nothing[:, :n]] * count, [nothing[:, :rank]] * count, dict(zip(names, states, strict=False)),
        device_steps or counts(step, states[0]), False, projected=list(projected.unbind()), found_inf=found_inf,
    )  # fmt: skip
    out = projected if out is None else out
    moments.launch(bucket, hyper_of(**adam), table.rows_of(bucket), out)
    return out


def back_project_(
    weights: list[Tensor], bases: list[Tensor], normalised: Tensor, *, right: bool, lr: float = 0.0, device_lr: Tensor | None = None,
    scale: float, weight_decay: float, found_inf: Tensor | None = None, rounding_seeds: Tensor | None = None,
    device_steps: list[Tensor] | None = None, step: int = 1,
) -> None:  # fmt: skip
    bucket = Bucket(
        weights, bases, {}, device_steps or counts(step, weights), right, grads=weights, found_inf=found_inf, rounding_seeds=rounding_seeds
    )
    hyper = hyper_of(lr if device_lr is None else device_lr, scale, weight_decay)
    composed.lift(bucket, hyper, normalised)
