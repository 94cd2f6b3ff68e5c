"""What a group of RSOAdamW may hold: its keys, its position in the schedule and its converted layers, with
every check of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..nn import SubspaceLayer, layer_of
from ..rules import Rule
from ..rules.adamw import AdamW
from ..rules.sgd import SGD
from ..sharded import is_sharded, local, sharding_of
from ..sharded.layout import ALONG_M
from . import groups, keys
from .loading import check_step, check_tensors

RULES: dict[str, Rule] = {"adamw": AdamW(), "sgd": SGD()}
INNER = {inner: tuple(rule.state(1, 1)) for inner, rule in RULES.items()}
"""Inner optimizer → names of its state's tensors, each (r, out)."""
UNCAST = ("step", "principal")
"""Tensors of a layer's state that are fp32 whatever the layer's dtype, and not of the shape of its
coordinates."""
ALL_KEYS = (*keys.ADAMW, *keys.RSO, *keys.POSITION)
Layers = dict[Tensor, SubspaceLayer]
"""Coordinates → the layer that they belong to."""


def layers_of(group: dict[str, Any]) -> Layers:
    found = ((param, layer_of(param)) for param in group["params"])
    return {param: layer for param, layer in found if layer is not None and param is layer.coordinates}


def describe(group: dict[str, Any], index: int, param: Tensor) -> str:
    return groups.describe(group, index, next(place for place, each in enumerate(group["params"]) if each is param))


def check_values(group: dict[str, Any], index: int) -> None:
    """Checks every value of a group. The group may have been loaded or changed since its construction."""
    where = groups.describe(group, index)
    keys.check_values(group, ALL_KEYS, where)
    if group["moments"] == "carry" and group["inner"] != "adamw":
        raise ValueError(f"moments='carry' is for inner='adamw', whose V it carries over, got inner={group['inner']!r} ({where})")


def missing_in_older(group: dict[str, Any]) -> dict[str, Any]:
    """Keys that a group saved by an older version may lack, with the values that they had in that version."""
    return {"scale": 1.0, "moments": "reset"}


# What the next P does to the states of layers.


def reset(states: Iterable[dict[str, Any]]) -> None:
    """Everything starts anew, from zero."""
    for state in states:
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "principal":
                local(value).zero_()
        forget_carried(state)


def carry(held: list[tuple[dict[str, Any], SubspaceLayer]]) -> None:
    """V becomes what is expected of it in the new P, t goes on, and all else starts from zero.

    The rows of V of a random P are alike, so each becomes their mean. Those of principal directions are
    turned: the new direction i has C²ᵢⱼ of V in the old direction j, C = Q_newᵀ·Q_old, and what it has
    outside of the old ones it has of the random rows, without the factor that those have in P. The first
    principal directions have no V to come from, and everything starts anew.

    `carried` is t at that moment, for which the host waits here, and `since` counts the layer's steps from
    then on."""
    for state, layer in held:
        subspace = layer.subspace
        had = principal_of(state)
        first = subspace.principal is not None and had is None
        if first or "exp_avg_sq" not in state:  # or of another inner optimizer, and not used since
            reset([state])
            continue
        v = local(state["exp_avg_sq"])
        known = 0 if had is None else subspace.principal_rank
        of_principal, of_random = v[:known], v[known:]
        mean = of_random.mean(0, keepdim=True)
        if known:
            shares = (subspace.principal.to(v).mT @ had.to(v)).square()
            outside = (1 - shares.sum(1, keepdim=True)).clamp_min(0)
            gain = (subspace.in_features - known) / (len(v) - known)
            of_principal.copy_(shares @ of_principal + outside * (mean / gain))
        of_random.copy_(mean)
        for key, value in state.items():
            if isinstance(value, Tensor) and key not in ("exp_avg_sq", *UNCAST):
                local(value).zero_()
        state |= {"carried": int(state["step"].item()), "since": 0}


def forget_carried(state: dict[str, Any]) -> None:
    """The counts stay in the state where they are, because torch.distributed.checkpoint loads only what is in
    a state already."""
    state |= {key: 0 for key in ("carried", "since") if key in state}


def principal_of(state: dict[str, Any]) -> Tensor | None:
    """The principal directions of a state. Zeros stand for none. It waits for a GPU."""
    found = state.get("principal")
    return found if found is not None and found.any() else None


