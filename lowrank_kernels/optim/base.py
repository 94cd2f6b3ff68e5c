"""LowRankOptimizer: what every low-rank optimizer shares. Groups and checks, the refresh schedule, buckets, dense groups, state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import ops, subspaces
from ..ops.dispatch import outside_training
from . import buckets, groups
from .buckets import Bucket
from .dense import dense_adamw_step_


class LowRankOptimizer(Optimizer):
    """Groups with `rank` are projected and updated by the subclass, bucket by bucket; the others are ordinary AdamW.

    A projected parameter's state is {"step": int, "basis": (m, r) in its dtype, …the subclass's tensors}, a dense one's is
    torch.optim.AdamW's. `step` counts the updates that were made. A basis is chosen before the first update and wherever
    step % update_proj_gap is the parameter's offset: 0, or in a group with `stagger` its share of the period. A step that raises
    leaves the bucket in which it happened, and those after it, as they were.

    With a GradScaler the step is skipped on the device. On a GPU the host learns of it at the start of the next step, for which it
    waits if that flag is still under way, and so `step` may read one too many until then (state_dict() waits as well). Gradients
    that the scaler has not unscaled are unscaled here, in place; 16-bit ones through fp32 copies, a bucket at a time.
    """

    selection: str | None = None
    """The selection that the class stands for, or None where each group chooses."""

    state_keys: tuple[str, ...]
    """The tensors beside the basis in a projected parameter's state; load_state_dict keeps their dtype."""

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf, as it does to torch's fused AdamW

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self._unsettled: list[tuple[torch.cuda.Event, Tensor, list[Tensor]]] = []
        self._clamp_warned: set[tuple[int, int]] = set()
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    # What a subclass provides.

    def new_state(self, member: buckets.Member, bucket: Bucket) -> dict[str, Tensor]:
        """The subclass's state of a parameter before its first update."""
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
        """One update of every parameter that has a gradient. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @outside_training
    def _update(self) -> None:
        self._settle()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for index, group in enumerate(self.param_groups):
            groups.check_values(group, index, self.selection)
            for param_index, param in enumerate(group["params"]):
                if param.grad is not None:
                    buckets.check_grad(group, index, param_index)
        indexed = self._indexed_groups()
        work = buckets.build([entry for entry in indexed if groups.is_low_rank(entry[1])], self.state)
        for _, group, _ in indexed:
            if not groups.is_low_rank(group):
                dense_adamw_step_(group, self.state, grad_scale, found_inf)
        for bucket in work:
            self._step_low_rank(bucket, grad_scale, found_inf)
            if found_inf is not None:
                self._note_unsettled(bucket, found_inf)

    def _step_low_rank(self, bucket: Bucket, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if found_inf is not None:
            found_inf = _to_device_of(bucket, found_inf)
        with _unscaled(bucket, grad_scale):
            for member in bucket.members:
                if not member.state:
                    member.state = {"step": 0, **self.new_state(member, bucket)}
            due = bucket.due()
            # Before anything moves: what may still run out of memory.
            fresh = self._refresh(due, found_inf) if due.members else {}
            bases = [fresh[member.index] if member.index in fresh else member.state["basis"] for member in bucket.members]
            self.step_bucket(bucket, [matrix for basis in bases for matrix in buckets.split(basis)], found_inf)
        for member, basis in zip(bucket.members, bases, strict=True):
            member.state["basis"] = basis
            member.state["step"] += 1
            if member.write_back is not None:
                member.param.copy_(member.write_back.view(member.param.shape))
            self.state[member.param] = member.state

    def _refresh(self, bucket: Bucket, found_inf: Tensor | None) -> dict[int, Tensor]:
        """A new basis, (m, r) or (experts, m, r), for each member, by its index in the optimizer."""
        hyper = bucket.hyper
        chosen = ops.choose_bases(
            bucket.grads,
            bucket.states("basis") if "basis" in bucket.members[0].state else None,
            rank=bucket.rank,
            right=bucket.right,
            selection=hyper["selection"],
            svd=hyper["svd"],
            oversample=hyper["oversample"],
            power_iters=hyper["power_iters"],
            seed=hyper["seed"],
            refresh_number=bucket.refresh_number,
            places=bucket.places,
            dtype=bucket.members[0].param.dtype,
            found_inf=found_inf,
        )
        remaining = iter(chosen)
        return {
            member.index: subspaces.own_memory(buckets.join([next(remaining) for _ in member.weights], member.param))
            for member in bucket.members
        }

    # Steps that a GradScaler skipped.

    def _note_unsettled(self, bucket: Bucket, found_inf: Tensor) -> None:
        params = [member.param for member in bucket.members]
        if found_inf.is_cuda:
            flag = torch.empty(found_inf.shape, dtype=found_inf.dtype, device="cpu", pin_memory=True)
            flag.copy_(found_inf, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(found_inf.device))
            self._unsettled.append((event, flag, params))
        elif found_inf.item():
            self._take_back(params)

    def _settle(self) -> None:
        """Takes back the count of steps that turned out to be skipped. Waits, if at all, for the previous step only."""
        while self._unsettled:
            event, flag, params = self._unsettled.pop()
            event.synchronize()
            if flag.item():
                self._take_back(params)

    def _take_back(self, params: list[Tensor]) -> None:
        for param in params:
            if "step" in self.state.get(param, {}):  # unless the user has cleared it
                self.state[param]["step"] -= 1

    # State.

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_unsettled", [])
        self.__dict__.setdefault("_clamp_warned", set())

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so that torch.load(..., weights_only=True) takes it."""
        self._settle()
        return super().state_dict()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but fp32 states of half-precision parameters stay fp32, and nothing loaded shares memory with `state_dict`.

        Raises ValueError where the checkpoint's groups or states cannot belong to this optimizer.
        """
        self._settle()
        final: dict[str, Any] = {}

        def check(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:  # after the user's own hooks, which may replace the dict
            # A checkpoint may be older than a key.
            defaults = groups.LOW_RANK_DEFAULTS
            completed = [defaults | group if groups.is_low_rank(group) else group for group in incoming["param_groups"]]
            final.update(incoming, param_groups=completed)
            self._check_loaded(final)
            return final

        def restore(_: Optimizer) -> None:  # runs before the user's own hooks
            self._restore_states(final)

        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_loaded(self, incoming: dict[str, Any]) -> None:
        for index, (group, saved) in enumerate(zip(self.param_groups, incoming["param_groups"], strict=False)):
            if groups.is_low_rank(group) != groups.is_low_rank(saved):
                kinds = ("dense", "low-rank")
                raise ValueError(
                    f"group {index} is {kinds[groups.is_low_rank(group)]} here but {kinds[groups.is_low_rank(saved)]} in the checkpoint; "
                    "build the groups as they were when it was saved (a checkpoint of another optimizer does not fit)"
                )
            groups.check_values(dict(saved), index, self.selection)
            if not groups.is_low_rank(group) or len(group["params"]) != len(saved["params"]):
                continue
            for param_index, (param, saved_id) in enumerate(zip(group["params"], saved["params"], strict=True)):
                state = incoming["state"].get(saved_id)
                if state:
                    self._check_loaded_state(state, param, saved, groups.describe(group, index, param_index))

    def _check_loaded_state(self, state: dict[str, Any], param: Tensor, saved: dict[str, Any], where: str) -> None:
        shape = groups.matrix_shape(param)
        m, n = reversed(shape) if groups.is_right(shape, saved["proj_type"]) else shape
        rank = min(saved["rank"], m, n)
        batch = param.shape[:1] if param.dim() == 3 else ()
        expected = {"basis": (*batch, m, rank), **{key: (*batch, rank, n) for key in self.state_keys}}
        for key, wanted in expected.items():
            found = tuple(state[key].shape) if key in state else None
            if found != wanted:
                raise ValueError(
                    f"the checkpoint's {key} is {'missing' if found is None else found}, expected {wanted} ({where}); "
                    "it was saved for another model or another optimizer"
                )

    def _restore_states(self, final: dict[str, Any]) -> None:
        for group, saved_group in zip(self.param_groups, final["param_groups"], strict=True):
            for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
                for key, value in final["state"].get(saved_id, {}).items():
                    if not isinstance(value, Tensor):
                        continue
                    if groups.is_low_rank(group) and key == "basis":
                        self.state[param][key] = subspaces.own_memory(value.detach().to(param.device))
                    elif groups.is_low_rank(group) or key == "step":  # torch's fused AdamW wants its step beside the parameter
                        self.state[param][key] = value.detach().clone().to(param.device)
                    else:
                        self.state[param][key] = self.state[param][key].clone()


def _to_device_of(bucket: Bucket, flag: Tensor) -> Tensor:
    """Asynchronously to a GPU; a copy to the CPU must have arrived before it is read."""
    device = bucket.members[0].param.device
    return flag.to(device, torch.float32, non_blocking=device.type == "cuda")


@contextlib.contextmanager
def _unscaled(bucket: Bucket, grad_scale: Tensor | None) -> Iterator[None]:
    """The bucket's gradients divided by the scale inside, and left so after a step that was made, as torch's fused AdamW does.

    16-bit gradients are divided in fp32 copies: their own quotients would underflow. A failed step leaves all as they were.
    """
    if grad_scale is None:
        yield
        return
    grad_scale = _to_device_of(bucket, grad_scale)
    if bucket.grads[0].dtype.itemsize < 4:
        for member in bucket.members:
            member.grads = [grad.float() / grad_scale for grad in member.grads]
        yield
    else:
        grads = bucket.grads
        torch._foreach_div_(grads, grad_scale)
        try:
            yield
        except BaseException:
            torch._foreach_mul_(grads, grad_scale)
            raise
    for member in bucket.members:
        if member.grads[0].data_ptr() != member.param.grad.data_ptr():
            member.param.grad.copy_(buckets.join(member.grads, member.param).reshape(member.param.shape))
