"""What a parameter group may hold: the keys of a low-rank group, their defaults, and every check that can be made at construction."""

from __future__ import annotations

import difflib
import hashlib
import math
import warnings
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..subspaces import SELECTIONS, SVDS

LOW_RANK_DEFAULTS: dict[str, Any] = {
    "update_proj_gap": 200,
    "stagger": False,
    "scale": 0.25,
    "state_bits": 32,
    "rounding": "nearest",
    "proj_type": "std",
    "selection": "importance",
    "svd": "randomized",
    "oversample": 8,
    "power_iters": 1,
    "seed": 0,
}
PROJ_TYPES = ("std", "reverse_std", "left", "right")
STATE_BITS = (32, 8)
ROUNDINGS = ("nearest", "stochastic")
ADAMW_KEYS = ("lr", "betas", "eps", "weight_decay", "capturable")
UNSUPPORTED: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "differentiable": False,
    "foreach": None,
    "fused": None,
    "decoupled_weight_decay": True,
}
"""What torch.optim.AdamW knows besides, and the only value that means nothing here."""
FOREIGN_KEYS = ("params", "param_names", "initial_lr", "lr_scale", "base_momentum", "max_momentum")
"""Of torch, its schedulers and of training scripts, where they resemble keys of ours."""
NAME = "_lowrank_kernels_name"
"""Attribute of a parameter by which it is known in whatever groups and optimizers a user or a framework puts it into."""
NEAR_MISS = 0.8
"""Of difflib's ratio: `update_gap` for update_proj_gap has 0.80, `maximise` for maximize 0.88, `keeps` for eps 0.75."""


def describe(group: dict[str, Any], group_index: int, param_index: int | None = None) -> str:
    """'group 1, parameter 'layers.0.q_proj.weight' of shape (512, 512)', for error messages."""
    if param_index is None:
        return f"group {group_index}"
    name = name_of(group, param_index)
    shown = str(param_index) if name is None else repr(name)
    return f"group {group_index}, parameter {shown} of shape {tuple(group['params'][param_index].shape)}"


def name_of(group: dict[str, Any], param_index: int) -> str | None:
    """What the group calls the parameter, or `param_groups` of this package did, if any of them knows it."""
    if names := group.get("param_names"):
        return names[param_index]
    return getattr(group["params"][param_index], NAME, None)


def is_low_rank(group: dict[str, Any]) -> bool:
    return "rank" in group


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """(rows, columns) of the matrices a parameter stands for: 2-D as is, [experts, m, n] a batch, more dimensions [out, -1]."""
    if param.dim() == 3:
        return param.shape[1], param.shape[2]
    return param.shape[0], math.prod(param.shape[1:])


def is_right(shape: tuple[int, int], proj_type: str) -> bool:
    """Whether the right side is projected. `std` projects the shorter side; a square matrix goes right."""
    rows, columns = shape
    if proj_type == "std":
        return rows >= columns
    if proj_type == "reverse_std":
        return rows < columns
    return proj_type == "right"


def refresh_offset(group: dict[str, Any], param_index: int) -> int:
    """⌊i·gap / k⌋ for parameter i of the k of a staggered group, 0 in any other: it refreshes where step mod gap is this number.

    Every number below gap is taken by ⌊k / gap⌋ or ⌈k / gap⌉ parameters. k counts all of the group, with a gradient or without.
    """
    return param_index * group["update_proj_gap"] // len(group["params"]) if group["stagger"] else 0


def complete(group: dict[str, Any], group_index: int, selection: str | None) -> None:
    """Fills a low-rank group's missing keys with their defaults and raises ValueError or TypeError for what cannot work.

    `selection`, if given, is the one that the optimizer's class stands for. A group without `rank` gets only AdamW's checks. Numbers
    become Python's own, so that a checkpoint holds nothing else.
    """
    check_keys(group, group_index, ("rank", *LOW_RANK_DEFAULTS, *ADAMW_KEYS))
    if not is_low_rank(group):
        stray = [key for key in LOW_RANK_DEFAULTS if key in group]
        if stray:
            raise ValueError(
                f"{stray[0]} is set but rank is not ({describe(group, group_index)}); add rank to project this group, or remove {stray}"
            )
        check_values(group, group_index, selection)
        return
    if selection is not None:
        group.setdefault("selection", selection)
    for key, value in LOW_RANK_DEFAULTS.items():
        group.setdefault(key, value)
    check_values(group, group_index, selection)
    for param_index in range(len(group["params"])):
        check_param(group, group_index, param_index)


