"""Loading a checkpoint as it is: torch's base class casts states to their parameters' dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .dense import MOMENTS


def load_uncast(
    optimizer: Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    *,
    check: Callable[[dict[str, Any]], dict[str, Any]],
    restore: Callable[[dict[str, Any]], None],
) -> None:
    """`load` is torch's load_state_dict. `check` gets the dict that it will take, and gives it completed or raises; `restore` gets that one
    afterwards, to put states back as they were saved. Hooks of the user run as with torch's: before `check`, and after `restore`.
    """
    final: dict[str, Any] = {}

    def before(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:  # after the user's own hooks, which may replace the dict
        final.update(check(incoming))
        return final

    def after(_: Optimizer) -> None:  # runs before the user's own hooks
        restore(final)

    handles = (
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    )
    try:
        load(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def restore_dense(state: dict[str, Any], saved: dict[str, Any], param: Tensor) -> None:
    """The loaded state of a parameter that torch's AdamW moves, in memory of its own and in the parameter's strides; its fused kernel wants
    `step` beside it."""
    for key, value in saved.items():
        if isinstance(value, Tensor):
            if key in MOMENTS:
                state[key] = torch.empty_like(param).copy_(value.detach())
            else:
                state[key] = value.detach().to(param.device, copy=True)


def check_dense(state: dict[str, Any], param: Tensor, where: str) -> None:
    """Raises ValueError for a checkpoint's state of a parameter that torch's AdamW moves, if it can be none."""
    check_tensors(state, ("step", *MOMENTS), where)
    check_step(state["step"], where)
    for key in MOMENTS:
        if state[key].shape != param.shape:
            raise ValueError(
                f"the checkpoint's {key} is {tuple(state[key].shape)}, expected {tuple(param.shape)} ({where}); it was saved for another "
                "model"
            )


def check_tensors(state: dict[str, Any], keys: Iterable[str], where: str) -> None:
    for key in keys:
        if key not in state:
            raise ValueError(f"the checkpoint's {key} is missing ({where}); it was saved for another model or another optimizer")
        if not isinstance(state[key], Tensor):
            raise ValueError(f"the checkpoint's {key} must be a tensor, got {state[key]!r} ({where}); the checkpoint is damaged")


def check_step(step: Any, where: str) -> None:
    """A count of updates: a number, or a tensor that holds one."""
    if isinstance(step, Tensor):
        single = step.numel() == 1 and not step.is_complex()
        number = step.item() if single and step.device.type != "meta" else step
    else:
        number = step
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not (number >= 0 and float(number).is_integer()):
        raise ValueError(f"the checkpoint's step must be a whole number ≥ 0, got {step!r} ({where}); the checkpoint is damaged")
