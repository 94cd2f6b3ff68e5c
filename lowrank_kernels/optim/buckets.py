"""Parameters of equal shape, dtype, device, strides, progress and hyperparameters form a bucket, which takes one op call a step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .groups import ADAMW_KEYS, LOW_RANK_DEFAULTS, describe, is_right, matrix_shape

HYPERPARAMETERS = (*ADAMW_KEYS, "rank", *LOW_RANK_DEFAULTS)


@dataclass
class Member:
    """One parameter with a gradient: its place, its state (empty before the first step) and its matrices."""

    param: Tensor
    index: int
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

    def states(self, key: str) -> list[Tensor]:
        return [matrix for member in self.members for matrix in split(member.state[key])]


def split(tensor: Tensor) -> list[Tensor]:
    """A 2-D tensor as it is, a 3-D one as its matrices (views)."""
    return list(tensor.unbind()) if tensor.dim() == 3 else [tensor]


def join(matrices: list[Tensor], param: Tensor) -> Tensor:
    """The inverse of `split` for a state of `param`."""
    return torch.stack(matrices) if param.dim() == 3 else matrices[0]


def _matrices(tensor: Tensor) -> list[Tensor]:
    return split(tensor) if tensor.dim() <= 3 else [tensor.flatten(1)]


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
    for group_index, group, first in groups:
        hyper = {key: group[key] for key in HYPERPARAMETERS}
        hyper["lr"] = float(hyper["lr"])
        hyper_key = tuple(hyper.values())
        seen = set()
        for param_index, param in enumerate(group["params"]):
            if param.grad is None or param in seen:
                continue
            seen.add(param)
            shape = matrix_shape(param)
            right, rank = is_right(shape, group["proj_type"]), min(group["rank"], *shape)
            state = states.get(param, {})
            _check_state(state, shape, right, rank, group, group_index, param_index)
            weights, grads = _matrices(param.detach()), _matrices(param.grad)
            copied = param.dim() > 3 and weights[0].data_ptr() != param.data_ptr()
            step = state.get("step", 0)
            # A first step that was skipped leaves a state with a basis at step 0; it has no bucket in common with none.
            layout = (bool(state), weights[0].stride(), grads[0].stride(), weights[0].dtype, grads[0].dtype, param.device)
            key = (shape, layout, right, rank, step, hyper_key)
            if (bucket := buckets.get(key)) is None:
                bucket = buckets[key] = Bucket(hyper, right, rank, step)
            bucket.members.append(Member(param, first + param_index, state, weights, grads, weights[0] if copied else None))
    return list(buckets.values())


def _check_state(
    state: dict[str, Any], shape: tuple[int, int], right: bool, rank: int, group: dict[str, Any], group_index: int, param_index: int
) -> None:
    if not state:
        return
    m = shape[1] if right else shape[0]
    expected = (m, rank)
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