def check_values(group: dict[str, Any], group_index: int, selection: str | None) -> None:
    """Every value of a complete group, also of one that was loaded or changed since; see `complete`."""
    check_adamw(group, group_index)
    if is_low_rank(group):
        _check_low_rank(group, group_index)
        if selection not in (None, group["selection"]):
            raise ValueError(
                f"selection is {group['selection']!r} but this optimizer's is {selection!r} ({describe(group, group_index)}); "
                "use LowRankAdamW to choose it by group"
            )


def warn_if_clamped(group: dict[str, Any], group_index: int, warned: set[tuple[int, int]]) -> None:
    """One warning for each shape whose shorter side is under the group's rank."""
    for param_index, param in enumerate(group["params"]):
        shape = matrix_shape(param)
        if group["rank"] > min(shape) and shape not in warned:
            warned.add(shape)
            warnings.warn(
                f"rank {group['rank']} is more than the shorter side of {describe(group, group_index, param_index)}; "
                f"rank {min(shape)} is used for this shape, which saves no memory there",
                UserWarning,
                stacklevel=8,
            )


def is_number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_adamw(group: dict[str, Any], group_index: int) -> None:
    """AdamW's own values, with `capturable` or without."""
    where = describe(group, group_index)
    lr, capturable = group["lr"], group.get("capturable", False)
    if not isinstance(capturable, bool):
        raise TypeError(f"capturable must be True or False, got {capturable!r} ({where})")
    if isinstance(lr, Tensor):
        on_gpu = lr.device.type != "cpu"
        if lr.numel() != 1 or not lr.is_floating_point() or (on_gpu and not capturable):
            elsewhere = "; with capturable=True it may be on the GPU, where kernels read it" if "capturable" in group else ""
            raise ValueError(
                f"lr must be a float or a one-element tensor on the CPU, got {tuple(lr.shape)}, {lr.dtype} on {lr.device} ({where}), "
                f"since reading it here would stall every step{elsewhere}"
            )
        if on_gpu:
            lr = 0.0  # not looked at
    elif not is_number(lr):
        raise TypeError(f"lr must be a float, got {lr!r} ({where})")
    else:
        group["lr"] = float(lr)
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be finite and ≥ 0, got {float(lr)} ({where})")
    for key in ("eps", "weight_decay"):
        if not is_number(group[key]):
            raise TypeError(f"{key} must be a float, got {group[key]!r} ({where})")
        group[key] = float(group[key])
        if not 0 <= group[key] < math.inf:
            raise ValueError(f"{key} must be finite and ≥ 0, got {group[key]} ({where})")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(is_number(beta) for beta in betas):
        raise TypeError(f"betas must be two floats, got {betas!r} ({where})")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), got {tuple(betas)} ({where})")
    group["betas"] = tuple(float(beta) for beta in betas)


def check_keys(group: dict[str, Any], group_index: int, own: tuple[str, ...]) -> None:
    """Raises ValueError for a key of torch's AdamW that is not supported, unless it is off, and for one that nearly is one of ours.

    Other keys pass, as torch's optimizers let them: frameworks tag groups with them.
    """
    where = describe(group, group_index)
    for key, value in group.items():
        if key in own or key in FOREIGN_KEYS:
            continue
        if key in UNSUPPORTED:
            if value is not UNSUPPORTED[key]:
                raise ValueError(f"{key}={value!r} is not supported ({where}); leave it out")
        elif nearest := nearest_key(key, (*own, *UNSUPPORTED)):
            raise ValueError(f"unknown key {key!r} in a group ({where}); did you mean {nearest!r}?")
    names = group.get("param_names")
    if names is not None and len(names) != len(group["params"]):
        raise ValueError(f"{where} has {len(group['params'])} parameters and {len(names)} param_names; give each its own, or remove them")


def nearest_key(key: Any, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(str(key).lower(), list(known), n=1, cutoff=NEAR_MISS)), None)


def check_arguments(name: str, options: dict[str, Any], example: str, group_keys: Iterable[str], own: Iterable[str]) -> None:
    """Raises TypeError for keyword arguments of an optimizer that it does not have; the unsupported ones of torch's AdamW may be off."""
    for key, value in options.items():
        if key in group_keys:
            raise TypeError(f"{name}() takes no {key!r}, which belongs to {example}")
        if key in UNSUPPORTED:
            if value is not UNSUPPORTED[key]:
                raise TypeError(f"{name}() does not support {key}={value!r}; leave it out")
        else:
            nearest = nearest_key(key, (*own, *group_keys))
            hint = f"; did you mean {nearest!r}?" if nearest else ""
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}{hint}")


