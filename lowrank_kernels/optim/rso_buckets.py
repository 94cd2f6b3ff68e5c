"""Sorts the coordinates of a group into buckets whose layers' weights are alike."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..nn import SubspaceLayer
from ..sharded import is_sharded, local, sharding_of
from . import rso_groups
from .buckets import Members
from .rso_groups import Layers

PART_ELEMENTS = 2**25
"""The most elements of gradients that one bucket copies to fp32 (128 MiB), where it must. A larger matrix is
a bucket by itself."""


@dataclass
class LayerMembers(Members):
    """Coordinates whose layers' weights are alike. layers: one for each of them."""

    layers: list[SubspaceLayer] = field(default_factory=list)


LISTS = ("params", "places", "states", "grads", "layers")
"""The fields of LayerMembers with one entry for each layer."""


def buckets(group: dict[str, Any], layers: Layers) -> list[LayerMembers]:
    """The buckets of coordinates that have a gradient. All layers of a bucket have weights of the same shape,
    strides, dtype and device, and gradients of the same dtype."""
    found: dict[Any, list[tuple[int, Tensor]]] = defaultdict(list)
    places = {param: place for place, param in enumerate(group["params"])}
    for param, layer in layers.items():
        if param.grad is not None:
            weight = layer.weight
            key = layer.transposed, weight.shape, weight.stride(), weight.dtype, weight.device, param.shape, param.device, param.grad.dtype
            if is_sharded(weight):
                key = (*key, weight.device_mesh, weight.placements)
            found[key].append((places[param], param))
    result = []
    for (transposed, *_), members in found.items():
        places, params = (list(each) for each in zip(*members, strict=True))
        held = [layers[param] for param in params]
        sharding = sharding_of(held[0].weight) if is_sharded(held[0].weight) else None
        grads = [param.grad for param in params]
        if sharding is not None:  # the columns of R must be cut as W's output features are
            wanted = sharding.placements(1)
            grads = [local(grad if grad.placements == wanted else grad.redistribute(placements=wanted)) for grad in grads]
        result.append(LayerMembers(not transposed, params[0].shape[0], 1, True, params, places, [], grads, sharding, held))
    return result


def by_correction(members: LayerMembers, beta1: float) -> list[tuple[float, LayerMembers]]:
    """The bucket, in parts of equal corrections (see rso_groups.correction), with those."""
    slots: dict[float, list[int]] = {}
    for slot, state in enumerate(members.states):
        slots.setdefault(rso_groups.correction(state, beta1), []).append(slot)
    if len(slots) == 1:
        return [(next(iter(slots)), members)]
    return [
        (correction, replace(members, **{name: [getattr(members, name)[slot] for slot in mine] for name in LISTS}))
        for correction, mine in slots.items()
    ]


def in_parts(members: LayerMembers) -> list[LayerMembers]:
    """The bucket in parts whose gradients have at most PART_ELEMENTS elements."""
    at_once = max(1, PART_ELEMENTS // max(1, members.params[0].numel()))
    cuts = [slice(start, start + at_once) for start in range(0, len(members.params), at_once)]
    return [replace(members, **{name: getattr(members, name)[cut] for name in LISTS}) for cut in cuts]
