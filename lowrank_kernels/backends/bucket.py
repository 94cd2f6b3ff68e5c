"""The inputs of one step of a bucket: its tensors (Bucket) and the values of its group (Hyper)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..lifts import Lift
    from ..rules import Rule
    from ..storage import Storage


@dataclass(frozen=True)
class Hyper:
    """A group's rule, lift and storage, and the numbers that they need. options: the rule's own keys, such as
    betas and eps."""

    rule: Rule
    lift: Lift
    storage: Storage
    lr: float | Tensor
    scale: float = 1.0
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> tuple[str, str, str]:
        """The names of rule, lift and storage. Devices list their fused steps by them."""
        return self.rule.name, self.lift.name, self.storage.name


@dataclass
class Bucket:
    """B matrices of equal shape, strides, dtype and device. Every list has one tensor for each matrix.

    weights: as stored, (m, n), or (n, m) where `right`. bases: (m, r). states: the tensors of the rule and
    the lift, by name, as the storage stores them; those of a rule are (r, n) and row-major. steps: one fp32
    for each matrix, the number of its updates before this one.

    Either `grads` or `projected` is given. grads: the gradients as stored, from which R is computed.
    projected: R itself, (r, n), row-major, of any float dtype.

    found_inf: one fp32 on the device; if it is not zero, nothing moves. rounding_seeds: (B,) int64, for bf16
    weights that are rounded stochastically.
    """

    weights: list[Tensor]
    bases: list[Tensor]
    states: dict[str, list[Tensor]]
    steps: list[Tensor]
    right: bool
    grads: list[Tensor] | None = None
    projected: list[Tensor] | None = None
    found_inf: Tensor | None = None
    rounding_seeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @property
    def extents(self) -> tuple[int, int, int]:
        """m, n, r. n is that of R where the bucket brings R: a process may hold R of a piece of the columns
        alone."""
        m, rank = self.bases[0].shape
        return m, self.weights[0].shape[0 if self.right else 1] if self.projected is None else self.projected[0].shape[1], rank

    def part(self, start: int, stop: int) -> Bucket:
        """The bucket of the matrices from `start` to `stop`, without copying them."""
        cut = slice(start, stop)
        return replace(
            self,
            weights=self.weights[cut],
            bases=self.bases[cut],
            states={name: tensors[cut] for name, tensors in self.states.items()},
            steps=self.steps[cut],
            grads=None if self.grads is None else self.grads[cut],
            projected=None if self.projected is None else self.projected[cut],
            rounding_seeds=None if self.rounding_seeds is None else self.rounding_seeds[cut],
        )

    def check(self, hyper: Hyper) -> None:
        """Raises ValueError where the tensors of a list are not alike, or the lists do not fit each other or
        the method. An optimizer checks its states where it makes buckets; this is for other callers."""
        if not self.weights:
            raise ValueError("weights is empty: a bucket holds at least one matrix")
        if (self.grads is None) == (self.projected is None):
            raise ValueError("a bucket has either grads or projected")
        _check_alike("weights", self.weights, len(self), self.device)
        m, n, rank = self.extents
        if (self.weights[0].shape[1 if self.right else 0]) != m:
            side, shape = ("right", "(n, m)") if self.right else ("left", "(m, n)")
            raise ValueError(
                f"a basis (m, r) must fit a {side} weight {shape}, got {tuple(self.bases[0].shape)} and {tuple(self.weights[0].shape)}"
            )
        _check_alike("bases", self.bases, len(self), self.device)
        if self.grads is not None:
            _check_alike("grads", self.grads, len(self), self.device)
            if self.grads[0].shape != self.weights[0].shape:
                raise ValueError(f"weights {tuple(self.weights[0].shape)} and grads {tuple(self.grads[0].shape)} must share a shape")
        else:
            _check_alike("projected", self.projected, len(self), self.device)
            first = self.projected[0]
            if first.shape != (rank, n) or not first.is_contiguous() or not first.is_floating_point():
                raise ValueError(
                    f"projected must be row-major {(rank, n)} of a float dtype, got {tuple(first.shape)}, strides {first.stride()}, "
                    f"{first.dtype}"
                )
        state_dtype = torch.float64 if torch.float64 in (self.weights[0].dtype, self.bases[0].dtype) else torch.float32
        expected = hyper.storage.layout(hyper.rule.state(rank, n), state_dtype)
        expected |= {name: (shape, torch.float32) for name, shape in hyper.lift.state().items()}
        if self.states.keys() != expected.keys():
            raise ValueError(f"states must be {', '.join(expected)} for {hyper.method}, got {', '.join(self.states)}")
        for name, tensors in self.states.items():
            _check_alike(name, tensors, len(self), self.device)
            shape, dtype = expected[name]
            if tuple(tensors[0].shape) != tuple(shape) or tensors[0].dtype != dtype:
                raise ValueError(f"{name} must be {tuple(shape)} {dtype}, got {tuple(tensors[0].shape)} {tensors[0].dtype}")
            if not tensors[0].is_contiguous():
                raise ValueError(f"{name} must be row-major, got strides {tensors[0].stride()} of shape {tuple(shape)}")
        _check_alike("steps", self.steps, len(self), self.device)
        for name, scalar in (("steps", self.steps[0]), ("found_inf", self.found_inf), ("lr", hyper.lr)):
            if isinstance(scalar, Tensor) and (scalar.numel() != 1 or scalar.dtype != torch.float32 or scalar.device != self.device):
                raise ValueError(f"{name} must be one float32 on {self.device}, got {tuple(scalar.shape)}, {scalar.dtype}, {scalar.device}")
        seeds = self.rounding_seeds
        if seeds is not None and (self.weights[0].dtype != torch.bfloat16 or seeds.shape != (len(self),) or seeds.dtype != torch.int64):
            raise ValueError(
                f"rounding_seeds are ({len(self)},) int64 for bfloat16 weights, got {tuple(seeds.shape)}, {seeds.dtype} for "
                f"{self.weights[0].dtype}; leave them out to round to nearest"
            )


def _check_alike(name: str, tensors: list[Tensor], count: int, device: torch.device) -> None:
    if len(tensors) != count:
        raise ValueError(f"buckets must hold equally many matrices, got {len(tensors)} {name} for {count} weights")
    first = tensors[0]
    for index, tensor in enumerate(tensors):
        if (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) != (first.shape, first.stride(), first.dtype, device):
            raise ValueError(
                f"{name} must share shape, strides, dtype and device to be one bucket: [0] has {tuple(first.shape)}, {first.stride()}, "
                f"{first.dtype}, {device}; [{index}] has {tuple(tensor.shape)}, {tensor.stride()}, {tensor.dtype}, {tensor.device}"
            )
