"""The step of groups without `rank`: torch's own functional AdamW. Its fused kernel is used where the
kernel's result is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..backends.reference import kept_where
from ..sharded import is_sharded, local

FUSED_DEVICES = ("cpu", "cuda")
MOMENTS = ("exp_avg", "exp_avg_sq")


def dense_adamw_step_(
    group: dict[str, Any], states: dict[Tensor, dict[str, Any]], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """The update of torch.optim.AdamW(fused=True), bit for bit, with the same state: step, exp_avg,
    exp_avg_sq.

    torch's fused kernel pairs elements by their place in memory. torch's default implementation is used
    instead in three cases: weight, gradient and moments have different strides; the weight has gaps in
    memory; or there is no fused kernel (complex parameters, other devices).
    """
    params = [param for param in dict.fromkeys(group["params"]) if param.grad is not None]
    part = local if any(map(is_sharded, params)) else _itself
    current = {param: states.get(param) or _new_state(param, group.get("capturable", False)) for param in params}
    fused, plain, counted_on_host = [], [], []
    for param, state in current.items():
        if part is local and is_sharded(param) and param.grad.placements != param.placements:
            param.grad = param.grad.redistribute(placements=param.placements)
        if (state["exp_avg"].dtype, state["exp_avg"].device) != (param.dtype, param.device):  # the model was cast or moved
            state |= {key: torch.empty_like(param).copy_(state[key]) for key in MOMENTS}
            state["step"] = state["step"].to(param.device)
        has_kernel = param.is_floating_point() and param.device.type in FUSED_DEVICES
        if has_kernel and _paired_in_memory(*map(part, (param, param.grad, *(state[key] for key in MOMENTS)))):
            fused.append(param)
        elif state["step"].is_cuda:
            plain.append(param)
        else:
            counted_on_host.append(param)
    if fused:
        _adamw_(fused, current, group, part, fused=True, grad_scale=grad_scale, found_inf=found_inf)
    for others in filter(None, (plain, counted_on_host)):
        if grad_scale is not None:
            for param in others:
                part(param.grad).div_(grad_scale.to(param.device))
        moving = list(map(part, [*others, *(current[param][key] for param in others for key in ("step", *MOMENTS))]))
        with kept_where(found_inf, moving):
            _adamw_(others, current, group, part, fused=False)
    states |= {param: state for param, state in current.items() if not states.get(param)}


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _adamw_(
    params: list[Tensor],
    states: dict[Tensor, dict[str, Any]],
    group: dict[str, Any],
    part: Callable[[Tensor], Tensor],
    fused: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    steps, exp_avgs, exp_avg_sqs = ([part(states[param][key]) for param in params] for key in ("step", *MOMENTS))
    adamw(
        list(map(part, params)),
        [part(param.grad) for param in params],
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=fused or None,
        # Without capturable, torch reads a count on a GPU on the host, which waits. The fused kernel never
        # does.
        capturable=not fused and steps[0].is_cuda,
        grad_scale=grad_scale,
        found_inf=found_inf,
        has_complex=any(torch.is_complex(param) for param in params),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _new_state(param: Tensor, capturable: bool) -> dict[str, Tensor]:
    on_device = param.is_cuda and (param.is_floating_point() or capturable)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu"),
        **{key: torch.zeros_like(param, memory_format=torch.preserve_format) for key in MOMENTS},
    }


def _paired_in_memory(param: Tensor, *others: Tensor) -> bool:
    """Whether equal places in memory hold the same element of all these tensors. The parameter's memory must
    also have no gaps and no overlaps."""
    if param.is_contiguous() and all(other.is_contiguous() for other in others):
        return True
    dimensions = [dimension for dimension, size in enumerate(param.shape) if size != 1]
    strides = [param.stride(dimension) for dimension in dimensions]
    if any([other.stride(dimension) for dimension in dimensions] != strides for other in others):
        return False
    following = 1
    for stride, dimension in sorted(zip(strides, dimensions, strict=True)):
        if stride != following:
            return False
        following *= param.shape[dimension]
    return True
