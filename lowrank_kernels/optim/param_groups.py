"""`param_groups`: chooses which parameters of a model are projected."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..nn import SubspaceLayer
from ..targets import ALL_LINEAR, experts_of, is_head_or_embedding, is_linear, matching_modules, without_wrappers
from . import keys
from .groups import ALL_KEYS, NAME


def param_groups(model: nn.Module, rank: int, target_modules: str | Iterable[str] = "all-linear", **options: Any) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters into [dense group, low-rank group], for LowRankAdamW and its
    subclasses.

    Args:
        model: any module. Parameters with requires_grad=False are left out; shared ones appear once.
        rank: r of the low-rank group.
        target_modules: one of three things. The weights of linear layers and the 3-D parameters
            `[experts, m, n]` of the modules found are projected.
            - "all-linear" (or "all_linear"): every linear layer except PEFT's adapters and the output head,
              and every module that holds its experts in one parameter, as Mixtral's does. The output head is
              `lm_head`, what `model.get_output_embeddings()` returns, and any layer that shares an
              embedding's weight.
            - A list of strings such as `["q_proj", "mlp"]`: every module whose name contains one of them, or
              matches one as a regular expression.
            - A regular expression: every module whose whole name it matches.
        options: any other key of a low-rank group (`update_proj_gap`, `stagger`, `scale`, `proj_type`,
            `selection`, `lift`, `moments`, `svd`, `oversample`, `power_iters`, `seed`, `state_bits`,
            `rounding`, `refresh_threshold`, `max_update_proj_gap`, `diagnostics`; `lr`, `betas`, `eps`,
            `weight_decay`; `beta2_decay`, `clip_threshold`, `first_moment` of LowRankAdafactor). They are set
            in the low-rank group only. `capturable` is the optimizer's own argument, for both groups.

    Returns:
        [{"params": everything else}, {"params": projected weights, "rank": rank, **options}]. The parameters
        carry their names from now on, and any optimizer of this package keys their random draws by them.
        Warns where less than half of the elements of trainable matrices (embeddings and head left out) are
        projected.

    Raises:
        ValueError: an unknown option; target_modules that match nothing, nothing that can be projected, or a
            converted layer.
        TypeError: a model that is no nn.Module.
    """
    allowed = [name for name in keys.names((*ALL_KEYS, *keys.ADAFACTOR)) if name != "rank"]
    for key in options:
        if key not in allowed:
            nearest = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known options are {', '.join(allowed)}"
            raise ValueError(f"unknown option {key!r} for param_groups; {hint}")
    matched = matching_modules(model, target_modules)
    for name, module in matched.items():
        if isinstance(module, SubspaceLayer):
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, which only RSOAdamW moves; build RSOAdamW(model.parameters()), or call "
                "to_dense(model)"
            )
    projected = {}
    for name, module in matched.items():
        for parameter in _projectable(name, module, by_name=target_modules not in ALL_LINEAR):
            projected[id(parameter)] = (name, parameter)
    if not projected:
        kinds = sorted({type(module).__name__ for module in matched.values()})
        raise ValueError(
            f"target_modules={target_modules!r} matches only modules without a linear weight of their own ({', '.join(kinds)}); "
            "name linear layers, or build the groups by hand"
        )
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = dict(zip((id(parameter) for _, parameter in named), without_wrappers([name for name, _ in named]), strict=True))
    trainable = [parameter for _, parameter in named]
    low_rank = [parameter for parameter in trainable if id(parameter) in projected]
    if not low_rank:
        name, parameter = next(iter(projected.values()))
        raise ValueError(
            f"target_modules={target_modules!r} matches only frozen parameters ({name!r} of shape {tuple(parameter.shape)} and others "
            "have requires_grad=False); unfreeze them before building the groups"
        )
    dense = [parameter for parameter in trainable if id(parameter) not in projected]
    _warn_if_little(model, dense, low_rank, names)
    for parameter in trainable:
        setattr(parameter, NAME, names[id(parameter)])
    return [{"params": dense}, {"params": low_rank, "rank": rank, **options}]


def _warn_if_little(model: nn.Module, dense: list[nn.Parameter], low_rank: list[nn.Parameter], names: dict[int, str]) -> None:
    excluded = is_head_or_embedding(model)
    apart = {id(module.weight) for name, module in model.named_modules() if hasattr(module, "weight") and excluded(name, module)}
    left = sorted((p for p in dense if p.dim() >= 2 and id(p) not in apart), key=lambda p: -p.numel())
    inside, outside = sum(p.numel() for p in low_rank), sum(p.numel() for p in left)
    if inside < outside:
        shown = ", ".join(f"{names[id(p)]} {tuple(p.shape)}" for p in left[:3])
        warnings.warn(
            f"param_groups projects {inside / (inside + outside):.0%} of the elements of matrices; the others train as a whole, the "
            f"largest being {shown}. target_modules chooses",
            UserWarning,
            stacklevel=3,
        )


def _projectable(name: str, module: nn.Module, by_name: bool) -> Iterator[nn.Parameter]:
    if is_linear(module):
        if isinstance(module.weight, nn.Parameter):  # a parametrized weight is computed from other parameters; they stay dense
            yield module.weight
    elif not by_name:
        yield from experts_of(name, module)
    elif not type(module).__module__.startswith("torch.nn."):  # torch's own modules have no experts, but Conv1d's weight is 3-D
        yield from (parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3)
