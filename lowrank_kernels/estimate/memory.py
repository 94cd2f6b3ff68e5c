"""How much memory a training run takes, before it is begun."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import optim
from ..nn import layer_of, to_subspace
from ..optim import groups
from ..optim.in_backward import UPDATES, check_arguments
from ..optim.named import NAMED
from ..optim.rso_groups import layers_of
from ..sharded import Sharding, is_sharded
from ..sharded.layout import ALONG_M, ALONG_N
from ..subspaces import BLIND
from . import held, temporaries
from .activations import most_of_passes

METHODS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW} | {name: kind for name, (kind, _) in NAMED.items()}
"""What `estimate_memory` knows by name."""
HEADS = ("embed", "lm_head", "wte", "wpe")
"""Parts of names of matrices that stay dense, where only shapes are known."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for.

    weights         all parameters and buffers
    states          moments and counters of the projected parameters, or of the coordinates
    bases           P of the projected parameters, or of RSO's layers
    dense_states    of the parameters that are not projected
    coordinates     of RSO's layers
    gradients       those that exist together when the backward pass ends
    accumulators    R, with in_backward
    one_gradient    the largest that exists for a moment, with in_backward
    step            the largest temporaries of a step
    refresh         the largest temporaries of a refresh of bases
    activations     the most that forward and backward pass hold beside what is above; 0 without a loss
    """

    weights: int
    states: int
    bases: int
    dense_states: int
    coordinates: int
    gradients: int
    accumulators: int
    one_gradient: int
    step: int
    refresh: int
    activations: int

    @property
    def held(self) -> int:
        """What is there between two steps."""
        return self.weights + self.states + self.bases + self.dense_states + self.coordinates

    @property
    def peak(self) -> int:
        """The most at any time. The gradients are held while temporaries or activations come and go."""
        largest = max(self.step, self.refresh, self.one_gradient, self.activations)
        return self.held + self.gradients + self.accumulators + largest

    def __str__(self) -> str:
        rows = [(field.name.replace("_", " "), getattr(self, field.name)) for field in dataclasses.fields(self)]
        rows += [("between steps", self.held), ("peak", self.peak)]
        return "\n".join(f"{name:<14} {count / 1e9:>9.3f} GB" for name, count in rows if count)


def estimate_memory(
    model: nn.Module | Mapping[str, tuple[int, ...]],
    method: str | type[torch.optim.Optimizer] = "i3s",
    rank: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    in_backward: str | None = None,
    accumulator_dtype: torch.dtype = torch.float32,
    accumulate: int = 1,
    loss: Callable[[nn.Module], Tensor] | None = None,
    device: str = "cuda",
    target_modules: Any = "all-linear",
    shards: int = 1,
    **options: Any,
) -> Memory:
    """The bytes that a training run takes, by what they are for. Nothing is allocated: the model is copied to
    the meta device, and so may be on it.

        estimate = lrk.estimate_memory(model, "galore", rank=1024, state_bits=8, in_backward="immediately")
        print(estimate)             # a table in GB (10⁹ bytes)
        estimate.peak, estimate.states

    Weights, states, bases, gradients and R are what the optimizer will hold, to the byte. Temporaries are
    bounds by formula. Activations are counted only where `loss` is given: the forward and backward pass then
    runs on the meta device, where attention is not fused. CUDA's context, the allocator's fragments and
    cuBLAS's workspace are not in it.

    Args:
        model: a module, or names and shapes of its parameters: matrices are then taken for linear layers,
            unless "embed", "lm_head", "wte" or "wpe" is in their name.
        method: "adamw" (torch's), "galore", "i3s", "fira", "apollo", "apollo-mini", "adafactor",
            "adam-mini" (the last two and "fira" also with "-i3s"), "rso", or the class.
        rank: r. Not for "adamw".
        dtype: of the weights (the model's own, and fp32 for shapes).
        in_backward: None, "deferred" or "immediately"; see `in_backward`. accumulator_dtype: of R then.
        accumulate: backward passes a step.
        loss: called with the model on the meta device; returns the loss of one micro-batch. Its inputs must
            be on the meta device.
        device: "cuda" or "cpu", whose temporaries differ.
        target_modules: as in `param_groups` and `to_subspace`.
        shards: over how many processes FSDP2 shards every parameter, by its default placement, or with
            `shard_placement` for "rso". The bytes are then those of the first process, which has the largest
            parts. What FSDP2 gathers for a layer for a moment is not in them.
        options: further keys of a low-rank group (state_bits, proj_type, stagger, …), or of `to_subspace` for
            "rso".

    Raises:
        ValueError, TypeError: for a method or option that does not exist, as param_groups or to_subspace do,
            and for a model that FSDP2 has sharded already.
    """
    kind = METHODS.get(method) if isinstance(method, str) else method
    if kind is None:
        raise ValueError(f"method must be one of {', '.join(METHODS)} or a class, got {method!r}")
    if in_backward not in (None, *UPDATES):
        raise ValueError(f"in_backward must be None or one of {', '.join(UPDATES)}, got {in_backward!r}")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be 'cuda' or 'cpu', got {device!r}")
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise ValueError(f"shards must be a positive int, the number of processes that share each parameter, got {shards!r}")
    options = NAMED.get(method, (kind, {}))[1] | options
    is_low_rank = issubclass(kind, optim.LowRankOptimizer)
    if is_low_rank == (rank is None):
        raise ValueError(f"rank must be {'given for' if is_low_rank else 'left out of'} method={method!r}")
    meta = _from_shapes(model) if isinstance(model, Mapping) else _on_meta(model)
    if dtype is not None:
        meta.to(dtype)
    plan = _Plan(shards)
    if not is_low_rank:
        plan.dense = [param for param in meta.parameters() if param.requires_grad]
    elif kind is optim.RSOAdamW:
        plan.of_layers(kind(to_subspace(meta, rank, target_modules, **options).parameters()))
    else:
        optimizer = kind(optim.param_groups(meta, rank, target_modules, **options))
        if in_backward:
            check_arguments(optimizer, accumulate, in_backward, accumulator_dtype, None)
        plan.of_groups(optimizer, in_backward, device)
    if in_backward and not plan.projected:
        raise ValueError(f"in_backward is for methods that project gradients, not for {method!r}")
    return plan.memory(meta, in_backward, accumulator_dtype, accumulate, loss)


class _Plan:
    """What an optimizer will hold. dense: the parameters that are not projected. projected: parameter →
    elements of its R, whole and in this process."""

    def __init__(self, shards: int) -> None:
        self.shards = shards
        self.dense: list[Tensor] = []
        self.projected: dict[Tensor, tuple[int, int]] = {}
        self.states = self.bases = self.coordinates = self.step = self.refresh = 0

    def sharding(self, param: Tensor) -> Sharding:
        """As FSDP2 will cut it, with `shard_placement` where a layer is converted."""
        layer = layer_of(param)
        if layer is None:
            return held.planned(param, self.shards)
        by_columns = param is layer.coordinates or layer.transposed
        return held.planned(param, self.shards, dim=int(by_columns and layer.out_features % self.shards == 0))

    def bytes_of(self, param: Tensor) -> int:
        return held.bytes_of(param, self.sharding(param))

    def of_layers(self, optimizer: optim.RSOAdamW) -> None:
        for group in optimizer.param_groups:
            layers = layers_of(group)
            for param, layer in layers.items():
                self.states += held.of_layer(optimizer, group, layer, self.sharding(layer.weight))
                self.coordinates += self.bytes_of(param)
                moved = 2 * self.bytes_of(param) // param.itemsize * 4 + self.bytes_of(layer.weight) // param.itemsize * 4
                self.step = max(self.step, moved)
                layer.subspace.matrix(param.device, param.dtype)  # now, so that activations do not count it
            self.bases += sum({layer.subspace: held.of_subspace(layer.subspace, param.dtype) for param, layer in layers.items()}.values())
            self.dense += [param for param in group["params"] if param.requires_grad and param not in layers]

    def of_groups(self, optimizer: optim.LowRankOptimizer, in_backward: str | None, device: str) -> None:
        for group in optimizer.param_groups:
            if not groups.is_low_rank(group):
                self.dense += group["params"]
                continue
            hyper = optimizer._hyper(group)
            alike: Counter[tuple[Any, ...]] = Counter()
            for param in group["params"]:
                part, whole = (held.of_low_rank(optimizer, group, param, held.planned(param, each)) for each in (self.shards, 1))
                self.states += part.states
                self.bases += part.basis
                self.projected[param] = whole.r_elements, part.r_elements
                alike[whole.m, whole.n, part.m, part.n, part.rank, part.cut, param.dtype, part.matrices] += 1
            parameters = len(group["params"])
            due = -(-parameters // group["update_proj_gap"]) if group["stagger"] else parameters
            for (m, n, own_m, own_n, r, cut, dtype, batch), alike_params in alike.items():
                moved = batch * (1 if in_backward == "immediately" else alike_params)
                refreshed = batch * (1 if in_backward else min(alike_params, due))
                of_step = temporaries.step_bytes(own_m, own_n, r, moved, dtype, hyper, device)
                if cut == ALONG_M:
                    of_step += temporaries.message_bytes(n, r, moved, dtype)
                self.step = max(self.step, of_step)
                if group["selection"] in BLIND:
                    continue
                columns = (3 if group["selection"] == "importance" else 1) * r + group["oversample"]
                gathered = 0
                if cut in (ALONG_M, ALONG_N):  # some whole matrices, and this process's pieces that it sends for them
                    refreshed = temporaries.gathered(m * n, refreshed, self.shards)
                    gathered = 2 * refreshed * m * n * dtype.itemsize
                self.refresh = max(self.refresh, gathered + temporaries.refresh_bytes(m, n, columns, refreshed, dtype, device))

    def memory(
        self,
        model: nn.Module,
        in_backward: str | None,
        accumulator_dtype: torch.dtype,
        accumulate: int,
        loss: Callable[[nn.Module], Tensor] | None,
    ) -> Memory:
        gradients = sum(map(self.bytes_of, self.dense)) + self.coordinates
        accumulators = one_gradient = 0
        if in_backward is None:
            gradients += sum(map(self.bytes_of, self.projected))
        else:
            one_gradient = max(map(self.bytes_of, self.projected))
        if in_backward == "deferred":
            accumulators = sum(own * _accumulator_bytes(param, accumulator_dtype) for param, (_, own) in self.projected.items())
        activations = 0
        if loss is not None:
            whole = {param: count for param, (count, _) in self.projected.items()}
            most = most_of_passes(model, loss, whole, in_backward, accumulator_dtype, min(accumulate, 2))
            trained = [param for param in model.parameters() if param.requires_grad and (in_backward is None or param not in whole)]
            kept = sum(param.nbytes for param in trained)
            if in_backward == "deferred":
                kept += sum(count * _accumulator_bytes(param, accumulator_dtype) for param, count in whole.items())
            activations = max(0, most - kept)
        return Memory(
            weights=sum(map(self.bytes_of, model.parameters())) + sum(buffer.nbytes for buffer in model.buffers()) - self.coordinates,
            states=self.states,
            bases=self.bases,
            dense_states=sum(held.of_dense(self.bytes_of(param)) for param in self.dense),
            coordinates=self.coordinates,
            gradients=gradients,
            accumulators=accumulators,
            one_gradient=one_gradient,
            step=self.step,
            refresh=self.refresh,
            activations=activations,
        )


def _accumulator_bytes(param: Tensor, dtype: torch.dtype) -> int:
    return 8 if param.dtype == torch.float64 else dtype.itemsize


def _from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A module with these parameters. Matrices are linear layers, except embeddings and the head."""
    model = nn.Module()
    for name, shape in shapes.items():
        is_layer = len(shape) == 2 and not any(part in name for part in HEADS)
        *path, last = [*name.removesuffix(".weight").split("."), "weight"] if is_layer else name.split(".")
        owner = model
        for index, part in enumerate(path):
            if part not in owner._modules:
                owner.add_module(part, nn.Linear(1, 1, False, "meta") if is_layer and index + 1 == len(path) else nn.Module())
            owner = owner._modules[part]
        owner.register_parameter(last, nn.Parameter(torch.empty(shape, device="meta")))
    return model


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers are on the meta device, and whole. Raises TypeError
    for a model that FSDP2 has sharded, which cannot be copied."""
    if any(map(is_sharded, model.parameters())) and any(hasattr(module, "reshard") for module in model.modules()):
        raise TypeError(
            "FSDP2's modules cannot be copied to the meta device; call estimate_memory before fully_shard, with shards=…, or give it names "
            "and shapes. lowrank_kernels.report counts what this process holds"
        )
    memo: dict[int, Any] = {}
    for param in model.parameters():
        whole = torch.empty(param.shape, dtype=param.dtype, device="meta") if is_sharded(param) else torch.empty_like(param, device="meta")
        memo[id(param)] = nn.Parameter(whole, requires_grad=param.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
