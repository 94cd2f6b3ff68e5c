"""Which converted layer a parameter belongs to; and no optimizer but RSOAdamW trains one without effect."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from .linear import SubspaceLayer

_layers = WeakTensorKeyDictionary()
"""Weight or coordinates → weak reference to the layer."""
_changes = 0


def changes() -> int:
    """Grows whenever parameters begin or cease to belong to a layer: who has looked need not look again before."""
    return _changes


def layer_of(parameter: Tensor) -> SubspaceLayer | None:
    """The converted layer whose weight or coordinates this is."""
    found = _layers.get(parameter)
    layer = None if found is None else found()
    # A parameter that was replaced belongs to none.
    return layer if layer is not None and (parameter is layer.coordinates or parameter is layer.weight) else None


def register(layer: SubspaceLayer) -> None:
    for parameter in (layer.weight, layer.coordinates):
        if layer_of(parameter) is None:  # a shallow copy has the parameters of the original
            _layers[parameter] = weakref.ref(layer)
    _note_change()


def unregister(layer: SubspaceLayer) -> None:
    for parameter in (layer.weight, layer.coordinates):
        if layer_of(parameter) is layer:
            del _layers[parameter]
    _note_change()


def _note_change() -> None:
    global _changes
    if not _changes:
        register_optimizer_step_pre_hook(_refuse_others)
    _changes += 1


_examined: weakref.WeakKeyDictionary[Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()


def _refuse_others(optimizer: Optimizer, *_: object) -> None:
    """Another optimizer would move coordinates, which stay zero, or nothing at all. Looks again only where something has changed."""
    seen = _changes, len(optimizer.param_groups)
    if _examined.get(optimizer) == seen or getattr(optimizer, "moves_coordinates", False):
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
    _examined[optimizer] = seen
