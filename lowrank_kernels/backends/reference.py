"""A step in plain PyTorch. Every kernel is tested against it, and it runs where there is no kernel.

Orientation: G' = G on the left side and Gᵀ on the right, of shape (m, n); likewise W'. P is (m, r). R, M, V
and N are (r, n) on both sides. Arithmetic runs in the widest dtype of its inputs and at least fp32, and
rounds once, when the result is stored. In fp64 these functions are exact enough to judge everything else.
rules/ defines N from R, and lifts/ defines how N moves W'.
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
    """G → G', W → W', and back. On the right side this is the transpose, as a view."""
    return matrix.mT if right else matrix


def project(basis: Tensor, grad: Tensor, right: bool) -> Tensor:
    """R = PᵀG', (…, r, n) in fp32 (fp64 for fp64 inputs). basis: (…, m, r). grad: as stored."""
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
    """W' = (1 − lr·wd)·W' − lr·α·D in place: decay comes first, and the result is rounded once.

    weight: as stored. direction: D, (…, m, n). rounding_seed: (1,) int64, for one bf16 weight that is rounded
    stochastically at update number `step`.
    """
    dtype = compute_dtype(weight, direction)
    updated = (1 - lr * weight_decay) * weight.to(dtype) - (lr * scale) * orient(direction, right)
    weight.copy_(updated if rounding_seed is None else round_stochastically(updated, rounding_seed, step))


@contextlib.contextmanager
def kept_where(found_inf: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Undoes writes to `tensors` inside the context where found_inf ≠ 0. The host does not wait for the
    device."""
    before = [] if found_inf is None else [tensor.clone() for tensor in tensors]
    yield
    for tensor, kept in zip(tensors, before, strict=False):
        tensor.copy_(torch.where(found_inf.to(tensor.device) != 0, kept, tensor))


def step(bucket: Bucket, hyper: Hyper) -> None:
    """Moves the bucket's weights and states by one update, in place."""
    projected = project_bucket(bucket) if bucket.projected is None else bucket.projected
    lift(bucket, hyper, projected, update(bucket, hyper, projected))


def project_bucket(bucket: Bucket) -> list[Tensor]:
    """R (r, n) of each matrix."""
    return [project(basis, grad, bucket.right) for basis, grad in zip(bucket.bases, bucket.grads, strict=True)]


def update(bucket: Bucket, hyper: Hyper, projected: list[Tensor]) -> Tensor:
    """Computes N (B, r, n) from R by the rule, and updates the rule's states in place. Where found_inf ≠ 0
    the states stay and N is meaningless."""
    dtype = compute_dtype(bucket.weights[0], bucket.bases[0], projected[0])
    names, normalised = hyper.storage.layout(hyper.rule.state(1, 1), dtype), []
    for index, r in enumerate(r.to(dtype) for r in projected):
        stored = {name: bucket.states[name][index] for name in names}
        with kept_where(bucket.found_inf, list(stored.values())):
            values = hyper.storage.load(stored, r.dtype)
            step = number(bucket.steps[index])
            normalised.append(hyper.rule.update(r, values, step, **hyper.options))
            hyper.storage.store_(values, stored, step)
    return torch.stack(normalised)


def lift(bucket: Bucket, hyper: Hyper, projected: list[Tensor], normalised: Tensor) -> None:
    """Moves the weights by the lift, and updates the lift's states, all in place."""
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
    """t = count + 1, the number of the update that comes after `count` updates. It is a float where reading
    `count` waits for nothing, and elsewhere an fp64 tensor, which is exact."""
    return count.item() + 1 if type(count) is Tensor and count.device.type == "cpu" else count.double() + 1
