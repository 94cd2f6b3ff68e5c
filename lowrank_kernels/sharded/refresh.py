"""New bases for a bucket of sharded gradients, with no whole gradient in more than one process.

Each process gathers some of the bucket's matrices, chooses their bases as a single process would, and the
bases go back to all. So they are those of an unsharded run, up to how a batch of another size rounds, the
work is shared, and all processes that share a matrix have the same bits, even where their GPUs round
differently. benchmarks/scale.py compares the bytes with those of the alternatives: sums of Gram matrices or
of thin products over all processes.

A basis that is drawn at random is drawn in each process, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from . import exchange
from .layout import ALONG_M, Sharding

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

GATHERED_ELEMENTS = 2**27
"""A process gathers at most this many elements of whole matrices at a time, or one matrix."""
Choose = Callable[[Sequence[int], list[Tensor]], list[Tensor]]
"""(numbers of matrices, their whole gradients as stored) → their bases (m, r). A basis of zeros says that
none was chosen."""
Measure = Callable[[Tensor, Tensor], Tensor]
"""(whole gradient, basis) → figures of a refresh."""


def choose(
    grads: Sequence[Tensor],
    sharding: Sharding,
    right: bool,
    rank: int,
    dtype: torch.dtype,
    choose_whole: Choose,
    measure: Measure | None,
    first: int,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """This process's part of each new basis; whether it was chosen, one bool a matrix; and the figures of
    `measure`, one row a matrix. All processes get the same bools and figures.

    grads: this process's pieces, as stored. first: the process that gets the first matrix.
    """
    rows, columns = sharding.shape[-2:] if len(sharding.shape) < 4 else (sharding.shape[0], grads[0].shape[1])
    m, dim = (columns if right else rows), sharding.matrix_dim
    at_once = max(1, GATHERED_ELEMENTS // (rows * columns)) * sharding.size
    like = grads[0].new_empty(0, dtype=dtype)
    give = exchange.scatter_rows if sharding.cut(right) == ALONG_M else exchange.spread
    bases: list[Tensor] = []
    tables: list[Tensor] = []
    for start in range(0, len(grads), at_once):
        part = list(grads[start : start + at_once])
        wholes = exchange.gather(part, sharding, dim, (rows, columns)[dim], first)
        mine = [start + slot for slot in exchange.owned(len(part), sharding, first, sharding.index)]
        chosen = choose_whole(mine, wholes) if mine else []
        table = _table(chosen, [measure(*each) for each in zip(wholes, chosen, strict=True)] if measure else None)
        bases += give(chosen, (m, rank), len(part), sharding, first, like)
        tables.append(exchange.share(table, 1 if measure is None else 4, len(part), sharding, first, like.device))
    whole = torch.cat(tables)
    return bases, whole[:, 0] != 0, whole[:, 1:] if measure else None


def _table(chosen: list[Tensor], figures: list[Tensor] | None) -> list[Tensor]:
    """A row of 1 or 4 numbers for each basis: whether there is one, and its figures."""
    flags = [basis.any().float().view(1) for basis in chosen]
    return flags if figures is None else [torch.cat((flag, row)) for flag, row in zip(flags, figures, strict=True)]


def total_(tensor: Tensor, sharding: Sharding) -> Tensor:
    """The sum over the processes that share the matrices, in place."""
    if sharding.size > 1:
        dist.all_reduce(tensor, group=sharding.group)
    return tensor


def anywhere(flags: Tensor, sharding: Sharding) -> Tensor:
    """Whether a flag is set in any of the processes that share the matrices."""
    return total_(flags.float(), sharding) != 0


def anywhere_on(flag: Tensor, meshes: Iterable[DeviceMesh]) -> Tensor:
    """Whether a flag is set in any process of these meshes."""
    for mesh in dict.fromkeys(meshes):
        flag = flag.to(mesh.device_type, torch.float32, copy=True)
        for mesh_dim in range(mesh.ndim):
            dist.all_reduce(flag, group=mesh.get_group(mesh_dim))
    return flag != 0


def anywhere_in(basis: Tensor, flags: Tensor) -> Tensor:
    """Flags of this process's rows of a basis, a DTensor → whether they are set in any process's rows."""
    found = flags.float()
    for mesh_dim, placement in enumerate(basis.placements):
        if placement.is_shard(basis.dim() - 2):
            dist.all_reduce(found, group=basis.device_mesh.get_group(mesh_dim))
    return found != 0
