"""What a parameter group may hold: its keys and its parameters. Every check of them that is possible at
construction is here."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..sharded import is_sharded, sharding_of
from . import keys

NAME = "_lowrank_kernels_name"
"""Attribute of a parameter that holds its name. The name stays with the parameter when a user or a framework
puts it into other groups or optimizers."""
ALL_KEYS = (*keys.LOW_RANK, keys.CALLS, *keys.ADAMW, keys.CAPTURABLE)
"""The keys of a low-rank group."""


def describe(group: dict[str, Any], group_index: int, param_index: int | None = None) -> str:
    """'group 1, parameter 'layers.0.q_proj.weight' of shape (512, 512)', for error messages."""
    if param_index is None:
        return f"group {group_index}"
    name = name_of(group, param_index)
    shown = str(param_index) if name is None else repr(name)
    return f"group {group_index}, parameter {shown} of shape {tuple(group['params'][param_index].shape)}"


def name_of(group: dict[str, Any], param_index: int) -> str | None:
    """The parameter's name from the group's `param_names`, else the one that `lowrank_kernels.param_groups`
    gave it, else None."""
    if names := group.get("param_names"):
        return names[param_index]
    return getattr(group["params"][param_index], NAME, None)


def is_low_rank(group: dict[str, Any]) -> bool:
    return "rank" in group


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """(rows, columns) of the matrices that a parameter stands for. A 2-D parameter is one matrix; [experts,
    m, n] is a batch of matrices; a parameter with more dimensions is read as [out, -1]."""
    if param.dim() == 3:
        return param.shape[1], param.shape[2]
    return param.shape[0], math.prod(param.shape[1:])


def is_right(param: Tensor, proj_type: str) -> bool:
    """Whether the right side is projected. `std` projects the shorter side, and the right side of a square
    matrix. `unsharded` projects the side along which a DTensor is not cut, and is `std` elsewhere."""
    rows, columns = matrix_shape(param)
    if proj_type == "unsharded":
        cut = sharding_of(param).matrix_dim if is_sharded(param) else None
        if cut is not None:
            return cut == 0
        proj_type = "std"
    if proj_type == "std":
        return rows >= columns
    if proj_type == "reverse_std":
        return rows < columns
    return proj_type == "right"


def last_refresh(group: dict[str, Any], place: int, calls: int) -> tuple[int, int]:
    """(step, number) of the last refresh that was due for parameter number `place`, at or before step `calls`
    of the group.

    Without `stagger` a refresh is due where calls mod gap = 0. With `stagger` parameter i of k refreshes
    where calls mod gap = ⌊i·gap / k⌋. Every remainder below gap then belongs to ⌊k / gap⌋ or ⌈k / gap⌉
    parameters. k counts all parameters of the group, with a gradient or without. The step is negative where
    no refresh was due yet. All random draws of a refresh are keyed by its number, which is 0 for a basis of
    the first period.
    """
    gap = group["update_proj_gap"]
    offset = place * gap // len(group["params"]) if group["stagger"] else 0
    number = (calls - offset) // gap
    return number * gap + offset, number + (offset > 0)


def complete(group: dict[str, Any], group_index: int, own: tuple[keys.Key, ...], fixed: dict[str, Any], preferred: dict[str, Any]) -> None:
    """Fills a low-rank group's missing keys with their defaults. Raises ValueError or TypeError for keys,
    values and parameters that cannot work.

    own: keys that only this class has. fixed: values that it prescribes. preferred: its own defaults. A group
    without `rank` gets only the checks of AdamW's keys and of `own`.
    """
    where = describe(group, group_index)
    check_names(group, group_index, keys.names((*ALL_KEYS, *own)))
    if is_low_rank(group):
        for name, value in (keys.defaults((*keys.LOW_RANK, keys.CALLS)) | preferred | fixed).items():
            group.setdefault(name, value)
    elif stray := [name for name in keys.names(keys.LOW_RANK) if name in group]:
        raise ValueError(f"{stray[0]} is set but rank is not ({where}); add rank to project this group, or remove {stray}")
    check_values(group, group_index, own, fixed)
    for param_index in range(len(group["params"]) if is_low_rank(group) else 0):
        check_param(group, group_index, param_index)


def missing_in_older(group: dict[str, Any]) -> dict[str, Any]:
    """Keys that a group saved by an older version may lack, with the values that they had in that version."""
    return keys.defaults((keys.CAPTURABLE, *(keys.LOW_RANK if is_low_rank(group) else ())))


def check_names(group: dict[str, Any], group_index: int, known: Iterable[str]) -> None:
    """Raises ValueError for unsupported or mistyped keys, and where the number of `param_names` is not the
    number of parameters."""
    where = describe(group, group_index)
    keys.check_names(group, known, where)
    if (given := group.get("param_names")) is not None and len(given) != len(group["params"]):
        raise ValueError(f"{where} has {len(group['params'])} parameters and {len(given)} param_names; give each its own, or remove them")


def check_values(group: dict[str, Any], group_index: int, own: tuple[keys.Key, ...], fixed: dict[str, Any]) -> None:
    """Checks every value of a complete group. The group may have been loaded or changed since `complete`,
    which says what `own` and `fixed` are."""
    where = describe(group, group_index)
    of_low_rank = (*keys.LOW_RANK, keys.CALLS) if is_low_rank(group) else ()
    keys.check_values(group, (keys.CAPTURABLE, *keys.ADAMW, *own, *of_low_rank), where)
    for name, value in fixed.items() if is_low_rank(group) else ():
        if group[name] != value:
            raise ValueError(
                f"{name} is {group[name]!r} but this optimizer's is {value!r} ({where}); use LowRankAdamW to choose it by group"
            )


def warn_if_clamped(group: dict[str, Any], group_index: int, warned: set[tuple[int, int]]) -> None:
    """Warns once for each shape whose shorter side is under the group's rank."""
    for param_index, param in enumerate(group["params"]):
        shape = matrix_shape(param)
        if group["rank"] > min(shape) and shape not in warned:
            warned.add(shape)
            warnings.warn(
                f"rank {group['rank']} is more than the shorter side of {describe(group, group_index, param_index)}; "
                f"rank {min(shape)} is used for this shape, which saves no memory there",
                UserWarning,
                stacklevel=10,
            )


