"""Sorts a group's parameters into buckets. One step moves all parameters of a bucket together, so they are
equal in shape, strides, dtype and device. Buckets are made anew at each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..sharded import Sharding, is_sharded, local, sharding_of
from ..sharded.layout import ALONG_M, OVER_EXPERTS
from ..sharded.refresh import anywhere, total_
from ..sharded.state import Part, like, parts
from ..storage.eight_bit import MOMENTS, SCALES
from ..storage.storage import Layout
from ..subspaces import own_memory
from .groups import check_param, describe, is_right, matrix_shape

States = dict[Tensor, dict[str, Any]]
Expected = dict[str, tuple[torch.Size, torch.dtype]]
LayoutOf = Callable[..., Layout]
"""(parameter, right, rank, n) → what the state holds beside the basis, with the shapes for one matrix with n
columns. Without n it is that of the whole matrix."""
NOTHING: Mapping[Tensor, Tensor] = MappingProxyType({})


@dataclass
class Members:
    """The parameters of one bucket. Every one of them has a gradient.

    right: whether the right side is projected. rank: r, clamped to the shorter side. per_param: how many
    matrices one parameter stands for; more than one for experts. places: the parameters' positions in the
    group. states: the parameters' states, empty before the first step. grads: one for each matrix, as stored;
    where is_projected, they are R instead, (r, n).

    sharding: how the parameters are spread over processes, where they are DTensors. per_param then counts the
    matrices of which this process has a part, and grads are those parts.
    """

    right: bool
    rank: int
    per_param: int
    is_projected: bool = False
    params: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    sharding: Sharding | None = None

    @property
    def cut(self) -> str | None:
        """Where the cut between processes goes; None where there is none."""
        return None if self.sharding is None else self.sharding.cut(self.right)

    @property
    def first_matrix(self) -> int:
        """The number of this process's first matrix among those of a parameter."""
        return self.sharding.piece(self.params[0].shape[0])[0] if self.cut == OVER_EXPERTS else 0

    @property
    def extents(self) -> tuple[int, int]:
        """m, n of the whole matrices."""
        rows, columns = matrix_shape(self.params[0])
        return (columns, rows) if self.right else (rows, columns)

    def state_parts(self, layout: LayoutOf) -> dict[str, Part]:
        """This process's parts of the state, where the parameters are DTensors."""
        param = self.params[0]
        return parts(
            lambda columns: layout(param, self.right, self.rank, columns), self.sharding, self.right, self.rank, *self.extents, param.dtype
        )

    def anywhere(self, flags: Tensor) -> Tensor:
        """Flags of this process's part of the matrices → whether they are set in any part."""
        return anywhere(flags, self.sharding) if self.cut in (ALONG_M, OVER_EXPERTS) else flags

    def inner(self, basis: Tensor, old: Tensor) -> Tensor:
        """PᵀQ (…, r, r) of two bases, of whose rows this process may have a part, in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(basis.dtype, torch.float32)
        product = basis.mT.to(dtype) @ old.to(dtype)
        return total_(product, self.sharding) if self.cut == ALONG_M else product

    @property
    def weights(self) -> list[Tensor]:
        """This process's part of each parameter."""
        return self.params if self.sharding is None else list(map(local, self.params))

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def of_matrices(self, name: str) -> list[Tensor]:
        """The state tensor of this name, one for each matrix."""
        whole = [local(state[name]) for state in self.states] if self.sharding else [state[name] for state in self.states]
        return whole if self.params[0].dim() != 3 else [matrix for tensor in whole for matrix in tensor.unbind()]

    def to_device(self, scalar: Tensor) -> Tensor:
        """The scalar in fp32 on the bucket's device. A copy to a GPU is asynchronous. A copy to the CPU is
        not, because it must have arrived before it is read."""
        return scalar.to(self.device, torch.float32, non_blocking=self.device.type == "cuda")


def split(tensor: Tensor) -> list[Tensor]:
    """[tensor] for a 2-D tensor; the matrices of a 3-D one, as views."""
    return list(tensor.unbind()) if tensor.dim() == 3 else [tensor]


def matrices_of(tensor: Tensor) -> list[Tensor]:
    """The matrices that a parameter or its gradient stands for. They are views where the strides allow it."""
    return split(tensor) if tensor.dim() < 4 else [tensor.flatten(1)]


