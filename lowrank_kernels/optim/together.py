"""The processes among which in_backward takes means of gradients."""

from __future__ import annotations

import weakref
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..sharded import is_sharded
from .averaging import average_


class Together:
    """The processes of a group, or this one alone. It takes the place of the reduction that a
    DistributedDataParallel does, from begin() to remove().

    chose: whether a basis was chosen from a mean since the last step. sent_bytes: what this process has given
    to all-reduces so far.
    """

    def __init__(self, model: nn.Module, process_group: Any) -> None:
        """Raises ValueError where process_group does not go with the model."""
        parallel = model if isinstance(model, DistributedDataParallel) else None
        if parallel is not None and process_group is not None and process_group is not parallel.process_group:
            raise ValueError("process_group is not that of the DistributedDataParallel model; leave it out")
        if parallel is not None and parallel.static_graph:
            raise ValueError("DistributedDataParallel(static_graph=True) cannot be kept from reducing gradients; leave static_graph out")
        group = process_group if parallel is None else parallel.process_group
        spread = any(is_sharded(param) for param in model.parameters() if param.requires_grad)
        if spread and group is not None:
            raise ValueError("gradients of sharded parameters arrive as means over the processes already; leave process_group out")
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if group is None and several and not spread:
            raise ValueError(
                f"torch.distributed runs {dist.get_world_size()} processes: pass process_group (torch.distributed.group.WORLD for all), or "
                "the model in DistributedDataParallel; a group of this process alone keeps its gradients apart"
            )
        self.sent_bytes = 0
        self.chose = False
        self._group, self._parallel = group, parallel
        self._buffers: list[Tensor] = []
        """That DistributedDataParallel would keep equal in all processes."""
        self._order = 0
        """A digest of the order in which gradients came."""
        self._restore: Any = None

    @property
    def alone(self) -> bool:
        return self._group is None

    def begin(self) -> None:
        """Turns off the reduction of a DistributedDataParallel."""
        if (parallel := self._parallel) is not None:
            self._buffers = list(parallel.buffers()) if parallel.broadcast_buffers else []
            parallel.require_backward_grad_sync = False
            self._restore = weakref.finalize(self, setattr, parallel, "require_backward_grad_sync", True)
            self._parallel = None

    def remove(self) -> None:
        """Turns it on again."""
        if self._restore is not None:
            self._restore()  # only the first time

    def clear(self) -> None:
        """Forgets what came since the last step."""
        self._order, self.chose = 0, False

    def note(self, index: int, place: int) -> None:
        """Notes that the gradient of a parameter came, number `place` of group number `index`."""
        self._order = zlib.crc32(f"{index} {place}".encode(), self._order)

    def average_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean."""
        self.sent_bytes += average_(tensors, self._group)

    def broadcast_buffers(self) -> None:
        """Gives all processes the model's buffers of the first one."""
        for buffer in self._buffers:
            dist.broadcast(buffer, dist.get_global_rank(self._group, 0), group=self._group)

    def compare_order(self, device: torch.device) -> None:
        """Raises RuntimeError where a basis was chosen and the gradients of two processes came in another
        order. Then those of different parameters have been averaged with each other."""
        if not self.chose:
            return
        orders = torch.tensor([self._order, -self._order], dtype=torch.int64, device=device)
        dist.all_reduce(orders, dist.ReduceOp.MAX, group=self._group)
        highest, lowest = orders.tolist()
        if highest != -lowest:
            raise RuntimeError(
                "the gradients of two processes came in another order, as where branches of a model run in an order of their own; "
                "in_backward cannot choose bases then, and those of this step are wrong: go back to a checkpoint, and leave it out"
            )
