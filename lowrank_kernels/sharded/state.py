"""The part of a sharded parameter's state that a process holds, and its form in a checkpoint.

The tensors of a state are DTensors, so that torch.distributed.checkpoint can spread them anew over another
number of processes. 8-bit moments are coded in blocks of 64 columns that begin at a process's first column,
and with another number of processes there are other blocks. So a checkpoint of sharded parameters holds them
decoded, in fp32. Coding again what was decoded, in the same blocks, gives the same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..storage import eight_bit
from ..storage.storage import Layout
from ..subspaces import own_memory
from .layout import ALONG_M, ALONG_N, OVER_EXPERTS, Sharding, is_sharded, local

CODED = tuple(zip(eight_bit.MOMENTS, eight_bit.SCALES, (eight_bit.decode_m, eight_bit.decode_v), strict=True))


@dataclass(frozen=True)
class Part:
    """One tensor of a state. shape: of this process's part. dim: the dimension that is cut, of `length`
    elements in all; None where every process holds the whole."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int | None = None
    length: int = 0


def parts(
    layout: Callable[[int], Layout], sharding: Sharding, right: bool, rank: int, m: int, n: int, dtype: torch.dtype
) -> dict[str, Part]:
    """The tensors of a parameter's state by name, `basis` among them. layout: number of columns → what the
    rule and the lift keep for one matrix with so many. dtype: of the parameter."""
    cut = sharding.cut(right)
    experts = () if len(sharding.shape) != 3 else (sharding.shape[0],)
    if cut == OVER_EXPERTS:
        batch, of_experts = (sharding.piece(*experts)[1],), dict(dim=0, length=experts[0])
    else:
        batch, of_experts = experts, {}
    rows = sharding.piece(m)[1] if cut == ALONG_M else m
    by_rows = dict(dim=len(batch), length=m) if cut == ALONG_M else of_experts
    found = {"basis": Part((*batch, rows, rank), dtype, **by_rows)}
    if cut not in (ALONG_M, ALONG_N):
        return found | {name: Part((*batch, *shape), kind, **of_experts) for name, (shape, kind) in layout(n).items()}
    # Of n columns so many processes have a full piece, and one has what is left.
    full = sharding.piece(n, 0)[1]
    pieces = [(n // full, layout(full)), (1, layout(n % full))]
    depends = {name for name, (shape, _) in layout(eight_bit.BLOCK).items() if layout(2 * eight_bit.BLOCK)[name][0] != shape}
    for name, (shape, kind) in layout(sharding.piece(n)[1]).items():
        length = sum(count * of_piece[name][0][-1] for count, of_piece in pieces) if name in depends else 0
        dim = len(batch) + len(shape) - 1 if name in depends else None
        found[name] = Part((*batch, *shape), kind, dim, length)
    return found


def zeros(part: Part, sharding: Sharding, device: torch.device) -> Tensor:
    return sharding.wrap(torch.zeros(part.shape, dtype=part.dtype, device=device), part.dim, part.length)


def decoded(state: dict[str, Any]) -> dict[str, Any]:
    """The state with 8-bit moments in fp32, where they are DTensors."""
    found = dict(state)
    for name, scale, decode in CODED:
        if scale in state and is_sharded(state[name]):
            codes = state[name]
            values = decode(local(codes), local(state[scale]), torch.float32)
            found[name] = like(codes, values)
            del found[scale]
    return found


def by_rows(state: dict[str, Any]) -> dict[str, Any]:
    """The state with bases and principal directions in memory by rows, of which some lie by columns.
    torch.distributed.checkpoint broadcasts a tensor's memory as it lies, and other processes read it by
    rows."""
    return state | {name: state[name].contiguous() for name in ("basis", "principal") if isinstance(state.get(name), Tensor)}


def check_mesh(state: dict[str, Any], param: Tensor, where: str) -> None:
    """Raises ValueError where a checkpoint's state is of another mesh than the parameter."""
    meshes = [value.device_mesh for value in state.values() if is_sharded(value)]
    if is_sharded(param) and any(mesh != param.device_mesh for mesh in meshes):
        raise ValueError(
            f"the checkpoint's states are DTensors of another mesh ({where}); torch.distributed.checkpoint loads and spreads them anew"
        )


def normalise_(state: dict[str, Any], sharded: bool, eight_bit_moments: bool) -> None:
    """Brings a checkpoint's state into the form that a DTensor's checkpoint has, or a plain parameter's.
    Between the two, moments of 8 bits are decoded or coded, and DTensors are put together, in which all
    processes of their mesh take part."""
    spread = [] if sharded else [name for name, value in state.items() if is_sharded(value)]
    state |= {name: state[name].full_tensor() for name in spread}
    for name, scale, decode in CODED if eight_bit_moments else ():
        if sharded and scale in state:
            state[name] = decode(state[name], state.pop(scale), torch.float32)
        elif name in spread and scale not in state:
            state[name], state[scale] = eight_bit.coded(name, state[name].float(), state.get("step", 0))


def restore(state: dict[str, Any], saved: dict[str, Any], sharding: Sharding, expected: dict[str, Part], device: torch.device) -> None:
    """Puts a checkpoint's values into the loaded state of a DTensor: this process's parts, uncast and in
    memory of their own."""
    for key, value in saved.items():
        if key == "step":
            state[key] = torch.tensor(float(value), dtype=torch.float32, device=device)
        elif key in expected:
            part = taken(value, sharding, expected[key].dim, device)
            if expected[key].dtype == torch.uint8:
                part, scales = eight_bit.coded(key, part.float(), saved.get("step", 0))
                scale = f"{key}_scale"
                state[scale] = sharding.wrap(scales, expected[scale].dim, expected[scale].length)
            part = own_memory(part) if key == "basis" else part.contiguous()
            state[key] = sharding.wrap(part, expected[key].dim, expected[key].length)
        elif isinstance(value, Tensor) and sharding.cut(False) == OVER_EXPERTS and value.dim():  # a row for each expert
            state[key] = sharding.wrap(taken(value, sharding, 0, device), 0, sharding.shape[0])
        elif isinstance(value, Tensor):
            state[key] = value.detach().clone()


def like(old: Tensor, piece: Tensor) -> Tensor:
    """The DTensor with the placements and the shape of another one, of which `piece` is this process's
    part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(piece, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride())


def taken(value: Tensor, sharding: Sharding, dim: int | None, device: torch.device) -> Tensor:
    """This process's part of a checkpoint's tensor, in memory of its own: from a DTensor of any placements on
    the same mesh (`check_mesh`), or from a whole tensor."""
    if is_sharded(value):
        wanted = sharding.placements(dim)
        value = value if value.placements == wanted else value.redistribute(placements=wanted)
        return local(value).detach().to(device, copy=True)
    return sharding.piece_of(value.detach(), dim).to(device, copy=True)
