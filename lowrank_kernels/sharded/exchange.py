"""Matrices that are cut among processes, brought together one whole matrix a process, and taken apart again.

With B matrices and N processes, matrix number i goes to process i mod N. Each process then holds ⌈B / N⌉
whole matrices or fewer, as much as its pieces of all B. That takes one all-to-all, in which a process sends
each piece once: m·n·B / N elements. An all-gather would send, and hold, N times as much.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather
from .layout import Sharding


def owned(count: int, sharding: Sharding, first: int, index: int) -> list[int]:
    """Which of `count` matrices process number `index` gets. Matrix 0 goes to process number `first`, so that
    buckets of few matrices do not all load the same process."""
    return list(range((index - first) % sharding.size, count, sharding.size))


def gather(pieces: Sequence[Tensor], sharding: Sharding, dim: int, length: int, first: int) -> list[Tensor]:
    """The whole matrices that this process owns, as stored, from this process's pieces of all of them. dim:
    the dimension that is cut, which has `length` elements in all."""
    size, me = sharding.size, sharding.index
    shape, each = list(pieces[0].shape), pieces[0].numel()
    sent = [len(owned(len(pieces), sharding, first, other)) for other in range(size)]
    order = [matrix for other in range(size) for matrix in owned(len(pieces), sharding, first, other)]
    outgoing = torch.cat([pieces[matrix].reshape(-1) for matrix in order])
    counts = [sharding.piece(length, other)[1] for other in range(size)]
    others = [shape[:dim] + [count] + shape[dim + 1 :] for count in counts]
    received = [sent[me] * torch.Size(other).numel() for other in others]
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, [count * each for count in sent], group=sharding.group)
    blocks = [block.view(sent[me], *other) for block, other in zip(incoming.split(received), others, strict=True)]
    return list(torch.cat(blocks, dim=dim + 1).unbind())


def scatter_rows(
    wholes: Sequence[Tensor], shape: tuple[int, int], count: int, sharding: Sharding, first: int, like: Tensor
) -> list[Tensor]:
    """This process's rows (m', r) of all `count` bases, from the bases that each process owns."""
    size, (m, rank) = sharding.size, shape
    rows = [sharding.piece(m, other) for other in range(size)]
    outgoing = [whole[start : start + length].reshape(-1) for start, length in rows for whole in wholes]
    outgoing = torch.cat(outgoing) if outgoing else like.new_empty(0)
    _, mine = sharding.piece(m)
    held = [len(owned(count, sharding, first, other)) for other in range(size)]
    received = [number * mine * rank for number in held]
    incoming = like.new_empty(sum(received))
    sent = [len(wholes) * length * rank for _, length in rows]
    dist.all_to_all_single(incoming, outgoing.to(like.dtype), received, sent, group=sharding.group)
    blocks = [block.view(number, mine, rank) for block, number in zip(incoming.split(received), held, strict=True)]
    return [blocks[(first + matrix) % size][matrix // size] for matrix in range(count)]


def spread(wholes: Sequence[Tensor], shape: tuple[int, int], count: int, sharding: Sharding, first: int, like: Tensor) -> list[Tensor]:
    """All `count` bases, whole, in every process. Every process gets the same bits.

    Each process first gets its rows of all bases, and these are gathered. Without that, processes that own
    fewer matrices than others would fill their part of the message up with nothing.
    """
    rows = torch.stack(scatter_rows(wholes, shape, count, sharding, first, like))
    most = sharding.piece(shape[0], 0)[1]
    mine = torch.nn.functional.pad(rows, (0, 0, 0, most - rows.shape[1])).contiguous()
    everyones = mine.new_empty((sharding.size, *mine.shape))
    all_gather(everyones.flatten(0, 1), mine, group=sharding.group)
    return list(everyones.movedim(0, 1).flatten(1, 2)[:, : shape[0]].unbind())


def share(rows: Sequence[Tensor], width: int, count: int, sharding: Sharding, first: int, device: torch.device) -> Tensor:
    """All `count` rows of numbers, (count, width) in fp32, from those that each process owns."""
    size = sharding.size
    most = -(-count // size)
    mine = torch.zeros((most, width), dtype=torch.float32, device=device)
    for slot, row in enumerate(rows):
        mine[slot] = row
    everyones = mine.new_empty((size, most, width))
    all_gather(everyones.view(-1, width), mine, group=sharding.group)
    return torch.stack([everyones[(first + matrix) % size, matrix // size] for matrix in range(count)])
