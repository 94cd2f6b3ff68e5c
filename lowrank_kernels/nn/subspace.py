"""Subspace: the P of one layer, or of several layers that read the same input and share Z = x·P."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import philox
from ..ops.dispatch import outside_training
from ..subspaces import DISTRIBUTIONS, PRINCIPAL, draw_principal, draw_projection, own_memory
from .sketch import InputSketch

PRINCIPAL_KIND = 100
"""The number of the distribution "principal" in fingerprints. Those of the others are their places."""


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

    in_features, rank, distribution, seed, principal_rank: see SubspaceLinear. place: numbers that keep the Ps
    of one seed apart. outer_step: how often the optimizer has moved on to a new P. principal: of the
    distribution "principal", Q (in_features, r₁), on which P depends as well; None before the first redraw.
    The optimizer chooses it, and its checkpoints hold it.
    """

    def __init__(self, in_features: int, rank: int, distribution: str, seed: int, *place: int, principal_rank: int | None = None) -> None:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= in_features:
            raise ValueError(f"rank must be an int from 1 to in_features = {in_features}, got {rank!r}")
        if distribution not in (choices := (*DISTRIBUTIONS, PRINCIPAL)):
            raise ValueError(f"distribution must be one of {', '.join(map(repr, choices))}, got {distribution!r}")
        self.principal_rank = _principal_rank(rank, distribution, principal_rank)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an int, got {seed!r}")
        self.in_features, self.rank, self.distribution, self.seed, self.place = in_features, rank, distribution, seed, place
        self.outer_step = 0
        self.layers = 0
        """How many layers share this subspace."""
        self.has_optimizer = False
        """Whether an RSOAdamW was built for these layers."""
        self.principal: Tensor | None = None
        self.sketch: InputSketch | None = None
        """Takes the inputs of the last forward pass before a redraw, where there are principal directions."""
        self._matrices: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._projected: _Projected | None = None

    @property
    def fingerprint(self) -> int:
        """A signed 64-bit number made from seed, place and distribution. It differs where the Ps differ.
        Checkpoints hold it."""
        kind = (PRINCIPAL_KIND, self.principal_rank) if self.principal_rank else (list(DISTRIBUTIONS).index(self.distribution),)
        return philox.signed64(philox.derive_seed(self.seed, *kind, *self.place))

    def matrix(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """P on the device and in the dtype of a layer's weight."""
        self._ensure_drawn(device, dtype)
        return self._matrices[device, dtype]

    @torch.compiler.assume_constant_result  # runs while the compiler traces, so that P is an input of the graph
    def _ensure_drawn(self, device: torch.device, dtype: torch.dtype) -> None:
        if type(self._matrices.get((device, dtype))) is not Tensor:  # a FakeTensor is valid in one trace only
            self._matrices[device, dtype] = self._draw(device, dtype, self.outer_step, self.principal)

    def keep_only(self, device: torch.device, dtype: torch.dtype) -> None:
        """Frees the Ps on other devices and in other dtypes than these, and Z."""
        self._projected = None
        self._matrices = {key: matrix for key, matrix in self._matrices.items() if key == (device, dtype)}
        if self.sketch is not None and self.sketch.omega.device != device:
            self.sketch = None
            self.watch_inputs(device)

    @outside_training
    def _draw(self, device: torch.device, dtype: torch.dtype, outer_step: int, principal: Tensor | None) -> Tensor:
        with torch.inference_mode(False):
            if device.type == "meta":
                return torch.empty(self.in_features, self.rank, device=device, dtype=dtype)
            options = dict(seed=philox.derive_seed(self.fingerprint, outer_step), device=device, dtype=dtype)
            if self.principal_rank:
                return own_memory(draw_principal(principal, self.in_features, self.rank, **options))
            return own_memory(draw_projection(self.distribution, self.in_features, self.rank, **options))

    def move_to(self, outer_step: int, principal: Tensor | None = None) -> None:
        """Draws the P of that outer step, with these principal directions, into the same memory."""
        if outer_step == self.outer_step and principal is self.principal:
            return
        drawn = [(matrix, self._draw(device, dtype, outer_step, principal)) for (device, dtype), matrix in self._matrices.items()]
        self.outer_step, self.principal = outer_step, principal  # only now, when nothing can fail any more
        self._projected = None
        with torch.no_grad():
            for matrix, fresh in drawn:
                matrix.copy_(fresh)

    def watch_inputs(self, device: torch.device) -> None:
        """Begins a sketch of the inputs, where there are principal directions and none is under way."""
        if self.principal_rank and self.sketch is None:
            seed = philox.derive_seed(self.fingerprint, self.outer_step, 1)  # P's own is the one without the 1
            self.sketch = InputSketch(self.in_features, self.principal_rank, seed, device)

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        """Z = x·P, without autograd: (…, in_features) → (…, r). Layers that pass the same x get the same
        Z."""
        with torch.no_grad():
            if self.layers == 1 or torch.compiler.is_compiling():  # the compiler finds equal products by itself
                return self._product(x, weight)
            return self._shared(x, weight)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.sketch is not None:
            self.sketch.add(x)
        return x @ self.matrix(weight.device, weight.dtype)

    def _shared(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.is_inference():  # an inference tensor has no version, which would tell whether it has changed
            return self._product(x, weight)
        last, circumstances = self._projected, _circumstances(x)
        if last is not None and last.x() is x and last.circumstances == circumstances:
            # The last layer to ask takes Z, so that its memory is free unless autograd has saved it.
            self._projected = replace(last, left=last.left - 1) if last.left > 1 else None
            return last.z
        z = self._product(x, weight)
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


def _principal_rank(rank: int, distribution: str, principal_rank: int | None) -> int:
    """r₁; 0 where the distribution has no principal directions."""
    if distribution != PRINCIPAL:
        if principal_rank is not None:
            raise ValueError(f"principal_rank is for distribution='principal', got {principal_rank!r} with {distribution!r}")
        return 0
    chosen = max(1, rank // 2) if principal_rank is None else principal_rank
    if not isinstance(chosen, int) or isinstance(chosen, bool) or not 1 <= chosen < rank:
        raise ValueError(f"principal_rank must be an int from 1 to rank − 1 = {rank - 1}, got {chosen!r}")
    return chosen


def _circumstances(x: Tensor) -> tuple[object, ...]:
    """(x's version, autocast's dtype, the stream on a GPU). Z may be reused only while these stay equal.
    Another version or dtype would give another Z; another stream might read Z before it is computed."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    stream = torch.cuda.current_stream(x.device) if kind == "cuda" else None
    return x._version, torch.get_autocast_dtype(kind) if autocast else None, stream
