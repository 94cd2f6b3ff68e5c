"""Bytes that an optimizer keeps for one parameter, before it has kept anything. Where the parameter is a
DTensor, or is to be one, they are those of this process's part."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nn import SubspaceLayer
from ..nn.subspace import Subspace
from ..optim import LowRankOptimizer, groups
from ..optim.rso import RSOAdamW
from ..sharded import Sharding, is_sharded, local, sharding_of
from ..sharded.layout import ALONG_M, ALONG_N
from ..sharded.state import parts

COUNT = 4
"""Bytes of the count of updates in each state."""
FIGURES = 12
"""Bytes of what `diagnostics` keeps for each matrix."""


@dataclass(frozen=True)
class Projected:
    """One projected parameter of a low-rank group. right: whether its right side is projected. rank: r,
    clamped to the shorter side. cut: where the cut between processes goes. m, n: of this process's part of
    G'; matrices: how many it has a part of. basis, states: bytes of P and of everything else in the state.
    r_elements: of R, as this process holds it between passes."""

    right: bool
    rank: int
    cut: str | None
    m: int
    n: int
    matrices: int
    basis: int
    states: int
    r_elements: int


class _Processes:
    """Stands for a mesh of so many processes in a row, of which this is the first one. It holds the largest
    parts."""

    def __init__(self, count: int) -> None:
        self._count = count

    def size(self, dim: int) -> int:
        return self._count

    def get_local_rank(self, dim: int) -> int:
        return 0


def planned(param: Tensor, shards: int, dim: int = 0) -> Sharding:
    """The sharding of a parameter that will be cut along `dim`, as FSDP2 cuts the first one. Whole where
    shards is 1 or there is no such dimension."""
    if shards == 1 or param.dim() <= dim:
        return Sharding(None, param.shape, None, None)
    return Sharding(_Processes(shards), param.shape, 0, dim)


def spread(param: Tensor) -> Sharding:
    """How a parameter is spread now."""
    return sharding_of(param) if is_sharded(param) else planned(param, 1)


def bytes_of(param: Tensor, sharding: Sharding) -> int:
    """Of the parameter's elements in this process."""
    if is_sharded(param) or sharding.dim is None:
        return local(param).nbytes
    length = param.shape[sharding.dim]
    return param.nbytes // max(1, length) * sharding.piece(length)[1]


def of_dense(bytes_of_param: int) -> int:
    """AdamW's two moments in the parameter's dtype, and their count."""
    return 2 * bytes_of_param + COUNT


def of_low_rank(optimizer: LowRankOptimizer, group: dict[str, Any], param: Tensor, sharding: Sharding) -> Projected:
    hyper = optimizer._hyper(group)
    rows, columns = groups.matrix_shape(param)
    right = _is_right(param, group["proj_type"], sharding)
    m, n = (columns, rows) if right else (rows, columns)
    rank, cut = min(group["rank"], rows, columns), sharding.cut(right)
    layout = functools.partial(optimizer._layout, hyper, param, right, rank)
    held = parts(layout, sharding, right, rank, m, n, param.dtype)
    sizes = {name: torch.Size(part.shape).numel() * part.dtype.itemsize for name, part in held.items()}
    matrices = held["basis"].shape[0] if param.dim() == 3 else 1
    basis = sizes.pop("basis")
    states = sum(sizes.values()) + COUNT + 4 * (group["refresh_threshold"] < 1) + FIGURES * matrices * group["diagnostics"]
    of_state = sharding.piece(n)[1] if cut in (ALONG_M, ALONG_N) else n  # the columns of the moments
    m, n = (sharding.piece(m)[1], n) if cut == ALONG_M else (m, of_state)
    return Projected(right, rank, cut, m, n, matrices, basis, states, matrices * rank * of_state)


def _is_right(param: Tensor, proj_type: str, sharding: Sharding) -> bool:
    if proj_type == "unsharded" and not is_sharded(param) and sharding.dim is not None and param.dim() != 3:
        return sharding.dim == 0
    return groups.is_right(param, proj_type)


def of_layer(optimizer: RSOAdamW, group: dict[str, Any], layer: SubspaceLayer, sharding: Sharding) -> int:
    """The state of a converted layer's coordinates. sharding: of its weight."""
    coordinates = layer.coordinates
    rank, columns = coordinates.shape
    columns = columns if sharding.dim is None else sharding.piece(columns)[1]
    tensors = len(optimizer._hyper(group).rule.state(1, 1)) + bool(group["proximal"])
    size = torch.promote_types(coordinates.dtype, torch.float32).itemsize
    return tensors * rank * columns * size + COUNT + 4 * layer.in_features * layer.subspace.principal_rank


def of_subspace(subspace: Subspace, dtype: torch.dtype) -> int:
    """P of a converted layer, or of the layers that share it. Each process has it whole."""
    return subspace.in_features * subspace.rank * dtype.itemsize
