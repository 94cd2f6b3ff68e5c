"""A step in plain PyTorch: the truth that every kernel is tested against, and what runs where there is no
kernel.

Orientation. G' = G on the left side and Gᵀ on the right, of shape (m, n); likewise W'. P is (m, r); R, M, V,
N are (r, n) on both sides. Arithmetic runs in the widest dtype of its inputs and at least fp32, and rounds
once, when the result is stored. In fp64 these functions are exact enough to judge everything else. What R
becomes is said by rules/, what N becomes by lifts/.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..rounding import round_stochastically
from .bucket import Bucket, Hyper


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def orient(matrix: Tensor, right: bool) -> Tensor:
    """G → G', W → W' (and back): the transpose, as a view, on the right side."""
    return matrix.mT if right else matrix


def project(basis: Tensor, grad: Tensor, right: bool) -> Tensor:
    """R = PᵀG'. basis (…, m, r); grad as stored → (…, r, n), fp32 (fp64 for fp64 inputs)."""
    dtype = compute_dtype(basis, grad)
    return basis.mT.to(dtype) @ orient(grad, right).to(dtype)


def move_(
    weight: Tensor,
    direction: Tensor,
    *,
    lr: float | Tensor,
    scale: float,
    weight_decay: float,
    right: bool,
    rounding_seed: Tensor | None = None,
    step: float | Tensor | None = None,
) -> None:
    """W' = (1 − lr·wd)·W' − lr·α·D in place: decay first, one rounding. weight as stored; direction (…, m,
    n).

    rounding_seed: (1,) int64, for one bf16 weight rounded stochastically at update number `step`.
    """
    dtype = compute_dtype(weight, direction)
    updated = (1 - lr * weight_decay) * weight.to(dtype) - (lr * scale) * orient(direction, right)
    weight.copy_(updated if rounding_seed is None else round_stochastically(updated, rounding_seed, step))


@contextlib.contextmanager
def kept_where(found_inf: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """What is written to `tensors` inside is undone where found_inf ≠ 0, without asking the device."""
    before = [] if found_inf is None else [tensor.clone() for tensor in tensors]
    yield
    for tensor, kept in zip(tensors, before, strict=False):
        tensor.copy_(torch.where(found_inf.to(tensor.device) != 0, kept, tensor))


def step(bucket: Bucket, hyper: Hyper) -> None:
    """One update of the bucket, in place."""
    projected = project_bucket(bucket) if bucket.projected is None else bucket.projected
    lift(bucket, hyper, projected, update(bucket, hyper, projected))


def project_bucket(bucket: Bucket) -> Tensor:
    """R (B, r, n)."""
    return torch.stack([project(basis, grad, bucket.right) for basis, grad in zip(bucket.bases, bucket.grads, strict=True)])


def update(bucket: Bucket, hyper: Hyper, projected: Tensor) -> Tensor:
    """N (B, r, n) of R, by the rule, whose states move. N is not to be used where found_inf ≠ 0."""
    names, normalised = hyper.storage.layout(hyper.rule.state(1, 1), projected.dtype), []
    for index, r in enumerate(projected):
        stored = {name: bucket.states[name][index] for name in names}
        with kept_where(bucket.found_inf, list(stored.values())):
            values = hyper.storage.load(stored, r.dtype)
            normalised.append(hyper.rule.update(r, values, number(bucket.steps[index]), **hyper.options))
            hyper.storage.store_(values, stored)
    return torch.stack(normalised)


def lift(bucket: Bucket, hyper: Hyper, projected: Tensor, normalised: Tensor) -> None:
    """The weights, by the lift, whose states move too."""
    rate = hyper.lr.double().reshape(()) if isinstance(hyper.lr, Tensor) else hyper.lr
    options = dict(lr=rate, scale=hyper.scale, weight_decay=hyper.weight_decay, right=bucket.right)
    names = hyper.lift.state()
    for index, weight in enumerate(bucket.weights):
        state = {name: bucket.states[name][index] for name in names}
        dtype = compute_dtype(weight, normalised)
        grad = orient(bucket.grads[index], bucket.right).to(dtype) if hyper.lift.takes_gradient else None
        seed = None if bucket.rounding_seeds is None else bucket.rounding_seeds[index : index + 1]
        with kept_where(bucket.found_inf, [weight, *state.values()]):
            basis, n, r = bucket.bases[index].to(dtype), normalised[index].to(dtype), projected[index].to(dtype)
            direction = hyper.lift.direction(basis, n, grad=grad, projected=r, state=state)
            move_(weight, direction, **options, rounding_seed=seed, step=number(bucket.steps[index]))


def number(count: Tensor) -> float | Tensor:
    """t, the number of the update that comes after `count` of them. Read where that waits for nothing,
    exactly in fp64 elsewhere."""
    return count.item() + 1 if type(count) is Tensor and count.device.type == "cpu" else count.double() + 1
