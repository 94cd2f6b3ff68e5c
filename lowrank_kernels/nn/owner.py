"""Which converted layer a parameter belongs to, and that no optimizer but RSOAdamW trains one without
effect."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from .linear import SubspaceLayer

ATTRIBUTE = "_lowrank_kernels_layer"
"""Of a weight and of coordinates: their Owner."""


class Owner:
    """A weak reference to a layer. A pickle holds an empty set for it: a layer that is loaded claims its
    parameters."""

    def __init__(self, layer: SubspaceLayer) -> None:
        self._layer = weakref.ref(layer)

    def __call__(self) -> SubspaceLayer | None:
        return self._layer()

    def __reduce__(self) -> tuple[type[set], tuple[()]]:
        return set, ()  # which torch.load(weights_only=True) takes


def layer_of(parameter: Tensor) -> SubspaceLayer | None:
    """The converted layer whose weight or coordinates this is."""
    owner = getattr(parameter, ATTRIBUTE, None)
    layer = owner() if isinstance(owner, Owner) else None
    # A parameter that was replaced belongs to none.
    return layer if layer is not None and (parameter is layer.coordinates or parameter is layer.weight) else None


def claim(layer: SubspaceLayer) -> None:
    _guard()
    for parameter in (layer.weight, layer.coordinates):
        if layer_of(parameter) is None:  # a shallow copy has the parameters of the original
            setattr(parameter, ATTRIBUTE, Owner(layer))


def release(layer: SubspaceLayer) -> None:
    for parameter in (layer.weight, layer.coordinates):
        if layer_of(parameter) is layer:
            delattr(parameter, ATTRIBUTE)


_guarded = False


def _guard() -> None:
    """From the first conversion on every optimizer's step is looked at."""
    global _guarded
    if not _guarded:
        _guarded = True
        register_optimizer_step_pre_hook(_refuse_others)


def _refuse_others(optimizer: Optimizer, *_: object) -> None:
    """Another optimizer would move coordinates, which stay zero, or nothing at all."""
    if getattr(optimizer, "moves_coordinates", False):
        return
    name = type(optimizer).__name__
    held = [(parameter, layer_of(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
    held = [(parameter, layer) for parameter, layer in held if layer is not None and layer.coordinates.requires_grad]
    for layer in (layer for parameter, layer in held if parameter is layer.coordinates):
        raise RuntimeError(
            f"{name} was given the coordinates of {layer}, whose weight only RSOAdamW moves; build RSOAdamW(model.parameters()), or call "
            "to_dense(model) before this optimizer is built"
        )
    for _, layer in held:
        if not layer.subspace.has_optimizer:
            raise RuntimeError(
                f"{name} has the weight of {layer} and would not move it: the layer was converted after this optimizer was built. "
                "Build RSOAdamW(model.parameters()) instead, or call to_dense(model)"
            )