def buckets(
    group: dict[str, Any],
    group_index: int,
    states: States,
    layout: LayoutOf,
    projected: Mapping[Tensor, Tensor] = NOTHING,
) -> list[Members]:
    """The buckets of a low-rank group's parameters that have a gradient, in order of first appearance. Those
    whose gradients are projected already come last.

    projected: parameter → R, (r, n) or (experts, r, n), of parameters whose gradient is gone. Raises
    TypeError, ValueError or RuntimeError for gradients and states that no step can use. These checks run once
    for each bucket, since its members have the same shapes.
    """
    places, held = list(range(len(group["params"]))), group["params"]
    if len(set(map(id, held))) != len(held):
        places = sorted({id(param): place for place, param in reversed(list(enumerate(held)))}.values())
    with_grad = [place for place in places if held[place].grad is not None]
    grads = [held[place].grad for place in with_grad]
    found = _sorted_all(group, group_index, states, layout, with_grad, grads, is_projected=False)
    if not projected:
        return found
    for place in with_grad:
        if held[place] in projected:
            where = describe(group, group_index, place)
            raise RuntimeError(
                f"{where} has a gradient beside the one that in_backward has projected; let backward() alone make gradients between two "
                "steps, or call optimizer.zero_grad()"
            )
    arrived = [place for place in places if held[place] in projected]
    for place in arrived:
        if not states.get(held[place]):
            where = describe(group, group_index, place)
            raise RuntimeError(f"the state of {where} is gone since its gradient was projected; call optimizer.zero_grad()")
    return found + _sorted_all(
        group, group_index, states, layout, arrived, [projected[held[place]] for place in arrived], is_projected=True
    )


def members_of(param: Tensor, group: dict[str, Any]) -> Members:
    """A bucket of one DTensor, which needs no gradient and has none."""
    shape = matrix_shape(param)
    return Members(is_right(param, group["proj_type"]), min(group["rank"], *shape), 1, params=[param], sharding=sharding_of(param))


def bucket_of_one(group: dict[str, Any], group_index: int, states: States, layout: LayoutOf, place: int, grad: Tensor) -> Members:
    """The bucket of one parameter alone, with this gradient. Raises as `buckets` does."""
    return _sorted_all(group, group_index, states, layout, [place], [grad], is_projected=False)[0]


def _sorted_all(
    group: dict[str, Any],
    group_index: int,
    states: States,
    layout: LayoutOf,
    places: list[int],
    grads: list[Tensor],
    is_projected: bool,
) -> list[Members]:
    """The parameters in `places`, whose gradients or Rs are `grads`, as buckets; sharded ones last."""
    held = group["params"]
    sharded = [slot for slot, place in enumerate(places) if is_sharded(held[place])]
    if not sharded:
        return _sorted(group, group_index, states, layout, places, grads, is_projected)
    found: list[Members] = []
    plain = sorted(set(range(len(places))) - set(sharded))
    for sort, slots in ((_sorted, plain), (_sorted_sharded, sharded)):
        own = [places[slot] for slot in slots], [grads[slot] for slot in slots]
        found += sort(group, group_index, states, layout, *own, is_projected)
    return found


def _sorted_sharded(
    group: dict[str, Any],
    group_index: int,
    states: States,
    layout: LayoutOf,
    places: list[int],
    grads: list[Tensor],
    is_projected: bool,
) -> list[Members]:
    """Buckets of DTensors. They are sorted by what is the same in all processes, which must send the same
    messages in the same order."""
    held = [group["params"][place] for place in places]
    for place, grad in zip(places, grads, strict=True):
        if not is_projected and not is_sharded(grad):
            where = describe(group, group_index, place)
            raise TypeError(f"the gradient is a plain tensor in {where}, whose parameter is a DTensor; make it one too")
    alike: dict[Any, list[int]] = {}
    for slot, (param, grad) in enumerate(zip(held, grads, strict=True)):
        key = (param.device_mesh, param.placements, param.shape, param.stride(), param.dtype, param.device, grad.dtype)
        alike.setdefault(key, []).append(slot)
    found = []
    for slots in alike.values():
        members = _bucket_of(group, group_index, [places[slot] for slot in slots], grads[slots[0]], is_projected, states)
        first = members.sharding = sharding_of(held[slots[0]])
        if members.cut == OVER_EXPERTS:
            members.per_param = first.piece(first.shape[0])[1]
        members.grads = [local(grads[slot]) if is_projected else _part(grads[slot], held[slot]) for slot in slots]
        if members.params[0].dim() != 2:
            members.grads = [matrix for grad in members.grads for matrix in matrices_of(grad)]
        _check_states(members, group, group_index, layout)
        found.append(members)
    return found


