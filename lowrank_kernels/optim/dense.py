"""Groups without `rank`: torch's own functional AdamW, fused where torch has a fused kernel for the parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

FUSED_DEVICES = ("cpu", "cuda")


def dense_adamw_step_(
    group: dict[str, Any], states: dict[Tensor, dict[str, Any]], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """The update of torch.optim.AdamW(fused=True), bit for bit, with the same state: step, exp_avg, exp_avg_sq.

    Where no fused kernel exists (complex parameters, other devices) torch picks its default, and a GradScaler's skipped step costs a
    host sync.
    """
    params = [param for param in dict.fromkeys(group["params"]) if param.grad is not None]
    fused = [param for param in params if param.is_floating_point() and param.device.type in FUSED_DEVICES]
    plain = [param for param in params if not (param.is_floating_point() and param.device.type in FUSED_DEVICES)]
    if fused:
        _adamw_(fused, group, states, fused=True, grad_scale=grad_scale, found_inf=found_inf)
    if plain and not (found_inf is not None and found_inf.item()):
        if grad_scale is not None:
            for param in plain:
                param.grad.div_(grad_scale.to(param.device))
        _adamw_(plain, group, states, fused=False)


def _adamw_(
    params: list[Tensor],
    group: dict[str, Any],
    states: dict[Tensor, dict[str, Any]],
    fused: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    fresh = {param: _new_state(param, fused or (group["capturable"] and param.is_cuda)) for param in params if not states.get(param)}
    current = [fresh.get(param) or states[param] for param in params]
    adamw(
        params,
        [param.grad for param in params],
        [state["exp_avg"] for state in current],
        [state["exp_avg_sq"] for state in current],
        [],
        [state["step"] for state in current],
        fused=fused or None,
        # A fused kernel is capturable anyway, and on a CPU there is nothing to capture.
        capturable=group["capturable"] and not fused and all(param.is_cuda for param in params),
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
    for param, state in fresh.items():
        states[param] = state


def _new_state(param: Tensor, count_on_device: bool) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device if count_on_device else "cpu"),
        "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
    }
