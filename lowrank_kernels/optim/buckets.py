"""Parameters of equal shape, dtype, device, strides, progress and hyperparameters form a bucket, which takes one op call a step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .groups import ADAMW_KEYS, LOW_RANK_DEFAULTS, describe, is_right, matrix_shape, refresh_offset

HYPERPARAMETERS = (*ADAMW_KEYS, "rank", *LOW_RANK_DEFAULTS)


@dataclass
class Member:
    """One parameter with a gradient: its place, when it refreshes, its state (empty before the first step) and its matrices."""

    param: Tensor
    index: int
    refresh_offset: int
    state: dict[str, Any]
    weights: list[Tensor]
    grads: list[Tensor]
    write_back: Tensor | None


@dataclass
class Bucket:
    """Members that share everything a launch needs. `hyper` holds their group's values; rank is already clamped."""

    hyper: dict[str, Any]
    right: bool
    rank: int
    step: int
    members: list[Member] = field(default_factory=list)

    @property
    def weights(self) -> list[Tensor]:
        return [matrix for member in self.members for matrix in member.weights]

    @property
    def grads(self) -> list[Tensor]:
        return [matrix for member in self.members for matrix in member.grads]

    @property
    def places(self) -> list[tuple[int, int]]:
        """(parameter index, number of the matrix in the parameter) of each matrix: what its random draws are keyed by."""
        return [(member.index, number) for member in self.members for number in range(len(member.weights))]

    @property
    def refresh_number(self) -> int:
        """⌈step / gap⌉, which all draws hang on: 0 at the first step, and one more at each refresh of a parameter, whatever its offset."""
        return -(-self.step // self.hyper["update_proj_gap"])

    def due(self) -> Bucket:
        """The members that need a new basis before this update: all at their first one, afterwards those whose turn it is."""
        turn = self.step % self.hyper["update_proj_gap"]
        return replace(self, members=[member for member in self.members if self.step == 0 or member.refresh_offset == turn])

    def states(self, key: str) -> list[Tensor]:
        return [matrix for member in self.members for matrix in split(member.state[key])]


def split(tensor: Tensor) -> list[Tensor]:
    """A 2-D tensor as it is, a 3-D one as its matrices (views)."""
    return list(tensor.unbind()) if tensor.dim() == 3 else [tensor]


def join(matrices: list[Tensor], param: Tensor) -> Tensor:
    """The inverse of `split` for a state of `param`."""
    return torch.stack(matrices) if param.dim() == 3 else matrices[0]


def check_grad(group: dict[str, Any], group_index: int, param_index: int) -> None:
    """Raises TypeError or ValueError for a gradient that no update can use, before anything is changed."""
    grad = group["params"][param_index].grad
    if grad.layout != torch.strided:
        where = describe(group, group_index, param_index)
        raise TypeError(f"the gradient is sparse ({grad.layout}) in {where}; make it dense, or use torch.optim.SparseAdam for it")
    if "rank" in group and not grad.is_floating_point():
        where = describe(group, group_index, param_index)
        raise TypeError(f"the gradient is {grad.dtype} in {where}; a low-rank group takes real floating-point gradients")


def build(groups: Iterable[tuple[int, dict[str, Any], int]], states: dict[Tensor, dict[str, Any]]) -> list[Bucket]:
    """Buckets of the low-rank groups given as (group index, group, index of its first parameter), in order of first appearance."""
    buckets: dict[Any, Bucket] = {}
    numbers: dict[Any, int] = {}  # of equal hyperparameters, so that a bucket's key is short
    for group_index, group, first in groups:
        hyper = {key: group[key] for key in HYPERPARAMETERS}
        hyper["lr"] = float(hyper["lr"])
        hyper_number = numbers.setdefault(tuple(hyper.values()), len(numbers))
        sides: dict[torch.Size, tuple[bool, int]] = {}
        seen = set()
        for param_index, param in enumerate(group["params"]):
            if (grad := param.grad) is None or param in seen:
                continue
            seen.add(param)
            if (side := sides.get(param.shape)) is None:
                shape = matrix_shape(param)
                side = sides[param.shape] = is_right(shape, group["proj_type"]), min(group["rank"], *shape)
            right, rank = side
            weight, copied = param.detach(), False
            if param.dim() == 2:
                weights, grads = [weight], [grad]
            elif param.dim() == 3:
                weights, grads = split(weight), split(grad)
            else:
                weights, grads = [weight.flatten(1)], [grad.flatten(1)]
                copied = weights[0].data_ptr() != weight.data_ptr()
            state = states.get(param) or {}
            if state:
                _check_state(state, weights[0], right, rank, group, group_index, param_index)
            # A first step that was skipped leaves a state with a basis at step 0; it has no bucket in common with none.
            progress = (state["step"], True) if state else (0, False)
            first_weight, first_grad = weights[0], grads[0]
            layout = (first_weight.stride(), first_grad.stride(), weight.dtype, grad.dtype, weight.device)
            key = (hyper_number, first_weight.shape, layout, progress)
            if (bucket := buckets.get(key)) is None:
                bucket = buckets[key] = Bucket(hyper, right, rank, progress[0])
            offset = refresh_offset(group, param_index)
            bucket.members.append(Member(param, first + param_index, offset, state, weights, grads, first_weight if copied else None))
    return list(buckets.values())


def _check_state(
    state: dict[str, Any], weight: Tensor, right: bool, rank: int, group: dict[str, Any], group_index: int, param_index: int
) -> None:
    expected = (weight.shape[1 if right else 0], rank)
    if state["basis"].shape[-2:] != expected:
        where = describe(group, group_index, param_index)
        raise ValueError(
            f"the state's basis is {tuple(state['basis'].shape[-2:])} but rank={group['rank']}, proj_type={group['proj_type']!r} need "
            f"{expected} ({where}); they cannot change after the first step: restore them, or delete optimizer.state[param] to restart it"
        )


def new_moments(member: Member, rank: int, right: bool) -> Tensor:
    """Zeros (r, n), or (experts, r, n): fp32, fp64 for fp64 weights."""
    rows, columns = member.weights[0].shape
    shape = (rank, rows if right else columns)
    if member.param.dim() == 3:
        shape = (len(member.weights), *shape)
    dtype = torch.float64 if member.param.dtype == torch.float64 else torch.float32
    return torch.zeros(math.prod(shape), dtype=dtype, device=member.param.device).view(shape)