def _part(grad: Tensor, param: Tensor) -> Tensor:
    """This process's part of a gradient, in the memory order of the parameter's."""
    if grad.placements != param.placements:  # a partial sum, say
        grad = grad.redistribute(placements=param.placements)
    part, weight = grad.to_local(), local(param)  # which waits where the gradient is still under way
    return part if part.stride() == weight.stride() else torch.empty_like(weight, dtype=part.dtype).copy_(part)


def _sorted(
    group: dict[str, Any],
    group_index: int,
    states: States,
    layout: LayoutOf,
    places: list[int],
    grads: list[Tensor],
    is_projected: bool,
) -> list[Members]:
    """The parameters in `places`, whose gradients or Rs are `grads`, as buckets."""
    held = [group["params"][place] for place in places]
    try:
        strides = map(Tensor.stride, held), list(map(Tensor.stride, grads))
    except RuntimeError:  # a sparse gradient has none
        for place, grad in zip(places, grads, strict=True):
            check_grad(group, group_index, place, grad)
        raise
    # One comprehension for each property is fast. A single loop that reads every property of each parameter
    # takes twice the time.
    shapes = [param.shape for param in held], [grad.shape for grad in grads]
    kinds = [param.dtype for param in held], [grad.dtype for grad in grads], [param.device for param in held]
    alike: dict[Any, list[int]] = {}
    for slot, key in enumerate(zip(*strides, *shapes, *kinds, strict=True)):
        alike.setdefault(key, []).append(slot)
    found = []
    for slots in alike.values():
        members = _bucket_of(group, group_index, [places[slot] for slot in slots], grads[slots[0]], is_projected, states)
        members.grads = [grads[slot] for slot in slots]
        if members.params[0].dim() != 2:
            members.grads = [matrix for grad in members.grads for matrix in matrices_of(grad)]
        _check_states(members, group, group_index, layout)
        found.append(members)
    return found


def _bucket_of(group: dict[str, Any], group_index: int, places: list[int], grad: Tensor, is_projected: bool, states: States) -> Members:
    """The bucket of the parameters in `places`, without their gradients. grad: that of the first one."""
    place = places[0]
    check_param(group, group_index, place)  # again: the parameter may have changed since construction
    param = group["params"][place]
    if not is_projected:
        check_grad(group, group_index, place, grad)
        if grad.shape != param.shape:
            where = describe(group, group_index, place)
            raise ValueError(f"the gradient is {tuple(grad.shape)} in {where}; it was computed before the parameter's shape changed")
    shape = matrix_shape(param)
    experts = param.shape[0] if param.dim() == 3 else 1
    members = Members(is_right(param, group["proj_type"]), min(group["rank"], *shape), experts, is_projected)
    members.params = [group["params"][each] for each in places]
    members.places = places
    members.states = [states.get(each) or {} for each in members.params]
    return members


def check_grad(group: dict[str, Any], group_index: int, place: int, grad: Tensor) -> None:
    """Raises TypeError for a gradient that no update can use, before anything is changed."""
    if grad.layout != torch.strided:
        where = describe(group, group_index, place)
        raise TypeError(f"the gradient is sparse ({grad.layout}) in {where}; make it dense, or use torch.optim.SparseAdam for it")
    if "rank" in group and not grad.is_floating_point():
        where = describe(group, group_index, place)
        raise TypeError(f"the gradient is {grad.dtype} in {where}; a low-rank group takes real floating-point gradients")


