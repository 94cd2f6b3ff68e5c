"""Loads a checkpoint without casting its states. torch's base class would cast them to their parameters'
dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sharded import is_sharded
from ..subspaces import own_memory
from . import groups, keys
from .dense import MOMENTS


def load_uncast(
    optimizer: Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    *,
    check: Callable[[dict[str, Any]], dict[str, Any]],
    restore: Callable[[dict[str, Any]], None],
) -> None:
    """Loads `state_dict` with torch's checks and hooks, then puts the states back as they were saved.

    load: torch's load_state_dict. check: gets the dict that is about to be loaded; returns it completed, or
    raises. restore: gets the completed dict after `load` and puts the states back. The user's own hooks run
    as with torch: the pre-hooks before `check`, the post-hooks after `restore`.
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


def refuse_projectors(incoming: dict[str, Any]) -> None:
    if any("projector" in state for state in incoming["state"].values()):
        raise ValueError(
            "the checkpoint is one of galore-torch or its kin, whose states hold a projector; "
            "lowrank_kernels.integrations.galore_torch.load_checkpoint takes those of galore-torch"
        )


def complete_older(
    param_groups: list[dict[str, Any]], states: dict[Any, dict[str, Any]], missing: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Fills in what an older version did not save: missing keys, and when each basis was chosen.

    missing: group → keys that it may lack, with the values that they had in the older version. In that
    version each parameter counted its own steps, and refreshed where that count was a multiple of the gap.
    """
    for group in param_groups:
        counts = {key: _count(states[key]) for key in group["params"] if "basis" in states.get(key, ())}
        if groups.is_low_rank(group):
            group.setdefault("calls", max(counts.values(), default=0))
        for key, value in missing(group).items():
            group.setdefault(key, value)
        for key in counts:
            state = states[key]
            if "refreshed_at" not in state and counts[key] == 0:  # its only step was skipped, so its basis is a random one
                del states[key]
                continue
            state.setdefault("refreshed_at", max(group.get("calls", 0) - 1, 0))
            if isinstance(state.get("step"), int) and state["step"] >= 0 and isinstance(state["basis"], Tensor):
                state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device=state["basis"].device)


def _count(state: dict[str, Any]) -> int:
    step = state.get("step", 0)
    return int(step) if isinstance(step, (int, float, Tensor)) and step >= 0 and step < 2**53 else 0


def changes(group: dict[str, Any], saved: dict[str, Any], own: Iterable[keys.Key], index: int) -> list[str]:
    """One sentence for each of these keys whose value in the checkpoint's group differs from the
    optimizer's."""
    differing = (name for name in keys.names(own) if group[name] != saved[name])
    return [f"{name} {group[name]!r} becomes {saved[name]!r} (group {index})" for name in differing]


def check_low_rank(
    state: dict[str, Any], expected: dict[str, tuple[int, ...]], batch: Sequence[int], saved: dict[str, Any], where: str
) -> None:
    """Raises ValueError where a checkpoint's state cannot belong to this projected parameter.

    expected: the shapes for one matrix. batch: (experts,) or (). saved: the checkpoint's group.
    """
    if "step" not in state:
        raise ValueError(f"the checkpoint's step is missing ({where}); it was saved for another optimizer")
    check_step(state["step"], where)
    check_tensors(state, (key for key in expected if key in state), where)
    if isinstance(refreshed := state.get("refreshed_at"), bool) or not isinstance(refreshed, int) or refreshed < 0:
        raise ValueError(f"the checkpoint's refreshed_at must be an int ≥ 0, got {refreshed!r} ({where}); the checkpoint is damaged")
    found = {state[name].dtype for name in MOMENTS if name in expected and name in state}
    if found and (torch.uint8 in found) != (saved["state_bits"] == 8):
        raise ValueError(f"the checkpoint's moments are {found.pop()} but its state_bits are {saved['state_bits']} ({where})")
    for key, matrix in expected.items():
        wanted = (*batch, *matrix)
        found = tuple(state[key].shape) if key in state else None
        if found != wanted:
            raise ValueError(
                f"the checkpoint's {key} is {'missing' if found is None else found}, expected {wanted} ({where}); "
                "it was saved for another model or another optimizer"
            )


def restore_low_rank(state: dict[str, Any], saved: dict[str, Any], param: Tensor) -> None:
    """Puts the saved values into the loaded state of a projected parameter, uncast and in memory of their
    own."""
    for key, value in saved.items():
        if key == "step":
            state[key] = torch.tensor(float(value), dtype=torch.float32, device=param.device)
        elif key == "basis":
            state[key] = own_memory(value.detach().to(param.device))
        elif isinstance(value, Tensor):  # row-major: the step relies on it
            state[key] = value.detach().to(param.device, copy=True, memory_format=torch.contiguous_format)


def restore_dense(state: dict[str, Any], saved: dict[str, Any], param: Tensor) -> None:
    """Puts the saved values into the loaded state of a parameter that torch's AdamW moves, in memory of their
    own.

    The moments get the parameter's strides. `step` goes to the parameter's device, where torch's fused kernel
    wants it.
    """
    for key, value in saved.items():
        if isinstance(value, Tensor):
            if key in MOMENTS:
                state[key] = torch.empty_like(param).copy_(_as_sharded(value.detach(), param))
            else:
                state[key] = value.detach().to(param.device, copy=True)


def _as_sharded(value: Tensor, param: Tensor) -> Tensor:
    """The value as a DTensor like the parameter, or whole for a plain parameter."""
    if is_sharded(value):
        return value if is_sharded(param) else value.full_tensor()
    if not is_sharded(param):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(param.device), param.device_mesh, param.placements, src_data_rank=None)


def check_dense(state: dict[str, Any], param: Tensor, where: str) -> None:
    """Raises ValueError where a checkpoint's state cannot belong to this parameter, which torch's AdamW
    moves."""
    check_tensors(state, ("step", *MOMENTS), where)
    check_step(state["step"], where)
    for key in MOMENTS:
        if state[key].shape != param.shape:
            raise ValueError(
                f"the checkpoint's {key} is {tuple(state[key].shape)}, expected {tuple(param.shape)} ({where}); it was saved for another "
                "model"
            )


def check_tensors(state: dict[str, Any], needed: Iterable[str], where: str) -> None:
    for key in needed:
        if key not in state:
            raise ValueError(f"the checkpoint's {key} is missing ({where}); it was saved for another model or another optimizer")
        if not isinstance(state[key], Tensor):
            raise ValueError(f"the checkpoint's {key} must be a tensor, got {state[key]!r} ({where}); the checkpoint is damaged")


def check_step(step: Any, where: str) -> None:
    """Raises ValueError where `step` is no count of updates, which is a whole number or a tensor that holds
    one."""
    if isinstance(step, Tensor):
        single = step.numel() == 1 and not step.is_complex()
        number = step.item() if single and step.device.type != "meta" else step
    else:
        number = step
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not (number >= 0 and float(number).is_integer()):
        raise ValueError(f"the checkpoint's step must be a whole number ≥ 0, got {step!r} ({where}); the checkpoint is damaged")
