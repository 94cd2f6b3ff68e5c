"""SubspaceLinear: a linear layer that trains the r × out coordinates of its weight. It saves Z = x·P for its
backward pass instead of x.

SubspaceConv1D is the same for the Conv1D of transformers, which stores the transpose of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .owner import claim, release
from .subspace import Subspace


class _SubspaceLinearFunction(torch.autograd.Function):
    """y = x·Wᵀ + b;  dx = dy·W,  dB = Zᵀ·dy,  db = Σ dy. Saves Z and W."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, coordinates: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        y = F.linear(x, weight, bias)
        return torch.ops.aten._unsafe_view(y, y.shape)  # for some x, y is a view, and autograd would forbid changing it in place

    @staticmethod
    @once_differentiable  # a second derivative would need x
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = ctx.saved_tensors
        needs_x, _, needs_bias, _, needs_coordinates = ctx.needs_input_grad
        z = z.reshape(-1, z.shape[-1])
        rows = dy.reshape(z.shape[0], dy.shape[-1])
        dx = (rows @ weight.to(dy.dtype)).view(*dy.shape[:-1], weight.shape[1]) if needs_x else None
        db = rows.sum(0) if needs_bias else None
        dB = z.mT @ rows if needs_coordinates else None
        return dx, None, db, None, dB


class SubspaceLayer(nn.Module):
    """The base class of converted layers, for either way of storing the weight; see SubspaceLinear."""

    transposed = False
    """Whether `weight` is stored as (in, out)."""
    in_features: int
    out_features: int

    @property
    def matrix(self) -> Tensor:
        """W (out, in)."""
        return self.weight.mT if self.transposed else self.weight

    def _enter(self, subspace: Subspace) -> None:
        """Converts the layer: from now on its weight moves in `subspace`."""
        self.weight.requires_grad_(False)
        self.weight.grad = None
        weight = self.weight
        self.coordinates = nn.Parameter(torch.zeros(subspace.rank, self.out_features, dtype=weight.dtype, device=weight.device))
        self.subspace = subspace
        subspace.layers += 1
        claim(self)

    def _leave(self) -> None:
        """Turns the layer back into its original class, in place. The weight keeps its values."""
        release(self)
        self.subspace.layers -= 1
        del self.coordinates, self.subspace
        self.weight.requires_grad_(True)
        self._restore_class()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.coordinates.requires_grad:
            z = self.subspace.project(x, self.weight)
            return _SubspaceLinearFunction.apply(x, self.matrix, self.bias, z, self.coordinates)
        return F.linear(x, self.matrix, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.subspace.rank}, distribution={self.subspace.distribution!r}"

    # Coordinates are left out of checkpoints, because they are always zero.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "coordinates"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any):
        with self._changing_parameters():
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if prefix + "coordinates" in missing:
            missing.remove(prefix + "coordinates")

    # Optimizers find layers by their parameters. The methods below may replace parameters, so they claim
    # anew.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubspaceLayer:
        with self._changing_parameters():
            return super()._apply(fn, recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        claim(self)

    @contextmanager
    def _changing_parameters(self) -> Iterator[None]:
        """A context for code that may replace the parameters, or change their memory, dtypes or devices."""
        release(self)
        try:
            yield
        finally:
            weight, coordinates = self.weight, self.coordinates
            if (coordinates.device, coordinates.dtype) != (weight.device, weight.dtype):  # assign=True left these behind
                self.coordinates = nn.Parameter(weight.new_zeros(coordinates.shape), coordinates.requires_grad)
            else:
                coordinates.data.zero_()  # to_empty leaves the memory uninitialised
            self.subspace.keep_only(weight.device, weight.dtype)
            claim(self)


class SubspaceLinear(SubspaceLayer, nn.Linear):
    """nn.Linear whose weight moves in a random subspace: Wᵀ ← Wᵀ + P·ΔB (RSO, arXiv 2502.07222).

        y = x·Wᵀ + b          saved for the backward pass: Z = x·P, nothing of size in_features
        dx = dy·W,  dB = Zᵀ·dy,  db = Σ dy          the gradient of W is never formed

    W (out, in) is `weight`. It is always up to date and is not trained directly. B (r, out) is `coordinates`,
    the trained parameter. It carries the gradient dB for RSOAdamW, which moves W. B itself stays zero,
    because W already includes the movement. P (in, r) is in no checkpoint: `subspace` draws it from a seed
    and keeps it until the next P. The saved activations are tokens × r elements in the dtype of the product,
    which is the input's or autocast's. All layers that share a Subspace and read the same tensor save them
    once. The state_dict is that of nn.Linear, `weight` and `bias`.

    With coordinates.requires_grad_(False), and where gradients are off, the layer behaves as nn.Linear. A use
    of the weight outside of this layer's forward, as in a module tied to it later, trains nothing. Second
    derivatives raise RuntimeError, as do transforms of torch.func.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        rank: r, from 1 to in_features.
        distribution: the distribution of P, with E[P·Pᵀ] = I: "gaussian" N(0, 1/r) (default), "haar"
            sqrt(in/r)·Q with orthonormal Q, "rademacher" ±1/√r; "principal" [Q, sqrt((in − r₁)/r₂)·U], where
            Q are the r₁ principal directions of the layer's inputs, and U are r₂ = r − r₁ random ones
            orthogonal to them (PRAC, arXiv 2602.23111). Q comes from a sketch of the inputs of the last step
            before P is redrawn; the first P has none.
        principal_rank: r₁ of "principal", from 1 to r − 1 (r // 2).
        seed: P is a function of (seed, outer step), its shape and, of "principal", Q. Layers need different
            seeds to have different Ps; `to_subspace` sees to that.

    Raises:
        ValueError: rank, distribution, principal_rank or dtype out of range.
        TypeError: a seed that is no int.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
        distribution: str = "gaussian",
        seed: int = 0,
        principal_rank: int | None = None,
    ) -> None:
        subspace = Subspace(in_features, rank, distribution, seed, principal_rank=principal_rank)
        super().__init__(in_features, out_features, bias, device, dtype)
        if not self.weight.is_floating_point():
            raise ValueError(f"dtype must be a real floating-point type, got {dtype}")
        self._enter(subspace)

    def _restore_class(self) -> None:
        self.__class__ = nn.Linear


class SubspaceConv1D(SubspaceLayer):
    """As SubspaceLinear, for the Conv1D of transformers (GPT-2): y = x·W + b with `weight` W (in, out). Only
    `to_subspace` makes one."""

    transposed = True

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    def _convert(self, subspace: Subspace, original: type[nn.Module]) -> None:
        self._original = original
        self._enter(subspace)

    def _restore_class(self) -> None:
        original = self._original
        del self._original
        self.__class__ = original

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr().removeprefix(', ')}"
