"""Layers that are converted in a model to which FSDP2 has been applied already.

FSDP2 keeps a list of a module's parameters from fully_shard on, so new coordinates need a group of their own:
fully_shard is called on the layer, and its other parameters stay in the group that they are in.
"""

from __future__ import annotations

import sys

from torch import nn

from ..sharded import is_sharded
from .linear import SubspaceLayer


def shard_coordinates(layer: SubspaceLayer) -> None:
    """Hands a sharded layer's coordinates to FSDP2, which cuts them by columns if all pieces are equal."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh, coordinates = layer.weight.device_mesh, layer.coordinates
    others = {param for param in layer.parameters() if param is not coordinates}
    even = layer.out_features % mesh.size(mesh.ndim - 1) == 0
    fully_shard(layer, mesh=mesh, ignored_params=others, shard_placement_fn=lambda _: Shard(1) if even else None)


def check_not_sharded_itself(name: str, module: nn.Module) -> None:
    """Raises TypeError for a layer that is a module of FSDP2 by itself."""
    if _is_of_fsdp(module):
        raise TypeError(
            f"fully_shard was called on {name!r} itself, which leaves no room for a group of its coordinates; convert the model before "
            "fully_shard, or call fully_shard on the modules that hold the layers"
        )


def check_can_shard(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raises TypeError where the coordinates of a layer with a sharded weight could not be handed to FSDP2,
    and RuntimeError where FSDP2 has run the model already; its weights may be whole since then."""
    owners = [owner for owner in model.modules() if _is_of_fsdp(owner)]
    owned = {module: owner for owner in owners for module in owner.modules()}
    for name, layer in layers.items():
        if layer not in owned and is_sharded(layer.weight):
            raise TypeError(
                f"{name!r} has a sharded weight, and no module of FSDP2 holds it; convert a model of FSDP2 as a whole, and one of tensor "
                "parallelism not at all"
            )
        if layer in owned and getattr(owned[layer]._get_fsdp_state(), "_is_root", None) is not None:
            raise RuntimeError(
                f"{name!r} cannot be converted after the first forward pass of a model of FSDP2, which has settled its groups by then; "
                "convert it before"
            )


def _is_of_fsdp(module: nn.Module) -> bool:
    """Whether fully_shard was called on this module. This does not import FSDP2."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
