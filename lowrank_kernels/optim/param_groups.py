"""Which parameters of a model are projected: `param_groups`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..nn import SubspaceLinear
from ..targets import is_linear, matching_modules
from .groups import ADAMW_KEYS, LOW_RANK_DEFAULTS


def param_groups(model: nn.Module, rank: int, target_modules: str | Iterable[str] = "all-linear", **options: Any) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters in [dense group, low-rank group] for LowRankAdamW and its kin.

    Args:
        model: any module. Parameters with requires_grad=False are left out; shared ones appear once.
        rank: r of the low-rank group.
        target_modules: "all-linear", every linear layer but the output head (`lm_head`, what `model.get_output_embeddings()`
            returns, and any layer whose weight is an embedding's); or a list of strings, a module being taken where its name
            contains one of them (`["q_proj", "mlp"]`); or a regular expression that must match a module's whole name. Of the
            modules found, the weights of linear layers are projected, and 3-D parameters `[experts, m, n]` of named modules.
        options: any other key of a low-rank group (`update_proj_gap`, `stagger`, `scale`, `proj_type`, `selection`, `svd`,
            `oversample`, `power_iters`, `seed`, `state_bits`, `rounding`; `lr`, `betas`, `eps`, `weight_decay`), set in the low-rank
            group only. `capturable` is the optimizer's own argument, for both groups.

    Returns:
        [{"params": everything else}, {"params": projected weights, "rank": rank, **options}].

    Raises:
        ValueError: an unknown option; target_modules that match nothing, nothing that can be projected, or a SubspaceLinear.
    """
    allowed = (*LOW_RANK_DEFAULTS, *ADAMW_KEYS)
    for key in options:
        if key not in allowed:
            nearest = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known options are {', '.join(allowed)}"
            raise ValueError(f"unknown option {key!r} for param_groups; {hint}")
    matched = matching_modules(model, target_modules)
    for name, module in matched.items():
        if isinstance(module, SubspaceLinear):
            raise ValueError(
                f"{name!r} is a SubspaceLinear, which only RSOAdamW moves; build RSOAdamW(model.parameters()), or call to_dense(model)"
            )
    projected = {}
    for name, module in matched.items():
        for parameter in _projectable(module, experts=target_modules != "all-linear"):
            projected[id(parameter)] = (name, parameter)
    if not projected:
        kinds = sorted({type(module).__name__ for module in matched.values()})
        raise ValueError(
            f"target_modules={target_modules!r} matches only modules without a linear weight of their own ({', '.join(kinds)}); "
            "name linear layers, or build the groups by hand"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    low_rank = [parameter for parameter in trainable if id(parameter) in projected]
    if not low_rank:
        name, parameter = next(iter(projected.values()))
        raise ValueError(
            f"target_modules={target_modules!r} matches only frozen parameters ({name!r} of shape {tuple(parameter.shape)} and others "
            "have requires_grad=False); unfreeze them before building the groups"
        )
    dense = [parameter for parameter in trainable if id(parameter) not in projected]
    return [{"params": dense}, {"params": low_rank, "rank": rank, **options}]


def _projectable(module: nn.Module, experts: bool) -> Iterator[nn.Parameter]:
    if is_linear(module):
        if isinstance(module.weight, nn.Parameter):  # a parametrized weight is computed from others, which stay dense
            yield module.weight
    elif experts and not type(module).__module__.startswith("torch.nn."):  # torch's own have no experts; Conv1d has 3-D weights
        yield from (parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3)