def draw_key(group: dict[str, Any], param_index: int) -> int | None:
    """A number made from the parameter's name, or None where it has no name. The parameter's random draws are
    keyed by it."""
    name = name_of(group, param_index)
    if name is None:
        return None
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def warn_of_changes(changes: list[str]) -> None:
    """Warns of the optimizer's settings that a checkpoint replaces. Call it once the checkpoint has passed
    its checks."""
    if changes:
        shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        warnings.warn(
            f"the checkpoint's settings take the place of the optimizer's: {shown}. To go on with others, change optimizer.param_groups "
            "after loading, where the states allow it",
            UserWarning,
            stacklevel=9,
        )


def is_flattened(param: Tensor) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) holds the parameter as a part of a flat one."""
    return getattr(param, "_fsdp_flattened", False)


def refuse_flattened(group: dict[str, Any], group_index: int, param_index: int) -> None:
    """Raises TypeError for a parameter of FSDP1, which keeps a flat piece of each matrix, without rows and
    columns."""
    if is_flattened(group["params"][param_index]):
        raise TypeError(
            f"FullyShardedDataParallel (FSDP1) keeps flat pieces of matrices, which cannot be projected "
            f"({describe(group, group_index, param_index)}); use FSDP2, torch.distributed.fsdp.fully_shard, which cuts them by rows"
        )
    if hasattr(group["params"][param_index], "ds_id"):
        raise TypeError(
            f"DeepSpeed's ZeRO keeps flat pieces of matrices, which cannot be projected ({describe(group, group_index, param_index)}); "
            "use FSDP2, torch.distributed.fsdp.fully_shard, which cuts them by rows"
        )


def check_param(group: dict[str, Any], group_index: int, param_index: int) -> None:
    """Raises ValueError or TypeError where a low-rank group cannot hold this parameter."""
    param = group["params"][param_index]
    where = describe(group, group_index, param_index)
    refuse_flattened(group, group_index, param_index)
    if param.dim() < 2:
        raise ValueError(
            f"a low-rank group takes matrices, got a {param.dim()}-D parameter ({where}); put it in a group without rank. DeepSpeed, which "
            "puts flat pieces of matrices into the groups, cannot be used: use FSDP2, torch.distributed.fsdp.fully_shard"
        )
    if param.numel() == 0:
        raise ValueError(f"a low-rank group cannot hold an empty parameter ({where}); put it in a group without rank")
    if not param.is_floating_point():
        raise TypeError(f"a low-rank group takes real floating-point parameters, got {param.dtype} ({where}); use a group without rank")
    if is_sharded(param):
        try:
            sharding_of(param)
        except TypeError as error:
            raise TypeError(f"{error} ({where})") from None
    elif param.layout != torch.strided:
        raise TypeError(f"a low-rank group takes dense tensors, got layout {param.layout} ({where}); use a group without rank")
    if group["rounding"] == "stochastic" and param.dtype != torch.bfloat16:
        raise ValueError(f"rounding='stochastic' is for bfloat16 parameters, got {param.dtype} ({where}); put it in a group without")
