"""How much memory a training run takes, before it is begun."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import optim
from .backends import Hyper
from .backends.cpu import CHUNK_ELEMENTS
from .backends.foreach import CHUNK_ELEMENTS as RULE_ELEMENTS
from .nn import SubspaceLayer, to_subspace
from .optim import groups
from .optim.in_backward import UPDATES, check_arguments
from .optim.named import NAMED
from .optim.refreshes import REFRESHED_ELEMENTS
from .subspaces import BLIND

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
        options: further keys of a low-rank group (state_bits, proj_type, stagger, …), or of `to_subspace` for
            "rso".

    Raises:
        ValueError, TypeError: for a method or option that does not exist, and as param_groups or to_subspace
            do.
    """
    kind = METHODS.get(method) if isinstance(method, str) else method
    if kind is None:
        raise ValueError(f"method must be one of {', '.join(METHODS)} or a class, got {method!r}")
    if in_backward not in (None, *UPDATES):
        raise ValueError(f"in_backward must be None or one of {', '.join(UPDATES)}, got {in_backward!r}")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be 'cuda' or 'cpu', got {device!r}")
    options = NAMED.get(method, (kind, {}))[1] | options
    is_low_rank = issubclass(kind, optim.LowRankOptimizer)
    if is_low_rank == (rank is None):
        raise ValueError(f"rank must be {'given for' if is_low_rank else 'left out of'} method={method!r}")
    meta = _from_shapes(model) if isinstance(model, Mapping) else _on_meta(model)
    if dtype is not None:
        meta.to(dtype)
    plan = _Plan()
    if not is_low_rank:
        plan.dense = [param for param in meta.parameters() if param.requires_grad]
    elif kind is optim.RSOAdamW:
        to_subspace(meta, rank, target_modules, **options)
        plan.of_layers(meta)
    else:
        optimizer = kind(optim.param_groups(meta, rank, target_modules, **options))
        if in_backward:
            check_arguments(optimizer, accumulate, in_backward, accumulator_dtype, None)
        plan.of_groups(optimizer, in_backward, device)
    if in_backward and not plan.projected:
        raise ValueError(f"in_backward is for methods that project gradients, not for {method!r}")
    return plan.memory(meta, in_backward, accumulator_dtype, accumulate, loss)


