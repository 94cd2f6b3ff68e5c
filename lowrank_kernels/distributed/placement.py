"""How FSDP2 should cut the parameters of converted layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import layer_of


def shard_placement(param: nn.Parameter) -> Any:
    """For fully_shard(…, shard_placement_fn=shard_placement): cuts the weights and the coordinates of layers
    that `to_subspace` has converted along their output features, so that a step of RSOAdamW sends nothing.

        weight (out, in): Shard(0);  coordinates (r, out): Shard(1);  Conv1D's weight (in, out): Shard(1)

    Any other parameter gets FSDP2's own placement, Shard(0). FSDP2 cuts along a second dimension only where
    its length is divisible by the number of processes. Where `out` is not, leave shard_placement_fn out: a
    step then redistributes the coordinates' gradients, r·out elements a layer.
    """
    from torch.distributed.tensor import Shard

    layer = layer_of(param)
    if layer is None or (param is layer.weight and not layer.transposed):
        return None
    return Shard(1)