def _check_states(members: Members, group: dict[str, Any], group_index: int, layout: LayoutOf) -> None:
    """Raises ValueError where a state does not fit its parameter. Kernels rely on this check.

    Casts and moves states whose parameters were cast or moved with their model.
    """
    if not any(members.states):
        return
    param, states = members.params[0], members.states
    if members.sharding is None:
        batch = () if param.dim() != 3 else (members.per_param,)
        expected = {"basis": ((members.extents[0], members.rank), param.dtype)} | layout(param, members.right, members.rank)
        expected = {name: (torch.Size((*batch, *shape)), dtype) for name, (shape, dtype) in expected.items()}
    else:
        expected = {name: (torch.Size(part.shape), part.dtype) for name, part in members.state_parts(layout).items()}
        states = [{name: local(value) for name, value in state.items()} for state in states]
    expected["step"] = torch.Size(), torch.float32
    if _all_fit(list(filter(None, states)), expected, members.weights[0].get_device()):
        return
    for place, weight, state, stored in zip(members.places, members.weights, states, members.states, strict=True):
        if state:
            where = describe(group, group_index, place)
            _check_state(state, expected, group, where)
            _follow(state, weight, expected)
            for name, value in state.items() if state is not stored else ():
                if value is not local(stored[name]):
                    stored[name] = like(stored[name], value) if is_sharded(stored[name]) else value


def _all_fit(states: list[dict[str, Any]], expected: Expected, device: int) -> bool:
    """Whether the states fit. The first state is checked as a whole. The others are checked only for what
    kernels rely on, in loops that Python runs fast."""
    count = len(states)
    if any(name in states[0] and name not in expected for name in MOMENTS):
        return False
    try:
        for name, (shape, dtype) in expected.items():
            tensors = [state[name] for state in states]
            first = tensors[0]
            if first.shape != shape or first.dtype != dtype or list(map(Tensor.get_device, tensors)).count(device) != count:
                return False
            if [tensor.nbytes for tensor in tensors].count(first.nbytes) != count:
                return False
            if name in ("basis", "step") and [tensor.dtype for tensor in tensors].count(dtype) != count:
                return False  # 16-bit dtypes, and integers of 32 bits, have as many bytes
            if name == "basis":
                if list(map(Tensor.stride, tensors)).count(first.stride()) != count:
                    return False
            elif not all(map(Tensor.is_contiguous, tensors)):
                return False
    except (KeyError, AttributeError, TypeError):
        return False
    return True


def _check_state(state: dict[str, Any], expected: Expected, group: dict[str, Any], where: str) -> None:
    if state["basis"].shape != expected["basis"][0]:
        raise ValueError(
            f"the state's basis is {tuple(state['basis'].shape)} but rank={group['rank']}, proj_type={group['proj_type']!r} need "
            f"{tuple(expected['basis'][0])} ({where}); they cannot change after the first step: restore them, or delete "
            "optimizer.state[param] to restart it"
        )
    coded = any(name in state for name in SCALES)
    if coded != (group["state_bits"] == 8):
        raise ValueError(
            f"the state has {8 if coded else 32}-bit moments but state_bits={group['state_bits']} ({where}); it cannot "
            "change after the first step: restore it, or delete optimizer.state[param] to restart it"
        )
    method = ", ".join(f"{key}={group[key]!r}" for key in ("lift", "first_moment") if key in group)
    after = "that cannot change after the first step: restore it, or delete optimizer.state[param] to restart it"
    if stray := [name for name in MOMENTS if name in state and name not in expected]:
        raise ValueError(f"the state has {stray[0]}, which the group's method does not keep, with {method} ({where}); {after}")
    for name, (shape, dtype) in expected.items():
        if name not in state:
            raise ValueError(f"the state has no {name}, which the group's method needs, with {method} ({where}); {after}")
        if name == "step":
            continue
        if state[name].shape != shape:
            raise ValueError(
                f"{name} must be {tuple(shape)}, got {tuple(state[name].shape)} ({where}); the state is of a parameter of another shape, "
                "or of another rank"
            )
        if state[name].is_floating_point() != dtype.is_floating_point:
            raise ValueError(f"{name} must be {dtype}, got {state[name].dtype} ({where}); the state was made for other state_bits")


def _follow(state: dict[str, Any], param: Tensor, expected: Expected) -> None:
    """Casts and moves a state to match its parameter, which model.to(…) may have cast or moved."""
    for name, (_, dtype) in expected.items():
        if name == "step":
            state[name] = torch.as_tensor(state[name], dtype=dtype, device=param.device).reshape(())
        elif name == "basis":
            basis = own_memory(state[name].to(param.device, param.dtype))
            if (basis.dtype, basis.device, basis.stride()) != (state[name].dtype, state[name].device, state[name].stride()):
                state[name] = basis  # else the memory stays: a CUDA graph may hold its address
        else:
            state[name] = state[name].to(param.device, dtype).contiguous()
