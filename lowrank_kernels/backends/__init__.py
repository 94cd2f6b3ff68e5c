"""Takes one step of a bucket with the best implementation that its device has.

    step = fused[rule, lift, storage]         one call, from G or R to W
         = project → update → lift            each is the device's own, or that of reference.py if it has none

A backend knows tensors, never optimizers. `LOWRANK_KERNELS_REFERENCE=1` in the environment forces plain
PyTorch everywhere, for debugging. Tensor subclasses and dispatch modes (fake tensors, loggers) also run in
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.dispatch import REFERENCE_FORCED
from . import cpu, cuda, foreach, reference
from .bucket import Bucket, Hyper

__all__ = ["BACKENDS", "Backend", "Bucket", "Hyper", "backend_of", "lift", "project", "step", "update"]


@dataclass(frozen=True)
class Backend:
    """The implementations that a device has of its own, and which buckets they cover."""

    covers: Callable[[Bucket], bool] = lambda bucket: True
    project: Callable[[Bucket], list[Tensor]] = reference.project_bucket
    fused: dict[tuple[str, str, str], Callable[[Bucket, Hyper], None]] = field(default_factory=dict)
    """Whole steps, by the names of rule, lift and storage."""
    rules: dict[tuple[str, str], Callable[[Bucket, Hyper, list[Tensor]], Tensor]] = field(default_factory=dict)
    """Functions from R to N, by the names of rule and storage."""
    any_rule: Callable[[Bucket, Hyper, list[Tensor]], Tensor] = reference.update
    """For the rules that are not in `rules`."""
    lifts: dict[str, Callable[[Bucket, Hyper, Tensor], None]] = field(default_factory=dict)
    """Lifts that take N alone, by name."""


REFERENCE = Backend()
STORAGES = ("plain", "eight_bit")
ADAMW = [("adamw", "back_projection", storage) for storage in STORAGES]
FIRA = [("adamw", "residual", storage) for storage in STORAGES]
APOLLO = [("adamw", lift, storage) for lift in ("channel_scaling", "tensor_scaling") for storage in STORAGES]
BACKENDS = {
    "cpu": Backend(
        project=cpu.project_bucket,
        fused=dict.fromkeys(ADAMW, cpu.step),
        rules={("adamw", "plain"): cpu.update, ("sgd", "plain"): foreach.sgd},
        lifts={"back_projection": cpu.lift},
    ),
    "cuda": Backend(
        covers=cuda.covers,
        project=cuda.project,
        fused=dict.fromkeys(ADAMW, cuda.step) | dict.fromkeys(FIRA, cuda.residual_step) | dict.fromkeys(APOLLO, cuda.scaling_step),
        rules={("adamw", "plain"): cuda.update, ("sgd", "plain"): foreach.sgd},
        any_rule=foreach.batched,
        lifts={"back_projection": cuda.lift},
    ),
}


def backend_of(bucket: Bucket) -> Backend:
    weight = bucket.weights[0]
    if REFERENCE_FORCED or type(weight) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack():
        return REFERENCE
    backend = BACKENDS.get(weight.device.type, REFERENCE)
    return backend if backend.covers(bucket) else REFERENCE


def step(bucket: Bucket, hyper: Hyper) -> None:
    """Moves the bucket's weights and states by one update, in place. It leaves `steps` unchanged; the caller
    counts the update."""
    if hyper.lift.takes_gradient and bucket.grads is None:
        raise ValueError(f"the lift {hyper.lift.name!r} moves the weights by their gradients, and this bucket brings R alone")
    fused = backend_of(bucket).fused.get(hyper.method)
    if fused is not None:
        fused(bucket, hyper)
        return
    projected = project(bucket) if bucket.projected is None else bucket.projected
    lift(bucket, hyper, projected, update(bucket, hyper, projected))


def project(bucket: Bucket) -> list[Tensor]:
    """R = PᵀG' (r, n) of each of the bucket's gradients."""
    return backend_of(bucket).project(bucket)


def update(bucket: Bucket, hyper: Hyper, projected: list[Tensor]) -> Tensor:
    """Computes N (B, r, n) from R and updates the rule's states in place."""
    backend = backend_of(bucket)
    return backend.rules.get((hyper.rule.name, hyper.storage.name), backend.any_rule)(bucket, hyper, projected)


def lift(bucket: Bucket, hyper: Hyper, projected: list[Tensor], normalised: Tensor) -> None:
    """Moves the weights, in place, from N and, where the lift takes them, R and G. Updates the lift's states
    in place."""
    own = backend_of(bucket).lifts.get(hyper.lift.name)
    if own is None:
        reference.lift(bucket, hyper, projected, normalised)
    else:
        own(bucket, hyper, normalised)
