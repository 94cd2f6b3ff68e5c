"""Finds the converted layer that a parameter belongs to, and refuses every optimizer but RSOAdamW, which
would train such a layer without effect."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..sharded import is_sharded

if TYPE_CHECKING:
    from .linear import SubspaceLayer

ATTRIBUTE = "_lowrank_kernels_layer"
"""Attribute of a layer's weight and coordinates that holds their Owner."""

_layers: weakref.WeakSet[SubspaceLayer] = weakref.WeakSet()
"""All converted layers that are alive."""


class Owner:
    """A weak reference to a layer. It is pickled as an empty set, because a layer claims its parameters anew
    when it is loaded."""

    def __init__(self, layer: SubspaceLayer) -> None:
        self._layer = weakref.ref(layer)

    def __call__(self) -> SubspaceLayer | None:
        return self._layer()

    def __reduce__(self) -> tuple[type[set], tuple[()]]:
        return set, ()  # torch.load(weights_only=True) accepts a set


def layer_of(parameter: Tensor) -> SubspaceLayer | None:
    """The converted layer that this parameter is the weight or the coordinates of, or None."""
    owner = getattr(parameter, ATTRIBUTE, None)
    layer = owner() if isinstance(owner, Owner) else None
    # A parameter that the layer has replaced no longer belongs to it.
    return layer if layer is not None and (parameter is layer.coordinates or parameter is layer.weight) else None


def claim(layer: SubspaceLayer) -> None:
    _guard()
    _layers.add(layer)
    for parameter in (layer.weight, layer.coordinates):
        if layer_of(parameter) is None:  # a shallow copy shares its parameters with the original, which keeps them
            setattr(parameter, ATTRIBUTE, Owner(layer))


def claim_sharded() -> None:
    """Claims the parameters that FSDP2 has put in place of layers' own."""
    for layer in list(_layers):
        if any(is_sharded(parameter) and layer_of(parameter) is None for parameter in (layer.weight, layer.coordinates)):
            claim(layer)


def is_unsharded_now(parameter: Tensor) -> bool:
    """Whether FSDP2 has put whole tensors in the place of a layer's sharded parameters, of which this is
    one."""
    owner = getattr(parameter, ATTRIBUTE, None) if is_sharded(parameter) else None
    layer = owner() if isinstance(owner, Owner) else None
    return layer is not None and layer_of(parameter) is None and not is_sharded(layer.weight)


def release(layer: SubspaceLayer) -> None:
    _layers.discard(layer)
    for parameter in (layer.weight, layer.coordinates):
        if layer_of(parameter) is layer:
            delattr(parameter, ATTRIBUTE)


_guarded = False


def _guard() -> None:
    """Checks every optimizer's step from the first conversion on."""
    global _guarded
    if not _guarded:
        _guarded = True
        register_optimizer_step_pre_hook(_refuse_others)


def _refuse_others(optimizer: Optimizer, *_: object) -> None:
    """Raises RuntimeError before the step of another optimizer that holds parameters of a converted layer. It
    would move coordinates, which have to stay zero, or it would move nothing."""
    if getattr(optimizer, "moves_coordinates", False):
        return
    name = type(optimizer).__name__
    if _layers and any(is_sharded(parameter) for group in optimizer.param_groups for parameter in group["params"][:1]):
        claim_sharded()
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
