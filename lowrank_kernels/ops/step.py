"""The step's operators over a bucket: schemas, fakes, dispatch. Formulas and shapes: reference.py.

A bucket is a list of matrices of equal shape, dtype and strides; the projected and the normalised gradients of all of them stand
in one (batch, r, n) tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..kernels import cpu
from . import dispatch


def _project_default(bases: list[Tensor], grads: list[Tensor], right: bool) -> Tensor:
    return torch.stack([reference.project(basis, grad, right) for basis, grad in zip(bases, grads, strict=True)])


def _project_fake(bases: list[Tensor], grads: list[Tensor], right: bool) -> Tensor:
    basis, grad = bases[0], reference.orient(grads[0], right)
    torch._check(len(bases) == len(grads), lambda: f"{len(bases)} bases do not fit {len(grads)} grads")
    torch._check(
        basis.shape[0] == grad.shape[0],
        lambda: f"basis {tuple(basis.shape)} does not fit grad {tuple(grads[0].shape)} with right={right}",
    )
    return basis.new_empty(len(bases), basis.shape[1], grad.shape[1], dtype=reference.compute_dtype(basis, grad))


def _project_cuda(bases: list[Tensor], grads: list[Tensor], right: bool) -> Tensor:
    if not dispatch.triton_covers(bases[0], grads[0]):
        return _project_default(bases, grads, right)
    from ..kernels import project

    return project.project(bases, grads, right)


def _update_moments_default(
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    projected: Tensor,
    *,
    step: int,
    found_inf: Tensor | None = None,
    device_steps: Sequence[Tensor] | None = None,
    **scalars,
) -> Tensor:
    _check_moments(exp_avgs, exp_avg_sqs, projected)
    counts = [count.double() + 1 for count in device_steps] if device_steps else [step] * len(exp_avgs)
    normalised = []
    for exp_avg, exp_avg_sq, r, count in list(zip(exp_avgs, exp_avg_sqs, projected, counts, strict=True)):  # all or none
        with reference.kept_where(found_inf, [exp_avg, exp_avg_sq]):
            normalised.append(reference.update_moments_(exp_avg, exp_avg_sq, r, step=count, **scalars))
    return torch.stack(normalised)


def _check_moments(exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], projected: Tensor) -> None:
    torch._check(
        exp_avgs[0].shape == exp_avg_sqs[0].shape == projected.shape[1:],
        lambda: (
            f"exp_avg {tuple(exp_avgs[0].shape)} and exp_avg_sq {tuple(exp_avg_sqs[0].shape)} do not fit projected {tuple(projected.shape)}"
        ),
    )


def _update_moments_fake(exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], projected: Tensor, **scalars) -> Tensor:
    _check_moments(exp_avgs, exp_avg_sqs, projected)
    return torch.empty_like(projected, memory_format=torch.contiguous_format)


def _update_moments_cuda(exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], projected: Tensor, **scalars) -> Tensor:
    if not dispatch.triton_covers(projected):
        return _update_moments_default(exp_avgs, exp_avg_sqs, projected, **scalars)
    from ..kernels import moments

    normalised = moments.update_moments_(exp_avgs, exp_avg_sqs, projected, out=torch.empty_like(projected), **scalars)
    dispatch.written(*exp_avgs, *exp_avg_sqs)
    return normalised


def _back_project_default(
    weights: list[Tensor],
    bases: list[Tensor],
    normalised: Tensor,
    *,
    right: bool,
    found_inf: Tensor | None = None,
    rounding_seeds: Tensor | None = None,
    device_steps: Sequence[Tensor] | None = None,
    **scalars,
) -> None:
    _check_back_project(weights, bases, normalised, right)
    seeds = [None] * len(weights) if rounding_seeds is None else rounding_seeds.split(1)
    counts = [count.double() + 1 for count in device_steps] if device_steps else [1] * len(weights)
    for weight, basis, update, seed, count in list(zip(weights, bases, normalised, seeds, counts, strict=True)):  # all or none
        with reference.kept_where(found_inf, [weight]):
            reference.back_project_(weight, basis, update, right=right, rounding_seed=seed, step=count, **scalars)


def _check_back_project(weights: list[Tensor], bases: list[Tensor], normalised: Tensor, right: bool) -> None:
    weight = reference.orient(weights[0], right)
    torch._check(
        weight.shape == (bases[0].shape[0], normalised.shape[2]) and bases[0].shape[1] == normalised.shape[1],
        lambda: (
            f"weight {tuple(weights[0].shape)}, basis {tuple(bases[0].shape)} and normalised {tuple(normalised.shape)} do not fit "
            f"with right={right}"
        ),
    )


def _back_project_fake(weights: list[Tensor], bases: list[Tensor], normalised: Tensor, *, right: bool, **scalars) -> None:
    _check_back_project(weights, bases, normalised, right)


def _back_project_cuda(weights: list[Tensor], bases: list[Tensor], normalised: Tensor, **scalars) -> None:
    if not dispatch.triton_covers(weights[0], bases[0], normalised):
        return _back_project_default(weights, bases, normalised, **scalars)
    from ..kernels import back_project

    back_project.back_project_(weights, bases, normalised, **scalars)
    dispatch.written(*weights)


def _adamw_step_fake(
    weights: list[Tensor],
    grads: list[Tensor],
    bases: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    right: bool,
    **scalars,
) -> None:
    projected = _project_fake(bases, grads, right)
    _check_moments(exp_avgs, exp_avg_sqs, projected)
    _check_back_project(weights, bases, projected, right)


def _adamw_step_cuda(
    weights: list[Tensor],
    grads: list[Tensor],
    bases: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    vouched: tuple[str, ...] = (),
    **rest,
) -> None:
    states = [*exp_avgs, *exp_avg_sqs, *(exp_avg_scales or ()), *(exp_avg_sq_scales or ())]
    rest |= {"exp_avg_scales": exp_avg_scales, "exp_avg_sq_scales": exp_avg_sq_scales}
    if not dispatch.triton_covers(weights[0], grads[0], bases[0], exp_avg_scales[0] if exp_avg_scales else exp_avgs[0]):
        return reference.adamw_step_(weights, grads, bases, exp_avgs, exp_avg_sqs, **rest)
    from ..kernels import adamw_step

    adamw_step.adamw_step_(weights, grads, bases, exp_avgs, exp_avg_sqs, **rest, vouched=vouched)
    dispatch.written(*weights, *states)


project = dispatch.define("project", "(Tensor[] bases, Tensor[] grads, bool right) -> Tensor", _project_fake, _project_default)
update_moments_ = dispatch.define(
    "update_moments_",
    "(Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_sqs, Tensor projected, *, float beta1, float beta2, float eps, int step, "
    "Tensor? found_inf=None, Tensor[]? device_steps=None) -> Tensor",
    _update_moments_fake,
    _update_moments_default,
)
back_project_ = dispatch.define(
    "back_project_",
    "(Tensor(a!)[] weights, Tensor[] bases, Tensor normalised, *, float lr, float scale, float weight_decay, bool right, "
    "Tensor? found_inf=None, Tensor? rounding_seeds=None, Tensor[]? device_steps=None) -> ()",
    _back_project_fake,
    _back_project_default,
)
adamw_step_ = dispatch.define(
    "adamw_step_",
    "(Tensor(a!)[] weights, Tensor[] grads, Tensor[] bases, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, *, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, float scale, int step, bool right, Tensor? found_inf=None, "
    "Tensor? device_lr=None, Tensor[]? device_steps=None, Tensor(d!)[]? exp_avg_scales=None, Tensor(e!)[]? exp_avg_sq_scales=None, "
    "Tensor? rounding_seeds=None) -> ()",
    _adamw_step_fake,
    reference.adamw_step_,
)
CUDA = {
    "project": _project_cuda,
    "update_moments_": _update_moments_cuda,
    "back_project_": _back_project_cuda,
    "adamw_step_": _adamw_step_cuda,
}
"""What each operator runs on a CUDA device."""
for _name, _cuda in CUDA.items():
    dispatch.register(_name, "cpu", getattr(cpu, _name))
    dispatch.register(_name, "cuda", _cuda)

_direct_cuda = functools.partial(_adamw_step_cuda, vouched=("weights", "grads"))
DIRECT = {} if dispatch.REFERENCE_FORCED else {"cpu": cpu.adamw_step_, "cuda": _direct_cuda}
"""What the operator adamw_step_ runs on a device, for a caller whose weights and gradients are known to be buckets."""


def run_adamw_step_(weights: list[Tensor], *lists: list[Tensor], **options) -> None:
    """adamw_step_ for the optimizers: the same without the dispatcher, which takes 0.15 ms to carry the lists of 224 matrices across,
    and without another look at what makes their weights and gradients a bucket.

    Tensor subclasses and dispatch modes (fake tensors, loggers) go the operator's way.
    """
    weight = weights[0]
    direct = DIRECT.get(weight.device.type)
    if direct is None or type(weight) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack():
        direct = adamw_step_
    direct(weights, *lists, **options)
