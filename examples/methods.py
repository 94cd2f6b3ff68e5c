"""The optimizers on offer. To add one, add an entry to METHODS; nothing else needs to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from settings import Settings


LOW_RANK = ("rank", "update_proj_gap", "scale", "svd", "state_bits", "rounding")
SCALING = ("rank", "update_proj_gap", "state_bits", "rounding")  # APOLLO has a scale of its own, and no singular vectors
RSO = ("rso_rank", "inner_steps", "distribution", "principal_rank", "rso_scale", "rso_moments", "rounding")


Builder = Callable[..., torch.optim.Optimizer]
"""(model, lr, settings, prepare) → the optimizer. It may convert layers of the model, in place. prepare: is
called with the model after that, and before the optimizer is built; it may replace parameters."""


def _nothing(model: nn.Module) -> None:
    pass


Prepare = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Method:
    title: str
    lr: float  # default peak learning rate of the linear layers within the decoder, for the width of tiny and 9m; see `default_lr`
    color: str  # in pictures; from the palette of Okabe and Ito, which colour-blind readers can tell apart
    build: Builder
    reads: tuple[str, ...] = ()  # settings that affect this method's runs but not every method's
    dashed: bool = False  # the line in pictures
    needs_gradient: bool = False  # moves weights by gradients, not by what is projected of them alone


def _groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The parameter groups: embedding, head and norms at their own rate; the linear layers within the decoder
    at the method's.

    They are the same for every method. Which parameters train at which rate matters more than the method, so
    compared methods must not differ in it.
    """
    matrices = [parameter for parameter in model.layers.parameters() if parameter.ndim > 1]
    chosen = set(map(id, matrices))
    dense = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [{"params": dense, "lr": settings.dense_lr}, {"params": matrices}]


def _adamw(model: nn.Module, lr: float, settings: Settings, prepare: Prepare = _nothing) -> torch.optim.Optimizer:
    prepare(model)
    fused = torch.device(settings.device).type in ("cpu", "cuda", "mps", "xpu")
    return torch.optim.AdamW(_groups(model, settings), lr=lr, weight_decay=settings.weight_decay, fused=fused)


def _low_rank(class_name: str, reads: tuple[str, ...] = LOW_RANK, **fixed: Any) -> Builder:
    """fixed: keys of the group that the method itself prescribes."""

    def build(model: nn.Module, lr: float, settings: Settings, prepare: Prepare = _nothing) -> torch.optim.Optimizer:
        import lowrank_kernels as lrk  # imported here, so that adamw alone needs nothing but torch

        prepare(model)
        keys = {key: getattr(settings, key) for key in (*reads, "seed", "diagnostics")} | fixed
        dense, projected = lrk.param_groups(model, **keys)
        groups = [dense | {"lr": settings.dense_lr}, projected]
        return getattr(lrk, class_name)(groups, lr=lr, weight_decay=settings.weight_decay)

    return build


def _rso(model: nn.Module, lr: float, settings: Settings, prepare: Prepare = _nothing) -> torch.optim.Optimizer:
    import lowrank_kernels as lrk

    principal = {"principal_rank": settings.principal_rank or None} if settings.distribution == "principal" else {}
    lrk.to_subspace(model, rank=settings.rso_rank, distribution=settings.distribution, seed=settings.seed, **principal)
    prepare(model)
    options = dict(weight_decay=settings.weight_decay, inner_steps=settings.inner_steps, rounding=settings.rounding)
    options |= dict(scale=settings.rso_scale, moments=settings.rso_moments)
    return lrk.RSOAdamW(_groups(model, settings), lr=lr, **options)


DOMINANT, IMPORTANCE = {"selection": "dominant"}, {"selection": "importance"}
METHODS: dict[str, Method] = {
    "adamw": Method("AdamW", 2e-3, "#4d4d4d", _adamw),
    "galore": Method("GaLore", 2e-2, "#d55e00", _low_rank("GaLoreAdamW"), LOW_RANK),
    "i3s": Method("I3S", 2e-2, "#0072b2", _low_rank("I3SAdamW"), LOW_RANK),
    "rso": Method("RSO", 2e-3, "#009e73", _rso, RSO),
    "fira": Method("Fira", 1e-2, "#cc79a7", _low_rank("FiraAdamW", **DOMINANT), LOW_RANK, needs_gradient=True),
    "fira-i3s": Method("Fira, I3S", 1e-2, "#cc79a7", _low_rank("FiraAdamW", **IMPORTANCE), LOW_RANK, dashed=True, needs_gradient=True),
    "adafactor": Method("Adafactor", 2e-2, "#b58900", _low_rank("LowRankAdafactor", **DOMINANT), LOW_RANK),
    "adafactor-i3s": Method("Adafactor, I3S", 2e-2, "#b58900", _low_rank("LowRankAdafactor", **IMPORTANCE), LOW_RANK, dashed=True),
    "adam-mini": Method("Adam-mini", 2e-2, "#56b4e9", _low_rank("LowRankAdamMini", **DOMINANT), LOW_RANK),
    "adam-mini-i3s": Method("Adam-mini, I3S", 2e-2, "#56b4e9", _low_rank("LowRankAdamMini", **IMPORTANCE), LOW_RANK, dashed=True),
    "apollo": Method("APOLLO", 4e-3, "#7f3c8d", _low_rank("ApolloAdamW", SCALING), SCALING, needs_gradient=True),
    "apollo-mini": Method(
        "APOLLO-Mini", 4e-3, "#7f3c8d", _low_rank("ApolloMiniAdamW", SCALING[1:], rank=1), SCALING[1:], dashed=True, needs_gradient=True
    ),
}
DEFAULT = ("adamw", "galore", "i3s", "rso")  # what runs where no optimizer is named


def default_lr(method: str, hidden: int) -> float:
    """The best rate of a short search at width 128, in which the dense parameters had the same rate. Wider
    models get half of it, which is about what GaLore's experiments use."""
    return METHODS[method].lr / (1 if hidden <= 128 else 2)
