"""A communication hook for DistributedDataParallel that sends R = PᵀG' in place of G."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends.reference import compute_dtype, orient
from ..ops.dispatch import outside_training
from ..optim import LowRankOptimizer, RSOAdamW
from ..optim.buckets import Members, bucket_of_one
from ..optim.groups import describe, is_low_rank
from ..optim.in_backward import find_group, project


def compress_gradients(model: nn.parallel.DistributedDataParallel, optimizer: LowRankOptimizer) -> CompressedGradients:
    """Registers a communication hook with which the processes exchange R instead of the gradients of
    projected parameters.

        R = mean over processes of PᵀGᵢ',  then  G' = P·R

    The optimizer, clipping and logging then go on as before. The step computes PᵀG' = PᵀP·R = R, so that the
    update is that of the full gradient to rounding. What is lost is the part of G outside of the subspace,
    which the step does not use; torch.nn.utils.clip_grad_norm_ sees ‖R‖.

    A matrix sends r·n elements in place of m·n, in the dtype of its gradient. A gradient from which a basis
    is due is sent whole; with `stagger` these spread over the steps. So are the gradients of parameters that
    are not projected. Messages are DDP's own buckets, and overlap with the backward pass as these do. With
    model.no_sync() the sum of the gradients is sent once a step.

        model = DistributedDataParallel(model)
        optimizer = lrk.I3SAdamW(lrk.param_groups(model, rank=128, stagger=True))
        lrk.distributed.compress_gradients(model, optimizer)

    DDP holds full gradients, twice. `in_backward` with process_group holds none and sends R once a step, but
    does not overlap.

    The hook stays with the model and belongs to this optimizer. Once the optimizer is gone it sends all
    gradients whole, as DDP does. Where a matrix waits for its first gradient that is not zero, the host waits
    for the device once a step.

    Args:
        model: has no communication hook yet.
        optimizer: a low-rank optimizer of this package with parameters of the model.

    Raises:
        TypeError: where model or optimizer is something else.
        ValueError: for a lift that needs the part of G outside of the subspace (Fira, APOLLO), for
            selection="gaussian", whose PᵀP is not I; for RSOAdamW, whose gradients are R already; where no
            parameter of the model is in a low-rank group.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(f"model must be a DistributedDataParallel, got {type(model).__name__}")
    if isinstance(optimizer, RSOAdamW):
        raise ValueError("the gradients of coordinates are R already: RSOAdamW under DistributedDataParallel sends nothing else")
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(f"optimizer must be a low-rank optimizer of lowrank_kernels, got {type(optimizer).__name__}")
    if optimizer._in_backward is not None:
        raise ValueError("the gradients of this optimizer are projected by in_backward, which takes their mean over the processes itself")
    of_model = set(model.parameters())
    places: dict[Tensor, tuple[int, int]] = {}
    for index, group in enumerate(optimizer.param_groups):
        if not is_low_rank(group):
            continue
        if optimizer.lifts[group["lift"]].takes_gradient:
            raise ValueError(
                f"lift={group['lift']!r} moves the weights by the part of the gradient outside of the subspace as well, which compressed "
                f"gradients do not have ({describe(group, index)})"
            )
        if group["selection"] == "gaussian":
            raise ValueError(
                f"selection='gaussian' draws bases with PᵀP ≠ I, so that PᵀP·R is not R ({describe(group, index)}); use 'random'"
            )
        places |= {param: (index, place) for place, param in enumerate(group["params"]) if param in of_model}
    if not places:
        raise ValueError("no parameter of the model is in a low-rank group of the optimizer")
    state = CompressedGradients(optimizer, places, model.process_group)
    model.register_comm_hook(state, _hook)
    return state


class CompressedGradients:
    """The state of the hook. sent_bytes: what this process has given to all-reduces so far."""

    def __init__(self, optimizer: LowRankOptimizer, places: dict[Tensor, tuple[int, int]], process_group: Any) -> None:
        self.sent_bytes = 0
        self._optimizer, self._places, self._process_group = weakref.ref(optimizer), places, process_group

    @outside_training
    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        grads = bucket.gradients()
        each = [self._members(param, grad) for param, grad in zip(bucket.parameters(), grads, strict=True)]
        parts = [[grad] if members is None else project(members) for members, grad in zip(each, grads, strict=True)]
        buffer = bucket.buffer()
        is_compressed = any(members is not None for members in each)
        message = torch.cat([tensor.reshape(-1).to(buffer.dtype) for part in parts for tensor in part]) if is_compressed else buffer
        message.div_(dist.get_world_size(self._process_group))
        self.sent_bytes += message.nbytes
        future = dist.all_reduce(message, group=self._process_group, async_op=True).get_future()

        @outside_training
        def write_back(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            arrived = done.value()[0]
            if not is_compressed:
                return arrived
            pieces = iter(arrived.split([tensor.numel() for part in parts for tensor in part]))
            for members, part, grad in zip(each, parts, grads, strict=True):
                mine = [next(pieces).view(tensor.shape) for tensor in part]
                if members is None:
                    grad.copy_(mine[0])
                else:
                    _write_back(grad, members, mine)
            return buffer

        return future.then(write_back)

    def _members(self, param: Tensor, grad: Tensor) -> Members | None:
        """The bucket of this parameter, or None where its gradient is sent whole. All processes must agree
        about that, so it depends on nothing that only one of them knows."""
        if param not in self._places:
            return None
        optimizer, (index, place) = self._optimizer(), self._places[param]
        if optimizer is None:
            return None
        group = find_group(optimizer, param, index, place)
        layout = functools.partial(optimizer._layout, optimizer._hyper(group))
        members = bucket_of_one(group, index, optimizer.state, layout, place, grad)
        optimizer._waiting.settle(optimizer.state, wait=True)
        return None if optimizer._due(group, [members]) else members


def _hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP takes the classes themselves as annotations, or none
    return state.reduce(bucket)


def _write_back(grad: Tensor, members: Members, projected: list[Tensor]) -> None:
    """G' = P·R, into the gradient."""
    for matrix, basis, each in zip(members.grads, members.of_matrices("basis"), projected, strict=True):
        dtype = compute_dtype(basis, each)
        matrix.copy_(orient(basis.to(dtype) @ each.to(dtype), members.right))
    if members.grads[0].data_ptr() != grad.data_ptr():  # some strides allow no view as a matrix
        grad.copy_(members.grads[0].view(grad.shape))