def draw_key(group: dict[str, Any], param_index: int) -> int | None:
    """A number for the parameter's name, by which its random draws are keyed, or None where it has none."""
    name = name_of(group, param_index)
    if name is None:
        return None
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def warn_of_changes(changes: list[str]) -> None:
    """After a checkpoint has been checked: which of the optimizer's settings it replaces."""
    if changes:
        shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        warnings.warn(
            f"the checkpoint's settings take the place of the optimizer's: {shown}. To go on with others, change optimizer.param_groups "
            "after loading, where the states allow it",
            UserWarning,
            stacklevel=9,
        )


def _check_low_rank(group: dict[str, Any], group_index: int) -> None:
    where = describe(group, group_index)
    for key, least in (("rank", 1), ("update_proj_gap", 1), ("oversample", 0), ("power_iters", 0)):
        value = group[key]
        kind = "a positive int" if least else "an int ≥ 0"
        if not is_number(value, Integral):
            raise TypeError(f"{key} must be {kind}, got {value!r} ({where})")
        group[key] = int(value)
        if value < least:
            raise ValueError(f"{key} must be {kind}, got {value} ({where})")
    if group["state_bits"] not in STATE_BITS or isinstance(group["state_bits"], bool):
        raise ValueError(f"state_bits must be 32 or 8, got {group['state_bits']!r} ({where})")
    group["state_bits"] = int(group["state_bits"])
    if not isinstance(group["stagger"], bool):
        raise TypeError(f"stagger must be True or False, got {group['stagger']!r} ({where})")
    if not is_number(group["seed"], Integral):
        raise TypeError(f"seed must be an int, got {group['seed']!r} ({where})")
    group["seed"] = int(group["seed"])
    if not is_number(group["scale"]):
        raise TypeError(f"scale must be a float, got {group['scale']!r} ({where})")
    group["scale"] = float(group["scale"])
    if not math.isfinite(group["scale"]):
        raise ValueError(f"scale must be finite, got {group['scale']} ({where})")
    for key, choices in (
        ("proj_type", PROJ_TYPES),
        ("selection", tuple(SELECTIONS)),
        ("svd", SVDS),
        ("rounding", ROUNDINGS),
    ):
        if group[key] not in choices:
            nearest = difflib.get_close_matches(str(group[key]), choices, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{key} must be one of {', '.join(map(repr, choices))}, got {group[key]!r} ({where}){hint}")


def is_flattened(param: Tensor) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) holds the parameter, as a part of a flat one."""
    return getattr(param, "_fsdp_flattened", False)


def refuse_flattened(group: dict[str, Any], group_index: int, param_index: int) -> None:
    """FSDP1 keeps of each matrix a piece without rows and columns."""
    if is_flattened(group["params"][param_index]):
        raise TypeError(
            f"FullyShardedDataParallel (FSDP1) keeps flat pieces of matrices, which cannot be projected "
            f"({describe(group, group_index, param_index)}); replicate the model instead, as with DistributedDataParallel"
        )


def check_param(group: dict[str, Any], group_index: int, param_index: int) -> None:
    """Raises where a low-rank group cannot hold this parameter."""
    param = group["params"][param_index]
    where = describe(group, group_index, param_index)
    refuse_flattened(group, group_index, param_index)
    if param.dim() < 2:
        raise ValueError(f"a low-rank group takes matrices, got a {param.dim()}-D parameter ({where}); put it in a group without rank")
    if param.numel() == 0:
        raise ValueError(f"a low-rank group cannot hold an empty parameter ({where}); put it in a group without rank")
    if not param.is_floating_point():
        raise TypeError(f"a low-rank group takes real floating-point parameters, got {param.dtype} ({where}); use a group without rank")
    if param.layout != torch.strided or hasattr(param, "device_mesh"):
        raise TypeError(
            f"a low-rank group takes plain dense tensors, got {type(param).__name__} with layout {param.layout} ({where}); "
            "sharded and sparse parameters are not supported there yet"
        )
    if group["rounding"] == "stochastic" and param.dtype != torch.bfloat16:
        raise ValueError(f"rounding='stochastic' is for bfloat16 parameters, got {param.dtype} ({where}); put it in a group without")
