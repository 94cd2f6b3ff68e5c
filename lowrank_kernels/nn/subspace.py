"""Subspace: the P of one layer, or of several layers that read the same input and share Z = x·P."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import philox
from ..ops.dispatch import outside_training
from ..subspaces import DISTRIBUTIONS, draw_projection, own_memory


@dataclass(frozen=True)
class _Projected:
    """Z of an input x that is still in use. circumstances: see `_circumstances`. left: how many layers may
    still ask for Z."""

    x: weakref.ref[Tensor]
    circumstances: tuple[object, ...]
    z: Tensor
    left: int


class Subspace:
    """P (in_features, r) with E[P·Pᵀ] = I, a function of (seed, place, outer_step). It is drawn when it is
    needed and is in no checkpoint.

    in_features, rank, distribution, seed: see SubspaceLinear. place: numbers that keep the Ps of one seed
    apart. outer_step: how often the optimizer has moved on to a new P.
    """

    def __init__(self, in_features: int, rank: int, distribution: str, seed: int, *place: int) -> None:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= in_features:
            raise ValueError(f"rank must be an int from 1 to in_features = {in_features}, got {rank!r}")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {', '.join(map(repr, DISTRIBUTIONS))}, got {distribution!r}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an int, got {seed!r}")
        self.in_features, self.rank, self.distribution, self.seed, self.place = in_features, rank, distribution, seed, place
        self.outer_step = 0
        self.layers = 0
        """How many layers share this subspace."""
        self.has_optimizer = False
        """Whether an RSOAdamW was built for these layers."""
        self._matrices: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._projected: _Projected | None = None

    @property
    def fingerprint(self) -> int:
        """A signed 64-bit number made from seed, place and distribution. It differs where the Ps differ.
        Checkpoints hold it."""
        return philox.signed64(philox.derive_seed(self.seed, list(DISTRIBUTIONS).index(self.distribution), *self.place))

    def matrix(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """P on the device and in the dtype of a layer's weight."""
        self._ensure_drawn(device, dtype)
        return self._matrices[device, dtype]

    @torch.compiler.assume_constant_result  # runs while the compiler traces, so that P is an input of the graph
    def _ensure_drawn(self, device: torch.device, dtype: torch.dtype) -> None:
        if type(self._matrices.get((device, dtype))) is not Tensor:  # a FakeTensor is valid in one trace only
            self._matrices[device, dtype] = self._draw(device, dtype, self.outer_step)

    def keep_only(self, device: torch.device, dtype: torch.dtype) -> None:
        """Frees the Ps on other devices and in other dtypes than these, and Z."""
        self._projected = None
        self._matrices = {key: matrix for key, matrix in self._matrices.items() if key == (device, dtype)}

    @outside_training
    def _draw(self, device: torch.device, dtype: torch.dtype, outer_step: int) -> Tensor:
        with torch.inference_mode(False):
            if device.type == "meta":
                return torch.empty(self.in_features, self.rank, device=device, dtype=dtype)
            seed = philox.derive_seed(self.fingerprint, outer_step)
            return own_memory(draw_projection(self.distribution, self.in_features, self.rank, seed=seed, device=device, dtype=dtype))

    def move_to(self, outer_step: int) -> None:
        """Draws the P of that outer step into the same memory."""
        if outer_step == self.outer_step:
            return
        drawn = [(matrix, self._draw(device, dtype, outer_step)) for (device, dtype), matrix in self._matrices.items()]
        self.outer_step = outer_step  # only now, when nothing can fail any more
        self._projected = None
        with torch.no_grad():
            for matrix, fresh in drawn:
                matrix.copy_(fresh)

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        """Z = x·P, without autograd: (…, in_features) → (…, r). Layers that pass the same x get the same
        Z."""
        with torch.no_grad():
            if self.layers == 1 or torch.compiler.is_compiling():  # the compiler finds equal products by itself
                return x @ self.matrix(weight.device, weight.dtype)
            return self._shared(x, weight)

    def _shared(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.is_inference():  # an inference tensor has no version, which would tell whether it has changed
            return x @ self.matrix(weight.device, weight.dtype)
        last, circumstances = self._projected, _circumstances(x)
        if last is not None and last.x() is x and last.circumstances == circumstances:
            # The last layer to ask takes Z, so that its memory is free unless autograd has saved it.
            self._projected = replace(last, left=last.left - 1) if last.left > 1 else None
            return last.z
        z = x @ self.matrix(weight.device, weight.dtype)
        mine = weakref.ref(self)

        def forget(gone: weakref.ref[Tensor]) -> None:
            if (subspace := mine()) is not None and (kept := subspace._projected) is not None and kept.x is gone:
                subspace._projected = None

        self._projected = _Projected(weakref.ref(x, forget), circumstances, z, self.layers - 1)
        return z

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrices": {}, "_projected": None}

    def __repr__(self) -> str:
        return f"Subspace(in_features={self.in_features}, rank={self.rank}, distribution={self.distribution!r}, seed={self.seed})"


def _circumstances(x: Tensor) -> tuple[object, ...]:
    """(x's version, autocast's dtype, the stream on a GPU). Z may be reused only while these stay equal.
    Another version or dtype would give another Z; another stream might read Z before it is computed."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    stream = torch.cuda.current_stream(x.device) if kind == "cuda" else None
    return x._version, torch.get_autocast_dtype(kind) if autocast else None, stream
