"""Which part of a sharded parameter, and of its state, a process holds.

A parameter is a DTensor, cut along one of its dimensions by one dimension of its mesh. The processes along
that dimension of the mesh share its matrices; those along the others hold copies. In terms of G' (m, n) the
cut goes

    along n         R, M, V and N are cut like G'. P is whole in each process.
    along m         R is a sum over the processes. P is cut like the rows of G'; M, V and the rule's work are
                    cut along n, so that each process has its share.
    over experts    each process has whole matrices.

A length is cut as torch.chunk cuts it: into pieces of ⌈length / processes⌉, of which the last ones may be
shorter or empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

ALONG_N, ALONG_M, OVER_EXPERTS = "n", "m", "experts"


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor. This does not import torch.distributed.tensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Any:
    """This process's part of a DTensor, sharing its memory. Anything else comes back as it is."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


@dataclass(frozen=True)
class Sharding:
    """How one shape of DTensors is spread. mesh_dim: the dimension of the mesh that cuts; None where every
    process holds the whole. dim: the dimension of the parameter that is cut."""

    mesh: DeviceMesh
    shape: torch.Size
    mesh_dim: int | None
    dim: int | None

    @property
    def group(self) -> ProcessGroup:
        """The processes that share the matrices."""
        return self.mesh.get_group(self.mesh_dim)

    @property
    def size(self) -> int:
        """How many processes share the matrices."""
        return 1 if self.mesh_dim is None else self.mesh.size(self.mesh_dim)

    @property
    def index(self) -> int:
        """Which of them this one is."""
        return 0 if self.mesh_dim is None else self.mesh.get_local_rank(self.mesh_dim)

    @property
    def matrix_dim(self) -> int | None:
        """The dimension of each matrix that is cut, 0 or 1; None where every matrix is whole."""
        of_experts = len(self.shape) == 3
        return None if self.dim is None or (of_experts and self.dim == 0) else self.dim - of_experts

    def cut(self, right: bool) -> str | None:
        """Where the cut goes: ALONG_N, ALONG_M, OVER_EXPERTS, or None where there is none."""
        if self.matrix_dim is None:
            return None if self.dim is None else OVER_EXPERTS
        return ALONG_M if (self.matrix_dim == 1) == right else ALONG_N

    def piece(self, length: int, index: int | None = None) -> tuple[int, int]:
        """(first, count) of a process's piece of a dimension of this length."""
        each = -(-length // self.size)
        first = min(each * (self.index if index is None else index), length)
        return first, min(each, length - first)

    def placements(self, dim: int | None) -> tuple[Any, ...]:
        """Those of a DTensor that is cut along `dim`, or whole in each process, where dim is None."""
        from torch.distributed.tensor import Replicate, Shard

        found: list[Any] = [Replicate()] * self.mesh.ndim
        if dim is not None and self.mesh_dim is not None:
            found[self.mesh_dim] = Shard(dim)
        return tuple(found)

    def wrap(self, piece: Tensor, dim: int | None, length: int = 0) -> Tensor:
        """The DTensor of which `piece` is this process's part. It is cut along `dim`, where it has `length`
        elements in all."""
        from torch.distributed.tensor import DTensor

        shape = list(piece.shape)
        if dim is not None:
            shape[dim] = length
        order = sorted(range(piece.dim()), key=lambda each: (piece.stride(each), -each))
        strides, following = [0] * piece.dim(), 1
        for each in order:
            strides[each], following = following, following * shape[each]
        return DTensor.from_local(piece, self.mesh, self.placements(dim), run_check=False, shape=torch.Size(shape), stride=tuple(strides))

    def piece_of(self, whole: Tensor, dim: int | None) -> Tensor:
        """This process's part of a tensor that is cut along `dim`, as a view."""
        return whole if dim is None or self.mesh_dim is None else whole.narrow(dim, *self.piece(whole.shape[dim]))


def sharding_of(param: Tensor) -> Sharding:
    """The sharding of a DTensor. Raises TypeError where a low-rank group cannot work with it; the message is
    the beginning of a sentence, without the parameter's name."""
    from torch.distributed.tensor import Replicate, Shard

    if param.device.type not in (param.device_mesh.device_type, "meta"):
        raise TypeError(
            f"a sharded parameter is on {param.device.type} and its mesh is one of {param.device_mesh.device_type}, as with FSDP2's "
            "CPUOffloadPolicy, which is not supported yet"
        )
    cuts = [(mesh_dim, placement) for mesh_dim, placement in enumerate(param.placements) if not isinstance(placement, Replicate)]
    if len(cuts) > 1:
        raise TypeError(
            f"two dimensions of the mesh cut the same parameter ({', '.join(map(str, param.placements))}), as FSDP2 over tensor "
            "parallelism does, which is not supported yet; use one of them, or HSDP"
        )
    if not cuts:
        return Sharding(param.device_mesh, param.shape, None, None)
    mesh_dim, placement = cuts[0]
    if type(placement) is not Shard:
        raise TypeError(f"a low-rank group takes parameters that are replicated or cut along one dimension, got {placement}")
    dim = placement.dim % param.dim()
    if dim > 0 and param.dim() > 3:
        raise TypeError(
            f"a parameter with {param.dim()} dimensions is read as [out, -1] and may be cut along the first alone, got {placement}"
        )
    return Sharding(param.device_mesh, param.shape, mesh_dim, dim)
