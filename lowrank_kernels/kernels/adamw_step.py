"""One AdamW step in the subspace: R = PᵀG', moments and N, W' = (1 − lr·wd)·W' − lr·α·P·N.

Two passes over the big matrices: one reads G, the other reads and writes W; R and N go through memory between them.
"""

import torch
from torch import Tensor

from . import back_project, moments, project, table


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
    """The step in place on weights and moments of a bucket; shapes, dtypes and errors as project, update_moments_, back_project_.

    Where found_inf is non-zero, weights and moments keep their bits. No step of it synchronises with the device.
    """
    project.check(bases, grads, right)
    back_project.check(weights, bases, right, found_inf)
    moments.check_states(exp_avgs, exp_avg_sqs, step, found_inf)
    table.check_same_length(weights=weights, grads=grads, exp_avgs=exp_avgs)
    table.check_same_device(weights=weights, grads=grads, exp_avgs=exp_avgs)
    rank, n = bases[0].shape[1], grads[0].shape[0 if right else 1]
    if weights[0].shape != grads[0].shape or exp_avgs[0].shape != (rank, n):
        raise ValueError(
            f"weights {tuple(weights[0].shape)} and grads {tuple(grads[0].shape)} must share a shape, and exp_avgs "
            f"{tuple(exp_avgs[0].shape)} must be (r, n) = {(rank, n)}"
        )
    path = _choose_path()
    path(
        weights, grads, bases, exp_avgs, exp_avg_sqs, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        scale=scale, step=step, right=right, found_inf=found_inf,
    )  # fmt: skip


def _choose_path():
    """The implementation of a step; every one has the signature of adamw_step_."""
    return _two_pass_


def _two_pass_(weights, grads, bases, exp_avgs, exp_avg_sqs, *, lr, beta1, beta2, eps, weight_decay, scale, step, right, found_inf) -> None:
    """Three launches on one pointer table."""
    weights_at, grads_at, bases_at, exp_avgs_at, exp_avg_sqs_at = table.pointer_table(weights, grads, bases, exp_avgs, exp_avg_sqs)
    projected = project.launch(bases_at, grads_at, bases, grads, right)
    # The dot rounds N to the bases' dtype; stored in 16 bits it costs each strip of W half the traffic.
    out = projected if bases[0].dtype == torch.float32 else torch.empty_like(projected, dtype=bases[0].dtype)
    normalised = moments.launch(
        exp_avgs_at, exp_avg_sqs_at, exp_avgs, exp_avg_sqs, projected,
        beta1=beta1, beta2=beta2, eps=eps, step=step, found_inf=found_inf, out=out,
    )  # fmt: skip
    back_project.launch(
        weights_at, bases_at, weights, bases, normalised,
        lr=lr, scale=scale, weight_decay=weight_decay, right=right, found_inf=found_inf,
    )  # fmt: skip
