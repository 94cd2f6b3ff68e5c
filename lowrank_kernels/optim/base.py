"""LowRankOptimizer: what every low-rank optimizer shares. Groups and checks, the refresh schedule, buckets, dense groups, state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import ops, subspaces
from ..ops.dispatch import outside_training
from . import buckets, groups, keys, ranks, scaler
from .buckets import Bucket
from .dense import dense_adamw_step_
from .loading import check_dense, check_step, check_tensors, load_uncast, restore_dense
from .waiting import Waiting

HOST = ("cpu",)
"""Devices whose tensors can be read without waiting."""


class LowRankOptimizer(Optimizer):
    """Groups with `rank` are projected and updated by the subclass, bucket by bucket; the others are ordinary AdamW.

    A projected parameter's state is {"step": number, "basis": (m, r) in its dtype, …the subclass's tensors}, a dense one's is
    torch.optim.AdamW's. A parameter with a name has `draw_key` besides, a number for that name, by which its draws go on being keyed. The
    basis is zero as long as no gradient was other than that. `step` counts the updates that were made: an int, or with capturable=True,
    and after a GradScaler's step on a GPU, one fp32 on the parameter's device. A basis is chosen before the first update and wherever
    step % update_proj_gap is the parameter's offset: 0, or in a group with `stagger` its share of the period. A step that raises leaves the
    bucket in which it happened, and those after it, as they were.

    With a GradScaler the step is skipped on the device. On a GPU the host learns of it later, and waits for it only where a basis may be
    due. Gradients that the scaler has not unscaled are unscaled here, in place; 16-bit ones through fp32 copies, a bucket at a time.

    What serves from one step to the next, buckets and the lists that operators take, is kept in a Plan (buckets.py), which notices what
    a user changes in between.
    """

    selection: str | None = None
    """The selection that the class stands for, or None where each group chooses."""

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf, as it does to torch's fused AdamW

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, capturable: bool
    ) -> None:
        self._forget()
        self._clamp_warned: set[tuple[int, int]] = set()
        self._compared = False
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, capturable=capturable))
        if self.selection is not None and not any(map(groups.is_low_rank, self.param_groups)):
            warnings.warn(
                f"{type(self).__name__} has no group with rank and trains every parameter with AdamW; "
                "lowrank_kernels.param_groups(model, rank=…) makes groups that are projected",
                UserWarning,
                stacklevel=3,
            )

    def _forget(self) -> None:
        """What was found out about the states, which may all be others now."""
        self._plan: buckets.Plan | None = None
        self._counts: dict[Tensor, tuple[Tensor, int]] = {}
        self._skipped = scaler.SkippedSteps()
        self._waiting = Waiting()
        self._captured: list[buckets.Plan] = []
        """What CUDA graphs read besides the states: they do not tell when they die."""

    # What a subclass provides.

    def state_shapes(self, group: dict[str, Any], rank: int, n: int) -> dict[str, tuple[int, int]]:
        """The tensors beside the basis in a projected parameter's state, and the shape that each has for one matrix."""
        raise NotImplementedError

    def new_state(self, member: buckets.Member, bucket: Bucket) -> dict[str, Tensor]:
        """These tensors before the first update."""
        raise NotImplementedError

    def step_bucket(self, bucket: Bucket, bases: list[Tensor], found_inf: Tensor | None) -> None:
        """Moves the bucket's weights and states: one op call. Must not change anything before it can no longer fail."""
        raise NotImplementedError

    # Groups.

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, then every check that can be made now; see `groups.complete`. A refused group leaves the optimizer as it was."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            groups.complete(self.param_groups[index], index, self.selection)
        except BaseException:
            del self.param_groups[index]
            raise
        if groups.is_low_rank(param_group):
            groups.warn_if_clamped(param_group, index, self._clamp_warned)

    def _indexed_groups(self) -> list[tuple[int, dict[str, Any], int]]:
        """(group index, group, index of its first parameter in the optimizer)."""
        indexed, first = [], 0
        for index, group in enumerate(self.param_groups):
            indexed.append((index, group, first))
            first += len(group["params"])
        return indexed

    # The step.

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns the closure's loss, if one is given.

        Inside a CUDA graph, which takes capturable=True, it is the update alone; `refresh` says how bases come into it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch.compiler.disable
    @outside_training
    def refresh(self) -> None:
        """What a replay of a CUDA graph that holds step() leaves to the host: call it once before each replay.

        Chooses the bases that are due before that update, from the gradients as they stand, which the graph last left there (or, where
        the backward pass is a graph of its own, has just computed), into the same memory. Counts the update. Raises RuntimeError
        without capturable=True, before the first step, and where no parameter has a gradient.
        """
        low_rank = [entry for entry in self._indexed_groups() if groups.is_low_rank(entry[1])]
        self._waiting.settle(self.state)
        for index, group, _ in low_rank:
            if not group["capturable"]:
                raise RuntimeError(f"refresh() is for steps in a CUDA graph; group {index} has capturable=False, where step() does it")
        self._take_back(self._skipped.known(wait=True))
        plan = self._plan_of(low_rank)
        if low_rank and not plan.buckets:
            raise RuntimeError(
                "refresh() found no gradient to choose bases from; leave those of the graph where they are, "
                "without a zero_grad() after step()"
            )
        try:
            for bucket in plan.buckets:
                if not bucket.members[0].state:
                    raise RuntimeError("refresh() came before the first step; take one outside of the graph, which makes the states")
            # All before anything changes: what may run out of memory.
            fresh = [self._refresh(bucket.due(), None) for bucket in plan.buckets]
            for bucket, chosen in zip(plan.buckets, fresh, strict=True):
                bucket.count_on_device()
                self._keep(chosen, bucket)
                bucket.step += 1
        finally:
            plan.release()

    @outside_training
    def _update(self) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        indexed = self._indexed_groups()
        low_rank = [entry for entry in indexed if groups.is_low_rank(entry[1])]
        for index, group, _ in indexed:
            groups.check_values(group, index, self.selection)
            if not groups.is_low_rank(group):
                for param_index, param in enumerate(group["params"]):
                    if param.grad is not None:
                        buckets.check_grad(group, index, param_index)
        # Nothing is captured before CUDA is initialised, which asking would do.
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if not capturing:
            self._take_back(self._skipped.known(wait=False))
            self._waiting.settle(self.state)
        plan = self._plan_of(low_rank)
        if not (capturing or self._compared):
            self._compare_ranks(low_rank)
        if self._skipped and not capturing and any(bucket.needs_count(len(self._skipped)) for bucket in plan.buckets):
            self._take_back(self._skipped.known(wait=True))
            plan = self._plan_of(low_rank)
        stepped: list[Tensor] = []
        try:
            for _, group, _ in indexed:
                if not groups.is_low_rank(group):
                    dense_adamw_step_(group, self.state, grad_scale, found_inf)
            for bucket in plan.buckets:
                self._step_low_rank(bucket, grad_scale, found_inf, capturing)
                if found_inf is not None:
                    stepped += [member.param for member in bucket.members]
        finally:
            plan.release()
            if capturing:
                self._captured.append(plan)
            if stepped and not capturing:
                self._take_back(self._skipped.note(found_inf, stepped))

    def _plan_of(self, low_rank: buckets.Groups) -> buckets.Plan:
        if self._plan is None or not self._plan.follow(low_rank, self.state):
            self._drop_plan()
            self._plan = buckets.Plan(low_rank, self.state, self._counts, self._waiting.params)
        return self._plan

    def _drop_plan(self) -> None:
        if self._plan is not None:
            self._counts |= self._plan.counts()
            self._plan = None

    def _step_low_rank(self, bucket: Bucket, grad_scale: Tensor | None, found_inf: Tensor | None, capturing: bool) -> None:
        if capturing:
            _check_capture(bucket)
        if found_inf is not None:
            found_inf = bucket.to_device(found_inf)
        with scaler.unscaled(bucket, grad_scale):
            if bucket.step == 0:
                for member in bucket.members:
                    if not member.state:
                        named = {} if member.key == member.index else {"draw_key": member.key}
                        member.state |= {"step": 0, **named, **self.new_state(member, bucket)}
            if bucket.hyper["capturable"] or (found_inf is not None and found_inf.is_cuda):
                bucket.count_on_device()
            # Before anything moves: what may still run out of memory.
            fresh = {} if capturing else self._refresh(bucket.due(), found_inf)
            if fresh:
                whole = [fresh[member.index] if member.index in fresh else member.state["basis"] for member in bucket.members]
                bases = [matrix for basis in whole for matrix in buckets.split(basis)]
            else:
                bases = bucket.states("basis")
            self.step_bucket(bucket, bases, found_inf)
        if fresh:
            self._keep(fresh, bucket)
        for param, matrix in bucket.copied:
            param.copy_(matrix.view(param.shape))
        bucket.advance(found_inf, self.state, capturing)

    def _refresh(self, due: list[Bucket], found_inf: Tensor | None) -> dict[int, Tensor]:
        """A new basis, (m, r) or (experts, m, r), for each member, by its index in the optimizer."""
        fresh: dict[int, Tensor] = {}
        for bucket in due:
            chosen = iter(self._chosen(bucket, found_inf))
            for member in bucket.members:
                whole = buckets.join([next(chosen) for _ in range(member.matrices)], member.param)
                fresh[member.index] = subspaces.own_memory(whole)
        return fresh

    def _chosen(self, bucket: Bucket, found_inf: Tensor | None) -> list[Tensor]:
        """One for each matrix. Of those that wait only matrices without a basis get one; a CPU chooses no other, a GPU takes no other."""
        hyper = bucket.hyper
        previous = bucket.states("basis") if "basis" in bucket.members[0].state else None
        wanted = range(len(bucket.grads))
        if bucket.waits and bucket.device.type in HOST:
            wanted = [number for number in wanted if not previous[number].any()]
            if not wanted:
                return previous
        chosen = ops.choose_bases(
            [bucket.grads[number] for number in wanted],
            None if previous is None else [previous[number] for number in wanted],
            rank=bucket.rank,
            right=bucket.right,
            selection=hyper["selection"],
            svd=hyper["svd"],
            oversample=hyper["oversample"],
            power_iters=hyper["power_iters"],
            seed=hyper["seed"],
            refresh_number=bucket.refresh_number,
            places=[bucket.places[number] for number in wanted],
            dtype=bucket.members[0].param.dtype,
            found_inf=found_inf,
        )
        if not bucket.waits:
            return chosen
        bases = list(previous)
        for number, basis in zip(wanted, chosen, strict=True):
            bases[number] = torch.where(bases[number].any(), bases[number], basis)
        return bases

    def _keep(self, fresh: dict[int, Tensor], bucket: Bucket) -> None:
        """New bases into the states, into the same memory where a graph may hold its address."""
        first = []
        for member in bucket.members:
            if member.index not in fresh:
                continue
            if "basis" not in member.state or member.param in self._waiting.params:
                first.append(member)
            if bucket.hyper["capturable"] and "basis" in member.state:
                member.state["basis"].copy_(fresh[member.index])
            else:
                member.state["basis"] = fresh[member.index]
        if bucket.hyper["selection"] != "random":  # which needs no gradient
            self._waiting.note([member.param for member in first], [member.state["basis"] for member in first])

    def _compare_ranks(self, low_rank: buckets.Groups) -> None:
        """Once, where torch.distributed is initialised: the draws of all processes have to agree. One that has none takes part as well."""
        self._compared = True
        held, chosen = [], []
        for _, group, first in low_rank:
            chosen.append(tuple(group[key] for key in keys.names(keys.LOW_RANK)))
            for number, param in enumerate(group["params"]):
                name = groups.draw_key(group, number)
                held.append((tuple(param.shape), first + number if name is None else name))
        params = (param for group in self.param_groups for param in group["params"])
        ranks.check_equal(held, chosen, next((param.device for param in params), torch.device("cpu")))

    def _take_back(self, params: list[Tensor]) -> None:
        """One update less for each: it turned out to be skipped. A count on the device knows that by itself."""
        if not params:
            return
        self._drop_plan()
        for param in params:
            state = self.state.get(param, {})
            if isinstance(state.get("step"), int):  # unless the user has cleared it
                state["step"] -= 1
            elif param in self._counts:
                tensor, count = self._counts[param]
                self._counts[param] = tensor, count - 1

    # State.

    def __getstate__(self) -> dict[str, Any]:
        self._take_back(self._skipped.known(wait=True))
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self.__dict__.setdefault("_clamp_warned", set())
        self._compared = False
        self.defaults.setdefault("capturable", False)
        for group in self.param_groups:  # of an older version
            for key, value in groups.missing_in_older(group).items():
                group.setdefault(key, value)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so that torch.load(..., weights_only=True) takes it."""
        self._take_back(self._skipped.known(wait=True))
        return super().state_dict()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but fp32 states of half-precision parameters stay fp32, and nothing loaded shares memory with `state_dict`.

        Raises ValueError where the checkpoint's groups or states cannot belong to this optimizer.
        """
        self._take_back(self._skipped.known(wait=True))
        try:
            load_uncast(self, super().load_state_dict, state_dict, check=self._completed, restore=self._restore_states)
        finally:
            self._forget()

    def _completed(self, incoming: dict[str, Any]) -> dict[str, Any]:
        """With the keys that the checkpoint is older than, and checked."""
        if any("projector" in state for state in incoming["state"].values()):
            raise ValueError(
                "the checkpoint is one of galore-torch or its kin, whose states hold a projector; the model's weights can be loaded, its "
                "optimizer starts anew"
            )
        completed = [groups.missing_in_older(group) | group for group in incoming["param_groups"]]
        final = {**incoming, "param_groups": completed}
        self._check_loaded(final)
        return final

    def _check_loaded(self, incoming: dict[str, Any]) -> None:
        changes = []
        for index, (group, saved) in enumerate(zip(self.param_groups, incoming["param_groups"], strict=False)):
            if groups.is_low_rank(group) != groups.is_low_rank(saved):
                kinds = ("dense", "low-rank")
                raise ValueError(
                    f"group {index} is {kinds[groups.is_low_rank(group)]} here but {kinds[groups.is_low_rank(saved)]} in the checkpoint; "
                    "build the groups as they were when it was saved (a checkpoint of another optimizer does not fit)"
                )
            groups.check_names({**saved, "param_names": None}, index)
            groups.check_values(dict(saved), index, self.selection)
            if len(group["params"]) != len(saved["params"]):
                continue  # torch says so
            for key in keys.names(keys.LOW_RANK) if groups.is_low_rank(group) else ():
                if group[key] != saved[key]:
                    changes.append(f"{key} {group[key]!r} becomes {saved[key]!r} (group {index})")
            final = {**group, **saved, "params": group["params"]}
            for param_index, (param, saved_id) in enumerate(zip(group["params"], saved["params"], strict=True)):
                where = groups.describe(group, index, param_index)
                state = incoming["state"].get(saved_id)
                if groups.is_low_rank(group):
                    groups.check_param(final, index, param_index)
                    if state:
                        self._check_loaded_state(state, param, saved, where)
                elif state:
                    check_dense(state, param, where)
        groups.warn_of_changes(changes)

    def _check_loaded_state(self, state: dict[str, Any], param: Tensor, saved: dict[str, Any], where: str) -> None:
        shape = groups.matrix_shape(param)
        m, n = reversed(shape) if groups.is_right(shape, saved["proj_type"]) else shape
        rank = min(saved["rank"], m, n)
        batch = param.shape[:1] if param.dim() == 3 else ()
        expected = {"basis": (m, rank), **self.state_shapes(saved, rank, n)}
        if "step" not in state:
            raise ValueError(f"the checkpoint's step is missing ({where}); it was saved for another optimizer")
        check_step(state["step"], where)
        check_tensors(state, (key for key in expected if key in state), where)
        coded = "exp_avg" in state and state["exp_avg"].dtype == torch.uint8
        if coded != (saved["state_bits"] == 8):
            raise ValueError(
                f"the checkpoint's moments are {state['exp_avg'].dtype} but its state_bits are {saved['state_bits']} ({where})"
            )
        for key, matrix in expected.items():
            wanted = (*batch, *matrix)
            found = tuple(state[key].shape) if key in state else None
            if found != wanted:
                raise ValueError(
                    f"the checkpoint's {key} is {'missing' if found is None else found}, expected {wanted} ({where}); "
                    "it was saved for another model or another optimizer"
                )

    def _restore_states(self, final: dict[str, Any]) -> None:
        for group, saved_group in zip(self.param_groups, final["param_groups"], strict=True):
            for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
                saved = final["state"].get(saved_id, {})
                if not groups.is_low_rank(group):
                    restore_dense(self.state.get(param, {}), saved, param)
                    continue
                for key, value in saved.items():
                    if not isinstance(value, Tensor):
                        continue
                    if key == "basis":
                        self.state[param][key] = subspaces.own_memory(value.detach().to(param.device))
                    else:  # row-major, which the step relies on
                        self.state[param][key] = value.detach().to(param.device, copy=True, memory_format=torch.contiguous_format)


def _check_capture(bucket: Bucket) -> None:
    if not bucket.hyper["capturable"]:
        raise RuntimeError("step() is being captured in a CUDA graph; build the optimizer with capturable=True")
    if not bucket.members[0].state:
        raise RuntimeError("step() is being captured before the first step, which makes the states; take one outside of the graph")
