"""The bytes of one parameter and its next refresh. What an optimizer has made is counted, and what it will
make comes from lowrank_kernels.estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..estimate import held
from ..nn import SubspaceLayer
from ..optim import LowRankOptimizer, RSOAdamW, refreshes
from ..sharded import local
from .rows import Bytes


@dataclass(frozen=True)
class Place:
    """Where an optimizer holds a parameter. index: the optimizer's number."""

    optimizer: Optimizer
    index: int
    group_index: int
    position: int

    @property
    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[self.group_index]


class States:
    """Counts tensors of states. One that several states share is counted with the first."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def bytes_of(self, state: dict[str, Any]) -> tuple[int, int]:
        """(of P, of everything else)."""
        basis = others = 0
        for name, value in state.items():
            if isinstance(value, Tensor) and id(value) not in self._seen:
                self._seen.add(id(value))
                count = local(value).nbytes
                basis, others = (basis + count, others) if name == "basis" else (basis, others + count)
        return basis, others


def gradient_bytes(param: Tensor) -> int:
    """Of the gradient that exists, or will."""
    if param.grad is not None and param.grad.layout == torch.strided:
        return local(param.grad).nbytes
    return local(param).nbytes if param.requires_grad else 0


def adamw(param: Tensor, is_trained: bool) -> Bytes:
    """Of the parameter under AdamW with moments in fp32 (fp64 for fp64)."""
    own = local(param)
    states = 2 * own.numel() * max(4, own.element_size()) + held.COUNT
    return Bytes(weights=own.nbytes, gradients=own.nbytes, states=states) if is_trained else Bytes(weights=own.nbytes)


def of_low_rank(place: Place, param: Tensor, states: States) -> tuple[held.Projected, Bytes]:
    """Of a parameter of a low-rank group."""
    optimizer: LowRankOptimizer = place.optimizer
    projected = held.of_low_rank(optimizer, place.group, param, held.spread(param))
    state = optimizer.state.get(param)
    basis, others = states.bytes_of(state) if state else (projected.basis, projected.states)
    gradients = gradient_bytes(param)
    if param.grad is None and optimizer._in_backward is not None:
        kept = optimizer._in_backward.bytes_of(param, projected.r_elements)
        gradients = gradients if kept is None else kept
    return projected, Bytes(weights=local(param).nbytes, gradients=gradients, bases=basis, states=others)


def of_layer(place: Place, layer: SubspaceLayer, states: States, owns_basis: bool) -> Bytes:
    """Of a converted layer. owns_basis: whether P counts here, and not with a layer that shares it."""
    optimizer: RSOAdamW = place.optimizer
    state = optimizer.state.get(layer.coordinates)
    if state:
        _, others = states.bytes_of(state)
    else:
        others = held.of_layer(optimizer, place.group, layer, held.spread(layer.weight))
    weight = local(layer.weight)
    return Bytes(
        weights=weight.nbytes,
        gradients=gradient_bytes(layer.coordinates),
        bases=held.of_subspace(layer.subspace, weight.dtype) if owns_basis else 0,
        states=others,
        coordinates=local(layer.coordinates).nbytes,
    )


def of_other(place: Place | None, param: Tensor, states: States) -> Bytes | None:
    """Of a parameter that is not projected; None where its optimizer's states are not known before a step."""
    own = local(param).nbytes
    found = 0
    if place is not None and (state := place.optimizer.state.get(param)):
        found = sum(states.bytes_of(state))
    elif place is not None and param.requires_grad:
        found = _to_come(place, own)
    return None if found is None else Bytes(weights=own, gradients=gradient_bytes(param), states=found)


def _to_come(place: Place, own: int) -> int | None:
    if isinstance(place.optimizer, LowRankOptimizer):
        return held.of_dense(own)
    if type(place.optimizer) in (Adam, AdamW):
        return held.of_dense(own) + own * bool(place.group["amsgrad"])
    if type(place.optimizer) is SGD:
        return own * (place.group["momentum"] != 0)
    return None


def next_refresh(place: Place, param: Tensor) -> int:
    """In how many calls of step() the parameter, or the coordinates, get their next basis."""
    optimizer, group = place.optimizer, place.group
    if isinstance(optimizer, RSOAdamW):
        return max(1, group["inner_steps"] - group["inner_step"])
    return refreshes.steps_until_next(group, place.position, optimizer.state.get(param, {}), optimizer._periods)
