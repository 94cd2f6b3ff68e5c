"""Loading a checkpoint as it is: torch's base class casts states to their parameters' dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


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
    """The loaded state of a parameter that torch's AdamW moves, in memory of its own; its fused kernel wants `step` beside it."""
    for key, value in saved.items():
        if isinstance(value, Tensor):
            state[key] = value.detach().to(param.device, copy=True) if key == "step" else state[key].clone()
