"""RSOAdamW: trains the coordinates of SubspaceLinear layers in random subspaces, and draws new subspaces
every `inner_steps` steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends, philox
from ..backends import Hyper
from ..backends.reference import kept_where
from ..backends.upload import pack, upload
from ..lifts.back_projection import BackProjection
from ..nn import Subspace, SubspaceLayer, layer_of
from ..nn.owner import claim_sharded, is_unsharded_now
from ..nn.sketch import principal_directions
from ..sharded import Sharding, is_sharded, local, sharding_of
from ..sharded.state import taken
from ..storage import Plain
from . import groups, keys, loading, ranks, rso_buckets, rso_groups
from .buckets import Members, check_grad
from .optimizer import LowRankOptimizer
from .rso_groups import Layers, layers_of


class RSOAdamW(LowRankOptimizer):
    """AdamW on the coordinates B of Wᵀ = W₀ᵀ + P·B, started anew in another subspace every `inner_steps`
    steps: randomized subspace optimization (arXiv 2502.07222).

        R = dB + proximal·B;  M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·R²
        N = (M / (1−β1ˢ)) / (sqrt(V / (1−β2ᵗ)) + ε)          s = t, unless moments="carry"
        B = (1 − lr·wd)·B − lr·α·N
        Wᵀ = (1 − lr·wd)·Wᵀ − lr·α·P·N,      which keeps Wᵀ = W₀ᵀ + P·B, where W₀ decays as well
        after `inner_steps` steps: the next P from the seed, and B = M = V = t = 0

    With moments="carry" each row of V becomes the mean of its rows, and t goes on; M starts from zero, and s
    counts the steps since. The expectation of R² is the same in all rows, for any random P, and so is that
    mean. Short inner loops then need not find the size of the gradients again.

    The weights of the layers (`SubspaceLinear`, `to_subspace`) are up to date at all times. The model can be
    evaluated or saved without any merging. All other parameters are trained by torch's own fused AdamW. With
    inner="sgd" the layers use N = M = momentum·M + R; the other parameters keep AdamW.

    The state of a layer holds `step` (t); exp_avg and exp_avg_sq (or momentum_buffer), each (r, out) in fp32
    (fp64 for fp64); where proximal is not 0, `displacement`, which is B; `subspace`, a number by which
    load_state_dict recognises P; with moments="carry" the counts `carried` and `since`; and of the
    distribution "principal" `principal`, the principal directions. The group holds `outer_step` and
    `inner_step`. No checkpoint holds P. A resumed run continues bit for bit, even from the middle of an outer
    step, if the model is converted with the same arguments.

    Every call of step() counts for `inner_steps`, even one that a GradScaler skips; t counts updates only.
    Layers that share P must be in one group.

    Args:
        params: `model.parameters()` after the conversion, (name, parameter) pairs or groups.
        lr: step size; a float, or a one-element tensor on the CPU.
        betas: β1, β2 in [0, 1).
        eps: ε ≥ 0, added to the root of the bias-corrected second moment.
        weight_decay: wd ≥ 0, decoupled, applied to the whole weight.
        inner_steps: steps in one subspace (200).
        scale: α, a factor on the update of the layers (1). It lets one rate serve them and the other
            parameters.
        moments: "reset" (default), or "carry" for inner="adamw".
        proximal: weight of ½·proximal·‖B‖² in the inner problem (0).
        inner: "adamw", or "sgd" with momentum.
        momentum: momentum of "sgd", in [0, 1) (0.9).
        rounding: how the layers' weights are rounded at each step: "nearest" (default), or "stochastic" for
            layers in bf16. Rounding to nearest loses updates below half a unit in the last place of a weight.
            Stochastic rounding goes up or down at random so that the mean stays. It is a function of (the
            layer's P, index of its parameter in the group, t, element).

    Every argument but params is also a key of a group and may be changed between steps. Some changes take
    effect within an outer step. If `inner_steps` is set to the current position or less, the next call ends
    the outer step. Another `inner` starts from zero moments. If `proximal` was 0 until now, B counts from
    zero at that moment.

    Where torch.distributed is initialised, the first step compares the subspaces of all processes in one
    small all-gather. It raises RuntimeError where they differ, and for the distribution "principal" where the
    processes hold different layers. Each redraw of "principal" then adds up the sketches of all processes,
    and broadcasts the directions of the first one.

    Raises:
        ValueError, TypeError: at construction for a value out of range, a mistyped key, parameters of which
        none belongs to a converted layer, or layers that share P but are in different groups.
        RuntimeError: in step() where a layer of these parameters was converted after the optimizer was built,
        its P belongs to another optimizer, its weight has a gradient of its own or is no longer a parameter,
        or a CUDA graph is being captured.

    Warns of layers that had no gradient in the first outer step.
    """

    moves_coordinates = True
    lifts = {"back_projection": BackProjection()}
    storages = {32: Plain()}
    _built = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        inner_steps: int = 200,
        scale: float = 1.0,
        moments: str = "reset",
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
        self._met: set[Tensor] = set()
        """Coordinates that had a gradient in the first outer step, even if a GradScaler skipped all of its
        steps."""
        adamw = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own = dict(
            inner_steps=inner_steps, scale=scale, moments=moments, proximal=proximal, inner=inner, momentum=momentum, rounding=rounding
        )
        claim_sharded()
        super().__init__(params, adamw | own | keys.defaults(keys.POSITION))
        for index, group in enumerate(self.param_groups):
            for param_index in range(len(group["params"])):
                groups.refuse_flattened(group, index, param_index)
        if not any(map(layers_of, self.param_groups)):
            raise ValueError(self._why_no_coordinates())
        self._built = True
        for group in self.param_groups:  # last, after every check: a refused optimizer must not disturb another one on these layers
            self._begin(group)

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

    def _claim_sharded(self) -> None:
        """Finds the layers of sharded parameters that were put in the place of those that the optimizer was
        built with, as accelerate does."""
        if any(is_sharded(param) for group in self.param_groups for param in group["params"][:1]):
            claim_sharded()

    def _defaults_of(self, group: dict[str, Any]) -> dict[str, Any]:
        return keys.defaults(rso_groups.ALL_KEYS)

    # Groups.

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does, then runs every check that is possible now. A refused group leaves the
        optimizer unchanged."""
        super().add_param_group(param_group)
        if self._built:
            self._begin(self.param_groups[-1])

    def _begin(self, group: dict[str, Any]) -> None:
        """Draws the Ps of a new group."""
        layers = layers_of(group)
        _move_subspaces(layers, group["outer_step"], {})
        _watch_inputs(group, layers)

    def _complete(self, group: dict[str, Any], index: int) -> None:
        if "rank" in group:
            raise ValueError(f"unknown key 'rank' in a group ({groups.describe(group, index)}); to_subspace(model, rank=…) takes it")
        groups.check_names(group, index, keys.names(rso_groups.ALL_KEYS))
        rso_groups.check_values(group, index)
        rso_groups.check_rounding(group, index, layers_of(group))
        self._check_shared(index)

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

    def _check_converted(self, found: list[Layers]) -> None:
        """Raises RuntimeError where a layer was converted after the optimizer was built, so that its
        coordinates are not in the optimizer. found: the layers of each group."""
        if any(is_unsharded_now(param) for group in self.param_groups for param in group["params"]):
            raise RuntimeError(
                "FSDP2 keeps the parameters of converted layers whole after the backward pass; call model.reshard() before step(), or leave"
                " set_reshard_after_backward at True"
            )
        owned = {param for layers in found for param in layers}
        for index, (group, layers) in enumerate(zip(self.param_groups, found, strict=True)):
            for param in group["params"]:
                layer = None if param in layers else layer_of(param)
                if layer is not None and param is layer.weight and layer.coordinates not in owned and layer.coordinates.requires_grad:
                    raise RuntimeError(
                        f"{rso_groups.describe(group, index, param)} is the weight of a SubspaceLinear whose coordinates are not in this "
                        "optimizer; build the optimizer after the conversion, from all of model.parameters(), or call to_dense(model)"
                    )

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        rule = rso_groups.RULES[group["inner"]]
        return Hyper(
            rule=rule,
            lift=self.lifts["back_projection"],
            storage=self.storages[32],
            lr=float(group["lr"]),
            scale=group["scale"],
            weight_decay=group["weight_decay"],
            options={key: group[key] for key in rule.keys},
        )

    # The step.

    def _work(self, capturing: bool) -> list[tuple[dict[str, Any], list[Tensor], list[Members]]]:
        if capturing:
            raise RuntimeError(
                "RSOAdamW.step() cannot be captured in a CUDA graph, whose replays would never draw the next P; leave it out"
            )
        self._claim_sharded()
        found = list(map(layers_of, self.param_groups))
        self._check_converted(found)
        return [
            (group, *self._sorted_layers(group, index, layers))
            for index, (group, layers) in enumerate(zip(self.param_groups, found, strict=True))
        ]

    def _sorted_layers(self, group: dict[str, Any], index: int, layers: Layers) -> tuple[list[Tensor], list[Members]]:
        """Runs every check of a group. Returns its dense parameters and its buckets of layers."""
        rso_groups.check_values(group, index)
        rso_groups.check_rounding(group, index, layers)
        for place, param in enumerate(group["params"]):
            if param.grad is not None:
                check_grad(group, index, place, param.grad)
        for param, layer in layers.items():
            rso_groups.check_layer(layer, group, index, param)
        # A parameter with the state of coordinates but without a layer is left over: to_dense has turned its
        # layer back.
        dense = [param for param in group["params"] if param not in layers and "subspace" not in self.state.get(param, ())]
        return dense, rso_buckets.buckets(group, layers)

    def _step_group(
        self,
        group: dict[str, Any],
        low_rank: list[Members],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        capturing: bool,
    ) -> None:
        hyper = self._hyper(group)
        copies = group["proximal"] or grad_scale is not None or group["inner"] != "adamw"
        for members in low_rank:
            members.states = [
                self._state_of(param, layer, group, hyper) for param, layer in zip(members.params, members.layers, strict=True)
            ]
            whole = not copies and all(grad.is_contiguous() for grad in members.grads)
            whole = whole and not any("displacement" in state for state in members.states)
            for correction, alike in rso_buckets.by_correction(members, group["betas"][0]):
                corrected = replace(hyper, scale=hyper.scale * correction)
                for part in [alike] if whole else rso_buckets.in_parts(alike):
                    self._move_layers(group, part, corrected, grad_scale, found_inf)

    def _move_layers(
        self, group: dict[str, Any], members: rso_buckets.LayerMembers, hyper: Hyper, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        states, device = members.states, members.device
        weights = [local(layer.weight) for layer in members.layers]
        found_inf = None if found_inf is None else members.to_device(found_inf)
        projected = self._projected(group, members, grad_scale)
        bases = [layer.subspace.matrix(device, weight.dtype) for layer, weight in zip(members.layers, weights, strict=True)]
        steps = [state["step"] for state in states]
        bucket = self._bucket(group, members, hyper, found_inf, weights=weights, bases=bases, steps=steps, projected=projected)
        if not weights[0].numel():  # a process without any of the output features
            pass
        elif not any("displacement" in state for state in states):
            backends.step(bucket, hyper)
        else:  # B moves by N too
            normalised = backends.update(bucket, hyper, projected)
            backends.lift(bucket, hyper, projected, normalised)
            moved = [(local(state["displacement"]), n) for state, n in zip(states, normalised, strict=True) if "displacement" in state]
            displacements, updates = (list(tensors) for tensors in zip(*moved, strict=True))
            with kept_where(found_inf, displacements):
                torch._foreach_mul_(displacements, 1 - hyper.lr * hyper.weight_decay)
                torch._foreach_add_(displacements, updates, alpha=-hyper.lr * hyper.scale)
        self._count(members, found_inf)
        for state in states:
            if "carried" in state:
                state["since"] += 1

    def _projected(self, group: dict[str, Any], members: rso_buckets.LayerMembers, grad_scale: Tensor | None) -> list[Tensor]:
        """R of each layer: the gradient of its coordinates, unscaled, and with the proximal term."""
        projected = [grad.contiguous() for grad in members.grads]
        if grad_scale is not None:
            projected = [r.to(torch.promote_types(r.dtype, torch.float32)) for r in projected]
            projected = list(torch._foreach_div(projected, members.to_device(grad_scale).reshape(())))
            torch._foreach_copy_(members.grads, projected)  # as torch's fused AdamW leaves them
        if group["proximal"]:
            displacements = [local(state["displacement"]) for state in members.states]
            projected = [r.to(displacement.dtype) for r, displacement in zip(projected, displacements, strict=True)]
            projected = list(torch._foreach_add(projected, displacements, alpha=group["proximal"]))
        return projected

    def _rounding_seeds(self, group: dict[str, Any], members: rso_buckets.LayerMembers) -> Tensor:
        # Elements are counted from a process's first one, and the parts should round apart.
        part = () if members.sharding is None else (members.sharding.index,)
        seeds = [
            philox.signed64(philox.derive_seed(layer.subspace.fingerprint, group["outer_step"], place, *part))
            for layer, place in zip(members.layers, members.places, strict=True)
        ]
        return upload(pack([seeds]), 1, members.device)[0]

    def _state_of(self, param: Tensor, layer: SubspaceLayer, group: dict[str, Any], hyper: Hyper) -> dict[str, Any]:
        """The layer's state, made complete for the current settings. Missing tensors become zeros. The
        moments of another inner optimizer are removed."""
        state, needed = self.state[param], hyper.rule.state(*param.shape)
        state_dtype = torch.promote_types(param.dtype, torch.float32)
        if any(key not in state for key in needed):
            for key in (key for names in rso_groups.INNER.values() for key in names):
                state.pop(key, None)
            rso_groups.forget_carried(state)
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["subspace"] = layer.subspace.fingerprint
            state |= {key: _zeros(param, layer, state_dtype) for key in needed}
        elif any(
            isinstance(value, Tensor) and value.dtype != state_dtype for key, value in state.items() if key not in rso_groups.UNCAST
        ):  # the model was cast
            cast = (key for key, value in state.items() if isinstance(value, Tensor) and key not in rso_groups.UNCAST)
            state |= {key: state[key].to(state_dtype) for key in list(cast)}
        if group["proximal"] and "displacement" not in state:
            state["displacement"] = _zeros(param, layer, state_dtype)
        if group["moments"] == "carry" and "carried" not in state:
            state |= {"carried": 0, "since": 0}
        if layer.subspace.principal is not None:
            state["principal"] = layer.subspace.principal
        elif layer.subspace.principal_rank and "principal" not in state:
            shape = layer.subspace.in_features, layer.subspace.principal_rank
            state["principal"] = torch.zeros(shape, dtype=torch.float32, device=param.device)
        return state

    # The refresh: the next P, for the next forward pass.

    def _after_step(self, skipped: bool) -> None:
        """Counts the call, even a skipped one, and starts the next outer step where it is due."""
        for group in self.param_groups:
            group["inner_step"] += 1
            if group["outer_step"] == 0:
                self._met.update(param for param in layers_of(group) if param.grad is not None)
        for index, group in enumerate(self.param_groups):
            if group["inner_step"] < group["inner_steps"] - 1:
                continue
            layers = layers_of(group)
            if group["inner_step"] >= group["inner_steps"]:
                self._next_outer_step(group, layers)
                if group["outer_step"] == 1:
                    self._warn_of_unused(group, index, layers)
            _watch_inputs(group, layers)

    def _next_outer_step(self, group: dict[str, Any], layers: Layers) -> None:
        before = {layer.subspace: layer.subspace.principal for layer in layers.values()}
        # Only directions that a state will hold. Those of a layer that has no state yet would be in no
        # checkpoint.
        kept = {param: layer for param, layer in layers.items() if param in self.state}
        try:
            _move_subspaces(layers, group["outer_step"] + 1, before | _principals(kept))
        except BaseException:  # such as out of memory or Ctrl-C; the next call tries again
            _move_subspaces(layers, group["outer_step"], before)
            raise
        group["inner_step"] = 0
        group["outer_step"] += 1
        held = [(self.state[param], layer) for param, layer in layers.items() if param in self.state]
        if group["moments"] == "carry":
            rso_groups.carry(held)
        else:
            rso_groups.reset(state for state, _ in held)
        for state, layer in held:
            if layer.subspace.principal is not None:
                state["principal"] = layer.subspace.principal

    def refresh(self) -> None:
        """Always raises RuntimeError, because this optimizer cannot be a part of a CUDA graph."""
        raise RuntimeError("RSOAdamW has no refresh(): its step() cannot be captured in a CUDA graph, and draws the next P itself")

    def _compare_ranks(self) -> None:
        """Raises RuntimeError where processes would draw different subspaces."""
        layers = [pair for group in self.param_groups for pair in layers_of(group).items()]
        settings = [
            tuple(group[key] for key in ("inner_steps", "scale", "moments", "rounding", *keys.names(keys.POSITION)))
            for group in self.param_groups
        ]
        if layers:
            same = ranks.check_equal(
                [tuple(param.shape) for param, _ in layers],
                [*settings, *(layer.subspace.fingerprint for _, layer in layers)],
                layers[0][0].device,
            )
            if not same and any(layer.subspace.principal_rank for _, layer in layers):
                raise RuntimeError(
                    "distribution='principal' adds up the sketches of all processes, and these hold different layers; use another "
                    "distribution where a model is split over processes"
                )

    def _warn_of_unused(self, group: dict[str, Any], index: int, layers: Layers) -> None:
        unmet = (param for param in layers if param not in self._met and param.requires_grad)
        unused = [param for param in unmet if not self.state.get(param, {}).get("step", 0) > 0]  # a loaded state has moved
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
        self._built, self._met = True, set()

    def _missing_in_older(self, group: dict[str, Any]) -> dict[str, Any]:
        return rso_groups.missing_in_older(group)

    def _checked(self, incoming: dict[str, Any]) -> dict[str, Any]:
        self._claim_sharded()
        return super()._checked(incoming)

    def _check_loaded_group(self, group: dict[str, Any], saved: dict[str, Any], index: int) -> list[str]:
        if missing := [key for key in keys.names((*keys.RSO, *keys.POSITION)) if key not in saved]:
            raise ValueError(f"the checkpoint's group {index} has no {missing[0]!r}; it was saved for another optimizer")
        if len(group["params"]) != len(saved["params"]):
            return []
        groups.check_names({**saved, "param_names": None}, index, keys.names(rso_groups.ALL_KEYS))
        rso_groups.check_values(saved, index)
        return loading.changes(group, saved, keys.RSO, index)

    def _check_loaded_state(
        self, state: dict[str, Any], param: Tensor, saved: dict[str, Any], group: dict[str, Any], index: int, place: int
    ) -> None:
        layer, where = layers_of({"params": [param]}).get(param), groups.describe(group, index, place)
        if ("subspace" in state) != (layer is not None):
            kinds = ("an ordinary parameter", "coordinates of a SubspaceLinear")
            raise ValueError(
                f"the checkpoint has the state of {kinds['subspace' in state]} for {where}, which is {kinds[layer is not None]}; "
                "convert the model as it was when the checkpoint was saved"
            )
        if layer is not None:
            rso_groups.check_loaded_state(state, layer, where)
        else:
            loading.check_dense(state, param, where)

    def _restore(self, final: dict[str, Any]) -> None:
        for group, saved_group in zip(self.param_groups, final["param_groups"], strict=True):
            layers = layers_of(group)
            for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
                state, saved = self.state.get(param, {}), final["state"].get(saved_id, {})
                if param not in layers:
                    loading.restore_dense(state, saved, param)
                    continue
                state_dtype = torch.promote_types(param.dtype, torch.float32)
                for key, value in saved.items():
                    if isinstance(value, Tensor):
                        dtype = torch.float32 if key in rso_groups.UNCAST else state_dtype
                        state[key] = _loaded(key, value.detach().to(dtype), layers[param], param)
            states = ((self.state.get(param, {}), layer) for param, layer in layers.items())
            held = [(state, layer) for state, layer in states if rso_groups.principal_of(state) is not None]
            _move_subspaces(layers, group["outer_step"], {layer.subspace: state["principal"] for state, layer in held})
            for state, layer in held:  # one Q for layers that share P
                state["principal"] = layer.subspace.principal
            _watch_inputs(group, layers)


def _loaded(key: str, value: Tensor, layer: SubspaceLayer, param: Tensor) -> Tensor:
    """A checkpoint's value in memory of its own; of a sharded layer, this process's part in a DTensor."""
    if key in rso_groups.UNCAST or not is_sharded(layer.weight):
        value = value.full_tensor() if is_sharded(value) else value
        return value.to(param.device, copy=True, memory_format=torch.contiguous_format)
    sharding, out = sharding_of(layer.weight), param.shape[1]
    dim, length = _cut(sharding, out)
    return sharding.wrap(taken(value, sharding, dim, param.device).contiguous(), dim, length)


def _zeros(param: Tensor, layer: SubspaceLayer, dtype: torch.dtype) -> Tensor:
    """A state (r, out) of zeros. It is cut like the layer's output features."""
    if not is_sharded(layer.weight):
        return torch.zeros(param.shape, dtype=dtype, device=param.device)
    sharding, (rank, out) = sharding_of(layer.weight), param.shape
    columns = sharding.piece(out)[1] if sharding.dim is not None else out
    return sharding.wrap(torch.zeros((rank, columns), dtype=dtype, device=param.device), *_cut(sharding, out))


def _cut(sharding: Sharding, out: int) -> tuple[int | None, int]:
    """The dimension and length of `Sharding.wrap`, for a state (r, out)."""
    return (None, 0) if sharding.dim is None else (1, out)


def _move_subspaces(layers: Layers, outer_step: int, principals: dict[Subspace, Tensor | None]) -> None:
    """Draws the Ps of that outer step. principals: the principal directions of those that have some."""
    for layer in layers.values():
        layer.subspace.move_to(outer_step, principals.get(layer.subspace))
        layer.subspace.has_optimizer = True


def _principals(layers: Layers) -> dict[Subspace, Tensor | None]:
    """The principal directions of the inputs in the last step. A subspace whose layers were not used keeps
    its own."""
    found = {}
    for layer in layers.values():
        subspace = layer.subspace
        if subspace.sketch is not None and subspace not in found:
            directions = principal_directions(subspace.sketch, subspace.principal_rank)
            found[subspace] = subspace.principal if directions is None else directions
    return found


def _watch_inputs(group: dict[str, Any], layers: Layers) -> None:
    """Drops the sketches of the inputs. Before the last forward pass of an outer step it begins new ones,
    from which the next principal directions come."""
    for layer in layers.values():
        layer.subspace.sketch = None
    for layer in layers.values() if group["inner_step"] >= group["inner_steps"] - 1 else ():
        layer.subspace.watch_inputs(layer.weight.device)
