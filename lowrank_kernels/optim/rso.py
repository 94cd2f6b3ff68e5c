"""RSOAdamW: trains the coordinates of SubspaceLinear layers for some steps at a time, each time in new random subspaces."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import ops, philox, reference
from ..nn import SubspaceLayer, changes, layer_of
from ..ops.dispatch import outside_training
from . import groups, keys, ranks, rso_groups
from .buckets import check_grad
from .dense import dense_adamw_step_
from .loading import check_dense, load_uncast, restore_dense
from .rso_groups import Layers, layers_of

HOST = ("cpu",)
"""Devices whose tensors can be read without waiting."""
PART_ELEMENTS = 2**25
"""The gradients of a bucket are copied to fp32 this many elements (128 MiB), or one matrix, at a time."""


class RSOAdamW(Optimizer):
    """AdamW on the coordinates B of W₀ᵀ + P·B, afresh every `inner_steps` steps: randomized subspace optimization (arXiv 2502.07222).

        R = dB + proximal·B;  M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·R²;  N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε)
        B = (1 − lr·wd)·B − lr·N;      Wᵀ = (1 − lr·wd)·Wᵀ − lr·P·N,      which keeps Wᵀ = W₀ᵀ + P·B, where W₀ decays as well
        after `inner_steps` steps: the next P from the seed, and B = M = V = t = 0

    The weights of the layers (`SubspaceLinear`, `to_subspace`) are merged at all times: nothing is to be done before evaluating or saving
    the model. All other parameters get torch's own fused AdamW. With inner="sgd" N is M = momentum·M + R, on the layers alone.

    State of a layer: `step` (t), exp_avg and exp_avg_sq (or momentum_buffer) of (r, out) in fp32 (fp64 for fp64), where proximal is not 0
    `displacement`, which is B, and `subspace`, a number by which load_state_dict recognises P; the group holds `outer_step` and
    `inner_step`. P is in no checkpoint. A resumed run continues bit for bit, in the middle of an outer step too; the model has to be
    converted as it was.

    Calls of step() count for `inner_steps`, also those that a GradScaler skips; t counts updates. Layers that share P belong into one
    group.

    Args:
        params: `model.parameters()` after the conversion, (name, parameter) pairs or groups.
        lr: step size; a float, or a one-element tensor on the CPU.
        betas: β1, β2 in [0, 1).
        eps: ε ≥ 0, added to the root of the bias-corrected second moment.
        weight_decay: wd ≥ 0, decoupled, of the whole weight.
        inner_steps: steps in one subspace (200).
        proximal: weight of ½·proximal·‖B‖² in the inner problem (0).
        inner: "adamw", or "sgd" with momentum.
        momentum: of "sgd", in [0, 1) (0.9).
        rounding: of the layers' weights at each step: "nearest" (default), or for layers in bf16 "stochastic", up or down at random so that
            the mean stays, as a function of (the layer's P, index of its parameter in the group, t, element). To nearest, updates below
            half a unit in the last place of a weight are lost.

    Every argument but params is a key of a group too, and may be changed between steps. Within an outer step: `inner_steps` at or below
    the position ends it with the next call, another `inner` starts from zero moments, and a proximal term that was off until now takes
    the B of this moment for 0.

    Where torch.distributed is initialised the first step compares subspaces of all processes, in one small all-gather, and raises
    RuntimeError where they differ.

    Raises:
        ValueError, TypeError: at construction for what is out of range, a mistyped key, parameters of which none belongs to a
        converted layer, sharded parameters, layers that share P in different groups. RuntimeError in step(): a layer of these parameters
        was converted after the optimizer was built, its P belongs to another optimizer, its weight has a gradient of its own or is no
        parameter any more, or a CUDA graph is being captured. A warning names layers that had no gradient in the first outer step.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf, as it does to torch's fused AdamW
    moves_coordinates = True
    _built = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        inner_steps: int = 200,
        proximal: float = 0.0,
        inner: str = "adamw",
        momentum: float = 0.9,
        rounding: str = "nearest",
        **unsupported: Any,
    ) -> None:
        keys.check_arguments(
            "RSOAdamW",
            unsupported,
            own=keys.names(rso_groups.ALL_KEYS),
            of_groups=("rank", "distribution", "seed", "share"),
            remedy="lowrank_kernels.to_subspace(model, rank=…, …)",
        )
        self._compared = False
        adamw = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own = dict(inner_steps=inner_steps, proximal=proximal, inner=inner, momentum=momentum, rounding=rounding)
        self._known: tuple[Any, list[Layers]] | None = None
        self._met: set[Tensor] = set()
        """Coordinates that had a gradient in the first outer step, also where a GradScaler skipped all of it."""
        super().__init__(params, adamw | own | keys.defaults(keys.POSITION))
        if any(hasattr(param, "device_mesh") for group in self.param_groups for param in group["params"]):
            raise TypeError("params are sharded (DTensor), which RSOAdamW does not support yet; replicate the model, as with DDP")
        for index, group in enumerate(self.param_groups):
            for param_index in range(len(group["params"])):
                groups.refuse_flattened(group, index, param_index)
        if not any(map(layers_of, self.param_groups)):
            raise ValueError(self._why_no_coordinates())
        self._built = True
        for group in self.param_groups:  # when nothing can be refused any more: another optimizer may be at work on these layers
            _move_subspaces(layers_of(group), group["outer_step"])

    def _why_no_coordinates(self) -> str:
        if any(layer_of(param) is not None for group in self.param_groups for param in group["params"]):
            return (
                "params hold no coordinates of a SubspaceLinear but weights of such layers, which do not train by themselves: take all of "
                "model.parameters(), and where names sort them into groups, put `coordinates` with the weights. ZeroRedundancyOptimizer, "
                "which gives each process some of the parameters, cannot work with RSOAdamW, which moves weights by coordinates"
            )
        return (
            "params hold no coordinates of a SubspaceLinear; convert the model with to_subspace before the optimizer is built, or use "
            "torch.optim.AdamW. ZeroRedundancyOptimizer, which gives each process some of the parameters, cannot work with RSOAdamW, which "
            "moves weights by coordinates"
        )

    # Groups.

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, then every check that can be made now. A refused group leaves the optimizer as it was."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            group = self.param_groups[index]
            if "rank" in group:
                raise ValueError(f"unknown key 'rank' in a group ({groups.describe(group, index)}); to_subspace(model, rank=…) takes it")
            groups.check_names(group, index, keys.names(rso_groups.ALL_KEYS))
            rso_groups.check_values(group, index)
            rso_groups.check_rounding(group, index, layers_of(group))
            self._check_shared(index)
        except BaseException:
            del self.param_groups[index]
            raise
        if self._built:
            _move_subspaces(layers_of(group), group["outer_step"])

    def _check_shared(self, index: int) -> None:
        earlier = ((other, layer) for other, group in enumerate(self.param_groups[:index]) for layer in layers_of(group).values())
        owners = {id(layer.subspace): other for other, layer in earlier}
        group = self.param_groups[index]
        for param, layer in layers_of(group).items():
            if (owner := owners.get(id(layer.subspace))) is not None:
                raise ValueError(
                    f"{rso_groups.describe(group, index, param)} belongs to a layer that shares P with one in group {owner}; put them "
                    "into one group, or convert with share=None"
                )

    def _layers(self) -> list[Layers]:
        """The converted layers of each group, found anew where layers or groups have changed since the last time."""
        key = changes(), [len(group["params"]) for group in self.param_groups]
        if self._known is None or self._known[0] != key:
            found = list(map(layers_of, self.param_groups))
            self._check_converted(found)
            self._known = key, found
        return self._known[1]

    def _check_converted(self, found: list[Layers]) -> None:
        """No layer that trained as a whole has become a SubspaceLinear unnoticed."""
        owned = {param for layers in found for param in layers}
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                layer = layer_of(param)
                if layer is not None and param is layer.weight and layer.coordinates not in owned and layer.coordinates.requires_grad:
                    raise RuntimeError(
                        f"{rso_groups.describe(group, index, param)} is the weight of a SubspaceLinear whose coordinates are not in this "
                        "optimizer; build the optimizer after the conversion, from all of model.parameters(), or call to_dense(model)"
                    )

    # The step.

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the last one of an outer step draws the next P. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @outside_training
    def _update(self) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "RSOAdamW.step() cannot be captured in a CUDA graph, whose replays would never draw the next P; leave it out"
            )
        work = []
        for index, (group, layers) in enumerate(zip(self.param_groups, self._layers(), strict=True)):
            rso_groups.check_values(group, index)
            rso_groups.check_rounding(group, index, layers)
            for param_index, param in enumerate(group["params"]):
                if param.grad is not None:
                    check_grad(group, index, param_index)
            for param, layer in layers.items():
                rso_groups.check_layer(layer, group, index, param)
            # What has the state of coordinates and no layer belonged to one that is dense again.
            others = [param for param in group["params"] if param not in layers and "subspace" not in self.state.get(param, ())]
            work.append((group, layers, others))
        if not self._compared:
            self._compare_ranks(work)
        for group, layers, others in work:
            if group["outer_step"] == 0:
                self._met.update(param for param in layers if param.grad is not None)
            dense_adamw_step_(group | {"params": others, "capturable": False}, self.state, grad_scale, found_inf)
            for part in _parts({param: layer for param, layer in layers.items() if param.grad is not None}):
                self._step_layers(part, group, grad_scale, found_inf)
        for group in self.param_groups:
            group["inner_step"] += 1
        for index, (group, layers, _) in enumerate(work):
            if group["inner_step"] >= group["inner_steps"]:
                self._next_outer_step(group, layers)
                if group["outer_step"] == 1:
                    self._warn_of_unused(group, index, layers)

    def _step_layers(self, part: Layers, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        params, weights = list(part), [layer.weight for layer in part.values()]
        transposed = next(iter(part.values())).transposed
        device, wide = weights[0].device, torch.promote_types(weights[0].dtype, torch.float32)
        on_host = device.type in HOST
        if found_inf is not None:
            found_inf = found_inf.to(device, non_blocking=not on_host)  # a copy to the CPU must have arrived before it is read
            if on_host:
                if found_inf.item():
                    return
                found_inf = None
        lr, wd, proximal = float(group["lr"]), group["weight_decay"], group["proximal"]
        bases = [layer.subspace.matrix(device, weights[0].dtype) for layer in part.values()]
        states = [self._state_of(param, layer, group) for param, layer in part.items()]
        grads = [param.grad for param in params]
        projected = torch.empty(len(part), *params[0].shape, dtype=wide, device=device)
        torch._foreach_copy_(list(projected.unbind()), grads)
        if grad_scale is not None:
            projected.div_(grad_scale.to(device, non_blocking=not on_host))
            torch._foreach_copy_(grads, list(projected.unbind()))  # as torch's fused AdamW leaves them
        if proximal:
            torch._foreach_add_(list(projected.unbind()), [state["displacement"] for state in states], alpha=proximal)
        update = _inner_step(group, states, projected, found_inf)
        steps, seeds = [state["step"] for state in states], _rounding_seeds(part, group, device)
        ops.back_project_(
            weights, bases, update, lr=lr, scale=1.0, weight_decay=wd, right=not transposed, found_inf=found_inf,
            rounding_seeds=seeds, device_steps=None if seeds is None else steps,
        )  # fmt: skip
        if moved := [(state["displacement"], n) for state, n in zip(states, update, strict=True) if "displacement" in state]:
            displacements, updates = (list(tensors) for tensors in zip(*moved, strict=True))
            with reference.kept_where(found_inf, displacements):
                torch._foreach_mul_(displacements, 1 - lr * wd)
                torch._foreach_add_(displacements, updates, alpha=-lr)
        torch._foreach_add_(steps, 1.0 if found_inf is None else (found_inf == 0).float().reshape(()))

    def _state_of(self, param: Tensor, layer: SubspaceLayer, group: dict[str, Any]) -> dict[str, Any]:
        """The layer's state, with zeros for what it lacks; without the moments of another inner optimizer."""
        state = self.state[param]
        wide = torch.promote_types(param.dtype, torch.float32)
        if any(key not in state for key in rso_groups.INNER[group["inner"]]):
            for key in (key for moments in rso_groups.INNER.values() for key in moments):
                state.pop(key, None)
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["subspace"] = layer.subspace.fingerprint
            state |= {key: torch.zeros(param.shape, dtype=wide, device=param.device) for key in rso_groups.INNER[group["inner"]]}
        elif any(isinstance(value, Tensor) and value.dtype != wide for key, value in state.items() if key != "step"):  # the model was cast
            state |= {key: value.to(wide) for key, value in state.items() if isinstance(value, Tensor) and key != "step"}
        if group["proximal"] and "displacement" not in state:
            state["displacement"] = torch.zeros(param.shape, dtype=wide, device=param.device)
        return state

    def _next_outer_step(self, group: dict[str, Any], layers: Layers) -> None:
        try:
            _move_subspaces(layers, group["outer_step"] + 1)
        except BaseException:  # out of memory, Ctrl-C: the next call tries again
            _move_subspaces(layers, group["outer_step"])
            raise
        group["inner_step"] = 0
        group["outer_step"] += 1
        for param in layers:
            for value in self.state.get(param, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _compare_ranks(self, work: list[tuple[dict[str, Any], Layers, list[Tensor]]]) -> None:
        """Once, where torch.distributed is initialised: all processes have to draw the same subspaces."""
        self._compared = True
        layers = [(param, layer) for _, found, _ in work for param, layer in found.items()]
        settings = [tuple(group[key] for key in ("inner_steps", "rounding", *keys.names(keys.POSITION))) for group, _, _ in work]
        if layers:
            ranks.check_equal(
                [tuple(param.shape) for param, _ in layers],
                [*settings, *(layer.subspace.fingerprint for _, layer in layers)],
                layers[0][0].device,
            )

    def _warn_of_unused(self, group: dict[str, Any], index: int, layers: Layers) -> None:
        unused = [param for param in layers if param not in self.state and param not in self._met and param.requires_grad]
        if unused:
            warnings.warn(
                f"{len(unused)} layers had no gradient in a whole outer step and did not move, the first one that of "
                f"{rso_groups.describe(group, index, unused[0])}: they were not used, or their weights are used outside of their own "
                "forward, by which coordinates get no gradient; leave such layers out of target_modules",
                stacklevel=2,
            )

    # State.

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known, self._built, self._compared, self._met = None, True, False, set()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but fp32 states of half-precision layers stay fp32, and the layers' Ps become those of the checkpoint's outer step.

        Raises ValueError where the checkpoint's groups or states cannot belong to this optimizer.
        """
        load_uncast(self, super().load_state_dict, state_dict, check=self._check_loaded, restore=self._restore)

    def _check_loaded(self, incoming: dict[str, Any]) -> dict[str, Any]:
        changes: list[str] = []
        for index, (group, saved) in enumerate(zip(self.param_groups, incoming["param_groups"], strict=False)):
            if missing := [key for key in keys.names((*keys.RSO, *keys.POSITION)) if key not in saved]:
                raise ValueError(f"the checkpoint's group {index} has no {missing[0]!r}; it was saved for another optimizer")
            if len(group["params"]) != len(saved["params"]):
                continue  # torch says so
            groups.check_names({**saved, "param_names": None}, index, keys.names(rso_groups.ALL_KEYS))
            rso_groups.check_values(dict(saved), index)
            changes += [
                f"{key} {group[key]!r} becomes {saved[key]!r} (group {index})" for key in keys.names(keys.RSO) if group[key] != saved[key]
            ]
            layers = layers_of(group)
            for param, saved_id in zip(group["params"], saved["params"], strict=True):
                state, where = incoming["state"].get(saved_id), rso_groups.describe(group, index, param)
                if state and ("subspace" in state) != (param in layers):
                    kinds = ("an ordinary parameter", "coordinates of a SubspaceLinear")
                    raise ValueError(
                        f"the checkpoint has the state of {kinds['subspace' in state]} for {where}, which is {kinds[param in layers]}; "
                        "convert the model as it was when the checkpoint was saved"
                    )
                if state and param in layers:
                    rso_groups.check_loaded_state(state, layers[param], where)
                elif state:
                    check_dense(state, param, where)
        groups.warn_of_changes(changes)
        return incoming

    def _restore(self, final: dict[str, Any]) -> None:
        for group, saved_group in zip(self.param_groups, final["param_groups"], strict=True):
            layers = layers_of(group)
            for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
                state, saved = self.state.get(param, {}), final["state"].get(saved_id, {})
                if param not in layers:
                    restore_dense(state, saved, param)
                    continue
                wide = torch.promote_types(param.dtype, torch.float32)
                for key, value in saved.items():
                    if isinstance(value, Tensor):
                        dtype = torch.float32 if key == "step" else wide
                        state[key] = value.detach().to(param.device, dtype, copy=True, memory_format=torch.contiguous_format)
            _move_subspaces(layers, group["outer_step"])


def _move_subspaces(layers: Layers, outer_step: int) -> None:
    for layer in layers.values():
        layer.subspace.move_to(outer_step)
        layer.subspace.has_optimizer = True


def _parts(layers: Layers) -> Iterator[Layers]:
    """Layers whose weights, coordinates and gradients are alike, at most PART_ELEMENTS of their gradients at a time."""
    buckets: dict[Any, list[tuple[Tensor, SubspaceLayer]]] = defaultdict(list)
    for param, layer in layers.items():
        weight = layer.weight
        key = layer.transposed, weight.shape, weight.stride(), weight.dtype, weight.device, param.shape, param.device
        buckets[key].append((param, layer))
    for members in buckets.values():
        at_once = max(1, PART_ELEMENTS // members[0][0].numel())
        for start in range(0, len(members), at_once):
            yield dict(members[start : start + at_once])


def _inner_step(group: dict[str, Any], states: list[dict[str, Any]], projected: Tensor, found_inf: Tensor | None) -> Tensor:
    """N (batch, r, out) of R, and the states that go with it."""
    if group["inner"] == "adamw":
        exp_avgs, exp_avg_sqs, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        (beta1, beta2), eps = group["betas"], group["eps"]
        return ops.update_moments_(
            exp_avgs, exp_avg_sqs, projected, beta1=beta1, beta2=beta2, eps=eps, step=0, found_inf=found_inf, device_steps=steps
        )
    buffers = [state["momentum_buffer"] for state in states]
    with reference.kept_where(found_inf, buffers):
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, list(projected.unbind()))
    return torch.stack(buffers)


def _rounding_seeds(part: Layers, group: dict[str, Any], device: torch.device) -> Tensor | None:
    if group["rounding"] == "nearest":
        return None
    places = {param: place for place, param in enumerate(group["params"])}
    seeds = [philox.derive_seed(layer.subspace.fingerprint, group["outer_step"], places[param]) for param, layer in part.items()]
    return philox.seed_tensor(seeds, device)
