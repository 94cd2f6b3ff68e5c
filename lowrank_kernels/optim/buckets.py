"""Parameters of equal shape, dtype, device, strides, progress and hyperparameters form a bucket, which takes one op call a step.

What the buckets of a step are is found once; `Plan.follow` then tells whether the next step has the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .. import philox
from ..subspaces import own_memory
from . import keys
from .groups import ALL_KEYS, check_param, describe, draw_key, is_right, matrix_shape, refresh_offset

Groups = Sequence[tuple[int, dict[str, Any], int]]
"""(group index, group, index of its first parameter in the optimizer)."""

SCALARS = ("lr", "betas", "eps", "weight_decay", "scale")
"""Hyperparameters that may change from step to step without any other bucket coming of it."""
FIXED = tuple(name for name in keys.names(ALL_KEYS) if name not in SCALARS)


@dataclass
class Member:
    """One parameter with a gradient: its place, when it refreshes, its state (empty before the first step), how many matrices it has.

    key: what its random draws are keyed by: a number for its name, or, without one or in an older checkpoint, `index`.
    """

    param: Tensor
    index: int
    key: int
    refresh_offset: int
    state: dict[str, Any]
    matrices: int


@dataclass
class Bucket:
    """Members that share everything a launch needs. `hyper` holds their group's values; rank is already clamped.

    step: the updates that its members have had, as far as the host knows. counted_on_device: state["step"] is a tensor there, `counts`.
    waiting: the optimizer's parameters that may wait for a gradient that is not zero, with which their first basis is to be chosen.
    waits: all members do. weights, grads: this step's, one for each matrix. copied: those of the weights that are copies, of parameters
    whose strides give no view of a matrix.
    """

    hyper: dict[str, Any]
    right: bool
    rank: int
    step: int
    waiting: set[Tensor] = field(default_factory=set)
    waits: bool = False
    members: list[Member] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    copied: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)

    @property
    def counted_on_device(self) -> bool:
        return bool(self.counts)

    @property
    def device(self) -> torch.device:
        return self.members[0].param.device

    def to_device(self, scalar: Tensor) -> Tensor:
        """In fp32; asynchronously to a GPU, while a copy to the CPU must have arrived before it is read."""
        return scalar.to(self.device, torch.float32, non_blocking=self.device.type == "cuda")

    def take(self, grads: list[Tensor]) -> None:
        """This step's gradients, one for each member, and the weights as they now are."""
        self.copied = []
        if self._plain:
            self.weights, self.grads = [member.param for member in self.members], grads
            return
        self.weights, self.grads = [], [matrix for grad in grads for matrix in matrices_of(grad)]
        for member in self.members:
            matrices = matrices_of(member.param.detach())
            self.weights += matrices
            if matrices[0].data_ptr() != member.param.data_ptr():
                self.copied.append((member.param, matrices[0]))

    def release(self) -> None:
        """Lets go of what belongs to one step, whose memory may be wanted."""
        self.weights, self.grads, self.copied = [], [], []

    @functools.cached_property
    def _plain(self) -> bool:
        return all(member.param.dim() == 2 for member in self.members)

    @functools.cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(key of the parameter, number of the matrix in it) of each matrix: what its random draws are keyed by."""
        return tuple((member.key, number) for member in self.members for number in range(member.matrices))

    @functools.cached_property
    def _offsets(self) -> set[int]:
        return {member.refresh_offset for member in self.members}

    @property
    def refresh_number(self) -> int:
        """⌈step / gap⌉, which all draws hang on: 0 for a first basis, and one more at each refresh of a parameter, whatever its offset."""
        return 0 if self.waits else -(-self.step // self.hyper["update_proj_gap"])

    def may_be_due(self, skipped: int) -> bool:
        """Whether a member needs a new basis before this update, if up to `skipped` of those counted were none."""
        gap = self.hyper["update_proj_gap"]
        if self.waiting and any(member.param in self.waiting for member in self.members):
            return True
        return any(step <= 0 or step % gap in self._offsets for step in range(self.step - skipped, self.step + 1))

    def needs_count(self, skipped: int) -> bool:
        """Whether this update hangs on how many of the last `skipped` ones were made: by a basis, or by a count that the host alone has."""
        return self.may_be_due(skipped) or not self.counted_on_device

    def due(self) -> list[Bucket]:
        """The members that need a new basis before this update: all at their first one, afterwards those whose turn it is, and in a bucket
        of their own those that still wait for their first basis."""
        if not self.may_be_due(0):
            return []
        turn = self.step % self.hyper["update_proj_gap"]
        regular, waiting = (Bucket(self.hyper, self.right, self.rank, self.step, waits=waits) for waits in (False, True))
        first = 0
        for member in self.members:
            is_turn = self.step == 0 or member.refresh_offset == turn
            if is_turn or member.param in self.waiting:
                part = regular if is_turn else waiting
                part.members.append(member)
                part.grads += self.grads[first : first + member.matrices]
            first += member.matrices
        return [part for part in (regular, waiting) if part.members]

    def states(self, key: str) -> list[Tensor]:
        """One tensor for each matrix."""
        whole = [member.state[key] for member in self.members]
        return whole if self._plain else [matrix for tensor in whole for matrix in split(tensor)]

    def count_on_device(self) -> None:
        """Turns the counts into tensors on the device."""
        if not self.counted_on_device:
            for member in self.members:
                member.state["step"] = torch.full((), float(self.step), dtype=torch.float32, device=self.device)
            self.counts = [member.state["step"] for member in self.members]

    def advance(self, found_inf: Tensor | None, states: dict[Tensor, dict[str, Any]], capturing: bool) -> None:
        """One update more. The host counts it before it knows of found_inf, and not at all what only a replay will make."""
        if self.counted_on_device:
            torch._foreach_add_(self.counts, 1.0 if found_inf is None else (found_inf == 0).to(torch.float32).reshape(()))
        if self.step == 0:
            states |= {member.param: member.state for member in self.members}
        self.step += not capturing
        if not self.counted_on_device:
            for member in self.members:
                member.state["step"] = self.step

    def steps(self) -> list[Tensor] | None:
        """For each matrix its parameter's count, where that is on the device."""
        if not self.counted_on_device:
            return None
        return [member.state["step"] for member in self.members for _ in range(member.matrices)]

    def rounding_seeds(self) -> Tensor | None:
        """(B,) int64, a function of (seed, place), where weights are rounded stochastically."""
        return self._seeds if self.hyper["rounding"] == "stochastic" else None

    @functools.cached_property
    def _seeds(self) -> Tensor:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "other parameters have a gradient than in the step before; take one step like this outside of the graph first"
            )
        return philox.seed_tensor([philox.derive_seed(self.hyper["seed"], *place) for place in self.places], self.device)