class _Plan:
    """What an optimizer will hold. projected: parameter → elements of its R."""

    def __init__(self) -> None:
        self.dense: list[Tensor] = []
        self.projected: dict[Tensor, int] = {}
        self.states = self.bases = self.coordinates = self.step = self.refresh = 0

    def of_layers(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, SubspaceLayer)]
        subspaces = {id(layer.subspace): layer for layer in layers}
        for layer in subspaces.values():
            self.bases += layer.subspace.matrix(layer.weight.device, layer.weight.dtype).nbytes
        for layer in layers:
            self.states += 2 * layer.coordinates.numel() * _state_bytes(layer.weight) + STEP_BYTES
        own = {id(layer.coordinates) for layer in layers}
        self.coordinates = sum(layer.coordinates.nbytes for layer in layers)
        self.dense = [param for param in model.parameters() if param.requires_grad and id(param) not in own]
        self.step = max(2 * layer.coordinates.numel() * 4 + layer.weight.numel() * 4 for layer in layers)

    def of_groups(self, optimizer: optim.LowRankOptimizer, in_backward: str | None, device: str) -> None:
        for group in optimizer.param_groups:
            if not groups.is_low_rank(group):
                self.dense += group["params"]
                continue
            hyper = optimizer._hyper(group)
            alike: Counter[tuple[Any, ...]] = Counter()
            for param in group["params"]:
                rows, columns = groups.matrix_shape(param)
                right, batch = groups.is_right(param, group["proj_type"]), param.shape[0] if param.dim() == 3 else 1
                r, m, n = min(group["rank"], rows, columns), *((columns, rows) if right else (rows, columns))
                for shape, dtype in optimizer._layout(hyper, param, right, r).values():
                    self.states += batch * torch.Size(shape).numel() * dtype.itemsize
                self.states += STEP_BYTES + 4 * (group["refresh_threshold"] < 1) + 12 * batch * group["diagnostics"]
                self.bases += batch * m * r * param.element_size()
                self.projected[param] = batch * r * n
                alike[right, m, n, r, param.dtype, batch] += 1
            parameters = len(group["params"])
            due = -(-parameters // group["update_proj_gap"]) if group["stagger"] else parameters
            for (_, m, n, r, dtype, batch), alike_params in alike.items():
                moved = batch * (1 if in_backward == "immediately" else alike_params)
                refreshed = batch * (1 if in_backward else min(alike_params, due))
                self.step = max(self.step, _step_bytes(m, n, r, moved, dtype, hyper, device))
                if group["selection"] not in BLIND:
                    columns = (3 if group["selection"] == "importance" else 1) * r + group["oversample"]
                    self.refresh = max(self.refresh, _refresh_bytes(m, n, columns, refreshed, dtype, device))

    def memory(
        self,
        model: nn.Module,
        in_backward: str | None,
        accumulator_dtype: torch.dtype,
        accumulate: int,
        loss: Callable[[nn.Module], Tensor] | None,
    ) -> Memory:
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - self.coordinates
        gradients = sum(param.nbytes for param in self.dense) + self.coordinates
        accumulators = one_gradient = 0
        if in_backward is None:
            gradients += sum(param.nbytes for param in self.projected)
        else:
            one_gradient = max(param.nbytes for param in self.projected)
        if in_backward == "deferred":
            accumulators = sum(count * _accumulator_bytes(param, accumulator_dtype) for param, count in self.projected.items())
        activations = 0
        if loss is not None:
            most = _most_of_passes(model, loss, self.projected, in_backward, accumulator_dtype, min(accumulate, 2))
            activations = max(0, most - gradients - accumulators)
        return Memory(
            weights=weights,
            states=self.states,
            bases=self.bases,
            dense_states=sum(2 * param.nbytes + STEP_BYTES for param in self.dense),
            coordinates=self.coordinates,
            gradients=gradients,
            accumulators=accumulators,
            one_gradient=one_gradient,
            step=self.step,
            refresh=self.refresh,
            activations=activations,
        )


OF_A_RULE = 6
"""Tensors of R's size that a composed rule has at a time."""
STEP_BYTES = 4
"""The count of updates in each state."""


def _state_bytes(param: Tensor) -> int:
    return max(4, param.element_size())


def _accumulator_bytes(param: Tensor, dtype: torch.dtype) -> int:
    return 8 if param.dtype == torch.float64 else dtype.itemsize


def _step_bytes(m: int, n: int, r: int, count: int, dtype: torch.dtype, hyper: Hyper, device: str) -> int:
    """Temporaries of one bucket: R and N, and what a composed rule keeps; on a CPU also P·N of a matrix, and
    copies where the weight is in 16 bits or the lift takes the gradient."""
    size, takes_gradient = max(4, dtype.itemsize), hyper.lift.takes_gradient
    is_fused = hyper.rule.name == "adamw" and not (device == "cpu" and takes_gradient)
    of_r = r * n * size
    if device == "cpu":
        at_once = 2 * min(count, max(1, CHUNK_ELEMENTS // (r * n))) if is_fused else 3 * count
        return at_once * of_r + m * n * size * (1 + (dtype.itemsize < 4) + 3 * takes_gradient)
    if is_fused:
        from .backends.triton.table import TEMPORARY_BYTES  # imported here, so that a CPU stays free of Triton

        return min(2 * count * of_r, max(2 * of_r, TEMPORARY_BYTES))
    return 2 * count * of_r + OF_A_RULE * min(count * of_r, max(of_r, RULE_ELEMENTS * size))


def _refresh_bytes(m: int, n: int, columns: int, count: int, dtype: torch.dtype, device: str) -> int:
    """Temporaries of a range finder: the Gram matrix of the short side, in fp64 on a CPU, thin matrices, and
    a copy of the gradients at their own precision (in fp32 on a CPU)."""
    short, long = min(m, n), max(m, n)
    if device == "cpu":  # one matrix after another
        return (short * short + 4 * short * min(columns, short)) * 8 + m * n * 4 * (dtype.itemsize < 4)
    at_once = min(count, max(1, REFRESHED_ELEMENTS // (m * n)))
    return at_once * ((short * short + 2 * (short + long) * min(columns, short)) * 4 + m * n * dtype.itemsize)


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
    """A copy of the model whose parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _most_of_passes(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    projected: Mapping[Tensor, int],
    in_backward: str | None,
    accumulator_dtype: torch.dtype,
    passes: int,
) -> int:
    """The most bytes that forward and backward passes hold at a time, gradients among them."""
    live = _Live((*model.parameters(), *model.buffers()))
    kept: dict[Tensor, Tensor] = {}

    def free(param: Tensor) -> None:
        if in_backward == "deferred" and param not in kept:
            dtype = torch.float64 if param.dtype == torch.float64 else accumulator_dtype
            kept[param] = torch.empty(projected[param], dtype=dtype, device="meta")
        param.grad = None

    hooks = [param.register_post_accumulate_grad_hook(free) for param in projected] if in_backward else []
    try:
        with live:
            for _ in range(passes):
                loss(model).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return live.most


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, while they live."""

    def __init__(self, known: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._keep = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += count
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, count)

    def _gone(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count
