"""Several processes under torchrun. Each trains on its part of every batch. The first writes the files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, sequences: Tensor) -> Tensor:
        """This process's part of the sequences of a batch."""
        return sequences.tensor_split(self.count)[self.rank]

    def total(self, *values: float) -> list[float]:
        """The sums over all processes."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def from_first(self, value: Any) -> Any:
        """What the first process passes."""
        held = [value]
        if self.count > 1:
            dist.broadcast_object_list(held)
        return held[0]

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass takes the mean of the gradients."""
        return model if self.count == 1 else nn.parallel.DistributedDataParallel(model)

    def shard(self, model: nn.Module) -> None:
        """Spreads the parameters over the processes by FSDP2, in place."""
        from torch.distributed.fsdp import fully_shard

        options = {}
        if any(hasattr(module, "subspace") for module in model.modules()):  # converted for RSO
            from lowrank_kernels.distributed import shard_placement

            options = {"shard_placement_fn": shard_placement}
        for layer in model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)


def local(tensor: Any) -> Any:
    """This process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Any:
    """All of a tensor. The processes that hold parts of it call this together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


ALONE = Processes()


def is_joined() -> bool:
    return dist.is_initialized()


def join() -> Processes:
    """The processes that torchrun has started, or this one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size())