def split(tensor: Tensor) -> list[Tensor]:
    """A 2-D tensor as it is, a 3-D one as its matrices (views)."""
    return list(tensor.unbind()) if tensor.dim() == 3 else [tensor]


def join(matrices: list[Tensor], param: Tensor) -> Tensor:
    """The inverse of `split` for a state of `param`."""
    return torch.stack(matrices) if param.dim() == 3 else matrices[0]


def matrices_of(tensor: Tensor) -> list[Tensor]:
    """The matrices that a parameter or its gradient stands for, views where its strides allow it."""
    return split(tensor) if tensor.dim() < 4 else [tensor.flatten(1)]


def check_grad(group: dict[str, Any], group_index: int, param_index: int) -> None:
    """Raises TypeError or ValueError for a gradient that no update can use, before anything is changed."""
    grad = group["params"][param_index].grad
    if grad.layout != torch.strided:
        where = describe(group, group_index, param_index)
        raise TypeError(f"the gradient is sparse ({grad.layout}) in {where}; make it dense, or use torch.optim.SparseAdam for it")
    if "rank" in group and not grad.is_floating_point():
        where = describe(group, group_index, param_index)
        raise TypeError(f"the gradient is {grad.dtype} in {where}; a low-rank group takes real floating-point gradients")


class Plan:
    """The buckets of the low-rank groups, in order of first appearance, and what they were found from."""

    def __init__(
        self, groups: Groups, states: dict[Tensor, dict[str, Any]], counts: dict[Tensor, tuple[Tensor, int]], waiting: set[Tensor]
    ) -> None:
        """counts: for a state["step"] on the device what the host counted; where that is missing it is read, which waits."""
        hypers, self._numbers = _hyperparameters(groups)
        self._fixed = _fixed(groups)
        self._params = _params(groups)
        self._unique = list(dict.fromkeys(self._params))
        self._missing = [param.grad is None for param in self._unique]
        members: list[tuple[Member, Bucket]] = []
        buckets: dict[Any, Bucket] = {}
        seen = set()
        for (group_index, group, first), number in zip(groups, self._numbers, strict=True):
            sides: dict[torch.Size, tuple[bool, int]] = {}
            for param_index, param in enumerate(group["params"]):
                if (grad := param.grad) is None or param in seen:
                    continue
                seen.add(param)
                check_grad(group, group_index, param_index)
                check_param(group, group_index, param_index)  # what the parameter has become since
                if (side := sides.get(param.shape)) is None:
                    shape = matrix_shape(param)
                    side = sides[param.shape] = is_right(shape, group["proj_type"]), min(group["rank"], *shape)
                right, rank = side
                if grad.shape != param.shape:
                    where = describe(group, group_index, param_index)
                    raise ValueError(
                        f"the gradient is {tuple(grad.shape)} in {where}; it was computed before the parameter's shape changed"
                    )
                weights, grads = matrices_of(param.detach()), matrices_of(grad)
                state = states.get(param) or {}
                if state:
                    _check_state(state, param, weights[0], right, rank, group, group_index, param_index)
                # A first step that was skipped leaves a state with a basis at step 0; it has no bucket in common with none.
                count, on_device = _count(state, counts.get(param)), isinstance(state.get("step"), Tensor)
                layout = (weights[0].stride(), grads[0].stride(), param.dtype, grad.dtype, param.device)
                alike = (number, weights[0].shape, layout, count, bool(state), on_device)
                if (bucket := buckets.get(alike)) is None:
                    bucket = buckets[alike] = Bucket(hypers[number], right, rank, count, waiting)
                name = draw_key(group, param_index)
                index = first + param_index
                key = state.get("draw_key", index) if state else index if name is None else name
                member = Member(param, index, key, refresh_offset(group, param_index), state, len(weights))
                bucket.members.append(member)
                if on_device:
                    bucket.counts.append(state["step"])
                members.append((member, bucket))
        self.buckets = list(buckets.values())
        self._numbers_of_buckets = [key[0] for key in buckets]
        present = [member.param for member, _ in members]
        self._present = present
        self._states = [member.state for member, _ in members]
        self._seen_states: tuple[list[Tensor], list[dict[str, Any]]] | None = None
        self._slots = [[slot for slot, (_, owner) in enumerate(members) if owner is bucket] for bucket in self.buckets]
        self._weight_layouts = _layouts(present)
        grads = [param.grad for param in present]
        self._grad_layouts = _layouts(grads)
        self._take(hypers, grads)

    def follow(self, groups: Groups, states: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether this step has the same buckets; they then hold its gradients and hyperparameters.

        What a step costs the host is mostly this: some ten lookups for each parameter, in loops that Python runs fast.
        """
        hypers, numbers = _hyperparameters(groups)
        params, present = _params(groups), self._present
        if numbers != self._numbers or _fixed(groups) != self._fixed:
            return False
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return False
        grads = [param.grad for param in self._unique]
        if [grad is None for grad in grads] != self._missing:
            return False
        if len(present) != len(grads):
            grads = [grad for grad in grads if grad is not None]
        if not self._has_states_of(states):
            return False
        if _layouts(grads) != self._grad_layouts or _layouts(present) != self._weight_layouts:
            return False
        for bucket, slots in zip(self.buckets, self._slots, strict=True):
            steps = [self._states[slot].get("step") for slot in slots]
            if not bucket.counted_on_device:
                if steps != [bucket.step] * len(slots):
                    return False
            elif not all(map(is_, steps, bucket.counts)):
                return False
        self._take(hypers, grads)
        return True

    def _take(self, hypers: list[dict[str, Any]], grads: list[Tensor]) -> None:
        for bucket, slots, number in zip(self.buckets, self._slots, self._numbers_of_buckets, strict=True):
            bucket.hyper = hypers[number]
            bucket.take([grads[slot] for slot in slots])

    def _has_states_of(self, states: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether every parameter has the state that it had. Walking through a dict costs less than a lookup, which hashes in Python."""
        if self._seen_states is not None:
            keys, values = self._seen_states
            if len(keys) == len(states) and all(map(is_, states, keys)) and all(map(is_, states.values(), values)):
                return True
        if not all(map(is_, map(states.get, self._present), self._states)):
            return False
        self._seen_states = list(states), list(states.values())
        return True

    def release(self) -> None:
        for bucket in self.buckets:
            bucket.release()

    def counts(self) -> dict[Tensor, tuple[Tensor, int]]:
        """What the host counted of the counts on the device: parameter → (its state["step"], the number)."""
        on_device = [bucket for bucket in self.buckets if bucket.counted_on_device]
        pairs = [(bucket, *pair) for bucket in on_device for pair in zip(bucket.members, bucket.counts, strict=True)]
        return {member.param: (count, bucket.step) for bucket, member, count in pairs}


def _params(groups: Groups) -> list[Tensor]:
    return [param for _, group, _ in groups for param in group["params"]]


def _fixed(groups: Groups) -> list[tuple]:
    return [(index, first, *(group[key] for key in FIXED)) for index, group, first in groups]


def _layouts(tensors: Sequence[Tensor]) -> tuple[list[tuple[int, ...]], list[int], list[torch.dtype]] | None:
    """Strides, numbers of elements and dtypes, so of dense tensors their shapes; None where one is sparse and has no strides."""
    try:
        return list(map(Tensor.stride, tensors)), list(map(Tensor.numel, tensors)), [tensor.dtype for tensor in tensors]
    except RuntimeError:
        return None


def _hyperparameters(groups: Groups) -> tuple[list[dict[str, Any]], list[int]]:
    """The different sets of values that the groups have, and the number of each group's. An lr on a GPU stays a tensor."""
    hypers: list[dict[str, Any]] = []
    seen: dict[tuple, int] = {}
    numbers = []
    for _, group, _ in groups:
        hyper = {key: group[key] for key in (*SCALARS, *FIXED)}
        if not (isinstance(hyper["lr"], Tensor) and hyper["lr"].is_cuda):
            hyper["lr"] = float(hyper["lr"])
        numbers.append(seen.setdefault(tuple(hyper.values()), len(seen)))
        if numbers[-1] == len(hypers):
            hypers.append(hyper)
    return hypers, numbers


def _count(state: dict[str, Any], counted: tuple[Tensor, int] | None) -> int:
    step = state.get("step", 0)
    if not isinstance(step, Tensor):
        return int(step)
    if counted is not None and counted[0] is step:
        return counted[1]
    if step.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("step() is being captured right after its states came from elsewhere; take one step outside of the graph first")
    return int(step.item())


def _check_state(
    state: dict[str, Any], param: Tensor, weight: Tensor, right: bool, rank: int, group: dict[str, Any], group_index: int, param_index: int
) -> None:
    if isinstance(count := state.get("step"), Tensor) and (count.dtype, count.shape, count.device) != (torch.float32, (), param.device):
        state["step"] = count.detach().to(param.device, torch.float32).reshape(())
    _follow(state, param)
    expected = (weight.shape[1 if right else 0], rank)
    if state["basis"].shape[-2:] != expected:
        where = describe(group, group_index, param_index)
        raise ValueError(
            f"the state's basis is {tuple(state['basis'].shape[-2:])} but rank={group['rank']}, proj_type={group['proj_type']!r} need "
            f"{expected} ({where}); they cannot change after the first step: restore them, or delete optimizer.state[param] to restart it"
        )
    bits = 8 if "exp_avg" in state and state["exp_avg"].dtype == torch.uint8 else 32
    if bits != group["state_bits"]:
        where = describe(group, group_index, param_index)
        raise ValueError(
            f"the state has {bits}-bit moments but state_bits={group['state_bits']} ({where}); it cannot change after the first step: "
            "restore it, or delete optimizer.state[param] to restart it"
        )


def _follow(state: dict[str, Any], param: Tensor) -> None:
    """Casts and moves a state whose parameter was, as by model.to(…)."""
    if (state["basis"].dtype, state["basis"].device) == (param.dtype, param.device):
        return
    state["basis"] = own_memory(state["basis"].to(param.device, param.dtype))
    wide = torch.promote_types(param.dtype, torch.float32)
    for key, value in state.items():
        if key not in ("basis", "step") and isinstance(value, Tensor):
            is_moment = value.is_floating_point() and not key.endswith("scale")
            state[key] = value.to(param.device, wide if is_moment else value.dtype)
