"""The mean of many tensors over the processes of a group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COALESCED_BYTES = 25 * 2**20
"""Smaller tensors are sent together, in messages of at most this size, as DistributedDataParallel does."""


def average_(tensors: Sequence[Tensor], process_group: Any) -> int:
    """Replaces each tensor by its mean over the processes, which all must call this with tensors of the same
    shapes, in the same order. Returns the bytes that this process gave to all-reduces."""
    world, sent = dist.get_world_size(process_group), 0
    messages = [(part, part[0] if len(part) == 1 and part[0].is_contiguous() else _flat(part)) for part in _messages(tensors)]
    started = []
    for _, message in messages:
        message.div_(world)
        sent += message.nbytes
        started.append(dist.all_reduce(message, group=process_group, async_op=True))
    for (part, message), work in zip(messages, started, strict=True):
        work.wait()
        if message is not part[0]:
            pieces = message.split([tensor.numel() for tensor in part])
            torch._foreach_copy_(part, [piece.view(tensor.shape) for piece, tensor in zip(pieces, part, strict=True)])
    return sent


def _messages(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.device, tensor.dtype].append(tensor)
    found: list[list[Tensor]] = []
    for each in alike.values():
        held = COALESCED_BYTES
        for tensor in each:
            if held + tensor.nbytes > COALESCED_BYTES:
                found.append([])
                held = 0
            found[-1].append(tensor)
            held += tensor.nbytes
    return found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
