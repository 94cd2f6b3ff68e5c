"""The name under which Hugging Face's Trainer imports APOLLO: `lowrank_kernels.integrations.galore_torch`
installs it. The arguments are those that Trainer passes (transformers 5.24, trainer_optimizer.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .. import optim
from . import layerwise

PROJECTIONS = {"random": "gaussian", "svd": "dominant"}
LIFTS = {"channel": "channel_scaling", "tensor": "tensor_scaling"}


class APOLLOAdamW(layerwise.LayerWise, optim.LowRankAdamW):
    """APOLLO or APOLLO-Mini, by the keys of the group: `proj` ("random" or "svd"), `scale_type` ("channel" or
    "tensor"), `scale`, rank, update_proj_gap and proj_type.

    α, the factor of the update, is √scale: Hugging Face's documentation names scale=128 for APOLLO-Mini,
    whose paper has α = √128 (arXiv 2412.05270).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **unsupported: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **unsupported)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(_translated(param_group) if "rank" in param_group else param_group)


def _translated(group: dict[str, Any]) -> dict[str, Any]:
    """The group with the keys of this package."""
    found = dict(group)
    for theirs, ours, known, default in (("proj", "selection", PROJECTIONS, "random"), ("scale_type", "lift", LIFTS, "channel")):
        value = found.pop(theirs, default)
        if value not in known:
            raise ValueError(f"{theirs} must be one of {', '.join(map(repr, known))}, got {value!r}")
        found[ours] = known[value]
    scale = found.get("scale", 1.0)
    if not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale!r}")
    return found | {"scale": math.sqrt(scale)}
