"""One AdamW step in the subspace: R = PᵀG', moments and N, W' = (1 − lr·wd)·W' − lr·α·P·N.

single_pass.py does it in one launch with R and N on the chip, two_pass.py in three with both in memory. Which one serves a bucket,
its pointer table and all launch arguments that stay are found once and kept; a step after that compares addresses and launches.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..eight_bit import scales_shape
from ..precision import tf32_allowed
from . import single_pass, table, two_pass
from .dots import FLOATS

KEPT = 1024
"""Prepared buckets that are kept; of more the one that was not used for longest goes."""


def adamw_step_(
    weights: list[Tensor],
    grads: list[Tensor],
    bases: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    step: int,
    right: bool,
    found_inf: Tensor | None = None,
    device_lr: Tensor | None = None,
    device_steps: Sequence[Tensor] | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    rounding_seeds: Tensor | None = None,
    vouched: Sequence[str] = (),
) -> None:
    """The step in place on weights and moments of a bucket; see reference.adamw_step_ for the arguments.

    Every list holds matrices of one shape, dtype and strides; moments, codes and scales are row-major. Weights, gradients and bases
    are fp32, bf16 or fp16, independently. Where found_inf is non-zero, weights and moments keep their bits. No step synchronises
    with the device. vouched: names of lists of which the caller knows that they are buckets, as it was at first; new tensors in them are
    not looked at again. Raises ValueError for lists that are no bucket, shapes that do not fit and arguments on another device.
    """
    lists = {"weights": weights, "grads": grads, "bases": bases, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    optional = {"exp_avg_scales": exp_avg_scales, "exp_avg_sq_scales": exp_avg_sq_scales, "steps": device_steps}
    lists |= {name: tensors for name, tensors in optional.items() if tensors}
    if not weights:
        raise ValueError("weights is empty: a bucket holds at least one matrix")
    device = weights[0].device
    if step < 1 and device_steps is None:
        raise ValueError(f"step counts from 1, got {step}")
    table.check_one_float("found_inf", found_inf, device)
    table.check_one_float("device_lr", device_lr, device)
    table.check_rounding_seeds(rounding_seeds, weights)
    launch = _prepared(lists, right, rounding_seeds is not None, vouched)
    launch(
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, scale=scale, step=step,
        found_inf=found_inf, device_lr=device_lr, rounding_seeds=rounding_seeds,
    )  # fmt: skip


class _Prepared:
    """What of a bucket's step stays the same: its table, and a launch for its shapes."""

    def __init__(self, lists: dict[str, list[Tensor]], right: bool, stochastic: bool) -> None:
        _check(lists, right)
        self.right, self.stochastic = right, stochastic
        self.device, self.count = lists["weights"][0].device, len(lists["weights"])
        self.layouts = _layouts(lists)
        self.table = table.CachedTable(list(lists.values()))
        self.aligned = self._aligned(lists)
        self.launch = self._choose(lists)

    def _aligned(self, lists: dict[str, list[Tensor]]) -> bool:
        """True when every matrix starts at a multiple of 16 bytes; a step's count is read as one float."""
        return all(aligned for name, aligned in zip(lists, self.table.aligned, strict=True) if name != "steps")

    def _choose(self, lists: dict[str, list[Tensor]]) -> Callable[..., None]:
        rows = table.Rows(**dict(zip(lists, self.table.rows, strict=True)))
        weight, grad, basis, exp_avg = (lists[name][0] for name in ("weights", "grads", "bases", "exp_avgs"))
        options = {"count": self.count, "aligned": self.aligned}
        path = choose_path(weight, grad, basis, exp_avg, **options)
        return path.prepare(rows, weight, grad, basis, exp_avg, right=self.right, stochastic=self.stochastic, **options)

    def follow(self, lists: dict[str, list[Tensor]], vouched: Sequence[str]) -> bool:
        """Whether it still serves these tensors, after its table followed them. New ones are checked as all were at first."""
        buckets = list(lists.values())
        if any(len(bucket) != self.count for bucket in buckets):
            return False
        fresh, moved = self.table.new_objects(buckets), self.table.moved(buckets)
        if fresh or moved:
            if _layouts(lists) != self.layouts:
                return False
            names = list(lists)
            _check_buckets({names[index]: buckets[index] for index in {*fresh, *moved} if names[index] not in vouched}, self.device)
            self.table.refill(moved)
        return self._aligned(lists) == self.aligned


