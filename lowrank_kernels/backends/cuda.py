"""The step on a GPU, by the Triton kernels. Triton is imported only where a kernel is launched, so that runs
on a CPU do not need it."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from ..ops.dispatch import written
from .bucket import Bucket, Hyper

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def triton_missing() -> str | None:
    """The reason why the Triton kernels cannot run here, or None if they can. Warns once if there is a GPU
    that would have used them."""
    if importlib.util.find_spec("triton") is not None:
        return None
    reason = "Triton is not installed"
    if torch.cuda.is_available():
        warnings.warn(
            f"lowrank_kernels: {reason}; low-rank steps on the GPU run in plain PyTorch, which takes several launches a matrix. "
            "Install triton to use the kernels.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def covers(bucket: Bucket) -> bool:
    """Whether the kernels can run this bucket. They take fp32, bf16 and fp16; anything else (fp64) runs in
    plain PyTorch."""
    matrices = [bucket.weights[0], bucket.bases[0], (bucket.projected if bucket.grads is None else bucket.grads)[0]]
    return triton_missing() is None and all(matrix.dtype in FLOATS for matrix in matrices)


def step(bucket: Bucket, hyper: Hyper) -> None:
    from .triton import adamw_step

    adamw_step.step(bucket, hyper)
    written(*bucket.weights)  # only weights: no backward pass saves a state


def residual_step(bucket: Bucket, hyper: Hyper) -> None:
    from .triton import residual

    residual.step(bucket, hyper)
    written(*bucket.weights)


def scaling_step(bucket: Bucket, hyper: Hyper) -> None:
    from .triton import scaling

    scaling.step(bucket, hyper)
    written(*bucket.weights)


def project(bucket: Bucket) -> list[Tensor]:
    from .triton import composed

    return composed.project(bucket)


def update(bucket: Bucket, hyper: Hyper, projected: list[Tensor]) -> Tensor:
    from .triton import composed

    return composed.update(bucket, hyper, projected)


def lift(bucket: Bucket, hyper: Hyper, normalised: Tensor) -> None:
    from .triton import composed

    composed.lift(bucket, hyper, normalised)
    written(*bucket.weights)