def correction(state: dict[str, Any], beta1: float) -> float:
    """(1 − β1ᵗ) / (1 − β1ˢ) for the next step. The rule corrects M's bias as if M had as many steps behind it
    as V, t of them. After a `carry` it has s. The host counts s, and on a GPU it counts a step that a
    GradScaler skips, which makes the updates after it too small until the next P."""
    if "carried" not in state:
        return 1.0
    s = state["since"] + 1
    return (1 - beta1 ** (state["carried"] + s)) / (1 - beta1**s)


def check_rounding(group: dict[str, Any], index: int, layers: Layers) -> None:
    for param, layer in layers.items() if group["rounding"] == "stochastic" else ():
        if layer.weight.dtype != torch.bfloat16:
            raise ValueError(
                f"rounding='stochastic' is for bfloat16 layers, got {layer.weight.dtype} ({describe(group, index, param)}); put it into a "
                "group without"
            )


def check_layer(layer: SubspaceLayer, group: dict[str, Any], index: int, param: Tensor) -> None:
    if layer.subspace.outer_step != group["outer_step"]:
        raise RuntimeError(
            f"P of {describe(group, index, param)} is that of outer step {layer.subspace.outer_step} and the optimizer is at "
            f"{group['outer_step']}: another optimizer moves it. Layers that share P belong into one group of one optimizer; or convert "
            "with share=None"
        )
    flattened = next((each for each in (param, layer.weight) if groups.is_flattened(each) or each.dim() != 2), None)
    if flattened is not None:
        raise RuntimeError(
            f"{describe(group, index, param)} or its layer's weight is {flattened.dim()}-D, as FullyShardedDataParallel (FSDP1) makes "
            "them, which keeps flat pieces of matrices; use FSDP2, torch.distributed.fsdp.fully_shard"
        )
    if is_sharded(layer.weight):
        try:
            cut = sharding_of(layer.weight).cut(not layer.transposed)
        except TypeError as error:
            raise TypeError(f"{error} (the weight of {describe(group, index, param)})") from None
        if cut == ALONG_M:
            raise RuntimeError(
                f"the weight of {describe(group, index, param)} is cut along its input features; cut it along its output features: "
                "fully_shard(…, shard_placement_fn=lowrank_kernels.distributed.shard_placement)"
            )
    if not isinstance(layer.weight, torch.nn.Parameter):
        raise RuntimeError(
            f"the weight that {describe(group, index, param)} stands for is no parameter any more, as after weight_norm or pruning; undo "
            "that, or leave that layer out of target_modules"
        )
    if layer.weight.grad is not None:
        raise RuntimeError(
            f"the weight that {describe(group, index, param)} stands for has a gradient of its own, from a module that it was tied to "
            "after the conversion, or from a use outside of its layer; untie it, or leave that layer out of target_modules"
        )


def check_loaded_state(state: dict[str, Any], layer: SubspaceLayer, where: str) -> None:
    rank, out = wanted = tuple(layer.coordinates.shape)
    if "step" not in state or not any(all(key in state for key in needed) for needed in INNER.values()):
        raise ValueError(f"the checkpoint's state of {where} lacks {', '.join(INNER['adamw'])} or step; it is of another optimizer")
    check_step(state["step"], where)
    check_tensors(state, next(needed for needed in INNER.values() if all(key in state for key in needed)), where)
    for key, value in state.items():
        if key == "step" or not isinstance(value, Tensor) or value.shape == wanted:
            continue
        if key == "principal":
            if value.shape != (of_layer := (layer.subspace.in_features, layer.subspace.principal_rank)):
                raise ValueError(f"the checkpoint's principal directions are {tuple(value.shape)}, expected {of_layer} ({where})")
            continue
        if value.dim() == 2 and value.shape[1] == out:
            raise ValueError(
                f"the checkpoint was saved at rank {value.shape[0]} and {where} has rank {rank}; convert the model with "
                f"rank={value.shape[0]}, or, to change the rank, load the model's checkpoint alone and start with a new optimizer"
            )
        raise ValueError(f"the checkpoint's {key} is {tuple(value.shape)}, expected {wanted} ({where}); it was saved for another model")
    if state["subspace"] != layer.subspace.fingerprint:
        raise ValueError(
            f"the checkpoint's subspaces are others than those of {where}: convert the model with the seed, distribution, target_modules "
            "and share that it had when the checkpoint was saved"
        )