_kept: OrderedDict[tuple, _Prepared] = OrderedDict()
_lock = threading.Lock()


def _prepared(lists: dict[str, list[Tensor]], right: bool, stochastic: bool, vouched: Sequence[str]) -> Callable[..., None]:
    weight = lists["weights"][0]
    stream = 0
    if weight.is_cuda:
        if torch.cuda.is_current_stream_capturing():  # a graph needs a table of its own, which no later step refills
            return _Prepared(lists, right, stochastic).launch
        stream = torch.cuda.current_stream(weight.device).cuda_stream
        table.reserve.top_up()
    key = (weight.data_ptr(), len(lists["weights"]), tuple(lists), right, stochastic, tf32_allowed(), weight.device, stream)
    with _lock:
        found = _kept.pop(key, None)
    if found is None or not found.follow(lists, vouched):
        found = _Prepared(lists, right, stochastic)
    with _lock:
        _kept[key] = found  # as the last one
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    return found.launch


def choose_path(weight: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, *, count: int, aligned: bool) -> ModuleType:
    """The module whose `prepare` serves the bucket: single_pass where it has tiles for it and enough programs to fill the device."""
    return single_pass if single_pass.serves(weight, grad, basis, exp_avg, count=count, aligned=aligned) else two_pass


def _layouts(lists: dict[str, list[Tensor]]) -> list[tuple]:
    return [(tensors[0].shape, tensors[0].stride(), tensors[0].dtype, tensors[0].device) for tensors in lists.values()]


def _check(lists: dict[str, list[Tensor]], right: bool) -> None:
    table.check_same_length(**lists)
    weight, grad, basis, exp_avg, exp_avg_sq = (lists[name][0] for name in ("weights", "grads", "bases", "exp_avgs", "exp_avg_sqs"))
    _check_buckets(lists, weight.device)
    table.check_same_device(**lists)
    if weight.shape != grad.shape:
        raise ValueError(f"weights {tuple(weight.shape)} and grads {tuple(grad.shape)} must share a shape")
    table.check_basis_fits("weight", weight, basis, right)
    rank, n = basis.shape[1], weight.shape[0 if right else 1]
    for name in ("exp_avgs", "exp_avg_sqs"):
        if (shape := tuple(lists[name][0].shape)) != (rank, n):
            raise ValueError(f"{name} {shape} must be (r, n) = {(rank, n)}")
    coded = exp_avg.dtype == torch.uint8
    if exp_avg.dtype != exp_avg_sq.dtype:
        raise ValueError(f"exp_avgs and exp_avg_sqs must share a dtype, got {exp_avg.dtype} and {exp_avg_sq.dtype}")
    if coded != ("exp_avg_scales" in lists) or coded != ("exp_avg_sq_scales" in lists):
        raise ValueError("8-bit moments (torch.uint8) come with exp_avg_scales and exp_avg_sq_scales, others without")
    for name in ("exp_avg_scales", "exp_avg_sq_scales") if coded else ():
        if (shape := tuple(lists[name][0].shape)) != (expected := scales_shape((rank, n))):
            raise ValueError(f"{name} {shape} must be (r, ⌈n / 64⌉) = {expected}")


def _check_buckets(lists: dict[str, list[Tensor]], device: torch.device) -> None:
    for name, tensors in lists.items():
        if name == "steps":
            for count in tensors:
                table.check_one_float("device_steps", count, device)
        elif name in ("weights", "grads", "bases"):
            table.check_bucket(name, tensors, FLOATS)
        elif name in ("exp_avgs", "exp_avg_sqs"):
            table.check_bucket(name, tensors, (torch.float32, torch.uint8), row_major=True)
        else:
            table.check_bucket(name, tensors, (torch.float32,), row_major=True)
