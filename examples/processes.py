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

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass takes the mean of the gradients."""
        return model if self.count == 1 else nn.parallel.DistributedDataParallel(model)


ALONE = Processes()


def join() -> Processes:
    """The processes that torchrun has started, or this one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size())
