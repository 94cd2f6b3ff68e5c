"""Which implementation an operator runs. A device's own runs if there is one and it covers the case, else the
default."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import torch

NAMESPACE = "lowrank_kernels"
REFERENCE_FORCED = os.environ.get("LOWRANK_KERNELS_REFERENCE", "0") not in ("", "0")
"""True if LOWRANK_KERNELS_REFERENCE=1. It is read once, at import; only the defaults are registered then."""


def define(name: str, schema: str, fake: Callable, default: Callable) -> Callable:
    """Defines lowrank_kernels::name with its fake and its default implementation. Returns the callable
    operator."""
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified, fake)
    torch.library.register_kernel(qualified, "default", default)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def written(*tensors: torch.Tensor) -> None:
    """Tells autograd that a kernel wrote these tensors. A backward pass through their old values then raises,
    as after any in-place op."""
    if any(tensor.is_inference() for tensor in tensors[:1]):  # they have no version; a call has either only such tensors or none
        tensors = tuple(tensor for tensor in tensors if not tensor.is_inference())
    torch.autograd.graph.increment_version(tensors)


def outside_training(function: Callable) -> Callable:
    """Runs `function` without autograd, and without autocast if that is on. Under autocast no basis would be
    orthonormal."""

    @functools.wraps(function)
    @torch.no_grad()
    def run(*args: object, **keywords: object) -> object:
        active = [device_type for device_type in ("cpu", "cuda") if torch.is_autocast_enabled(device_type)]
        if not active:
            return function(*args, **keywords)
        with contextlib.ExitStack() as stack:
            for device_type in active:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            return function(*args, **keywords)

    return run
