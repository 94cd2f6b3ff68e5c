"""Gradients that are projected, or used up, while the backward pass runs, so that they never exist all at
once."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import backends
from ..backends import Bucket, Hyper
from ..ops.dispatch import outside_training
from ..sharded import is_sharded, local
from ..sharded.layout import OVER_EXPERTS
from ..sharded.refresh import anywhere, anywhere_on
from ..sharded.step import project as project_sharded
from . import groups, refreshes
from .buckets import Members, bucket_of_one, matrices_of
from .together import Together

if TYPE_CHECKING:
    from .optimizer import LowRankOptimizer

UPDATES = ("deferred", "immediately")
DTYPES = (torch.float32, torch.bfloat16)


def in_backward(
    model: nn.Module,
    optimizer: LowRankOptimizer,
    accumulate: int = 1,
    update: str = "deferred",
    dtype: torch.dtype = torch.float32,
    scaler: torch.amp.GradScaler | None = None,
    process_group: Any = None,
) -> InBackward:
    """Makes the backward pass project each gradient as soon as it is complete, and free it.

        backward pass i:  R = R + PᵀGᵢ' for every projected parameter;  its .grad is None again
        optimizer.step(): moves the weights from R, as if the gradient had been ΣGᵢ

    All full gradients of the projected parameters then never exist at the same time: what is left of them is
    R, r·n elements a matrix in place of m·n. Ordinary parameters keep their gradients.

        optimizer = lrk.GaLoreAdamW(lrk.param_groups(model, rank=128), lr=1e-2)
        lrk.in_backward(model, optimizer, accumulate=4)
        for micro_batches in data:
            for batch in micro_batches:
                (loss(model(batch)) / 4).backward()
            optimizer.clip_grad_norm_(1.0)          # in place of torch.nn.utils.clip_grad_norm_
            optimizer.step()
            optimizer.zero_grad()

    A basis that is due is chosen from the gradient of the first backward pass since the last step. Without
    this function it is chosen from the sum of all. With one pass a step the updates on a CPU are the same bit
    for bit. With several, R is a sum of products in place of a product with a sum, which differs by rounding;
    docs/gradients.md has the bound.

    With update="immediately" a parameter is updated as soon as its gradient is there, and not even R stays.
    step() then moves the ordinary parameters, and counts. One backward pass a step, no clipping and no
    GradScaler are possible so; lifts that need the gradient itself (Fira, APOLLO) are possible with it alone.

    Args:
        model: holds the parameters. Those of them that are in the optimizer's low-rank groups are projected.
        optimizer: a low-rank optimizer of this package. A model may have several, each with its own call.
        accumulate: the number of backward passes between two steps. One more raises RuntimeError, since that
            is a forgotten step(). Fewer are no error.
        update: "deferred" or "immediately".
        dtype: of R between the passes: torch.float32 (fp64 for fp64 parameters), or torch.bfloat16, which
            takes half of the memory.
        scaler: the GradScaler that scales the losses, where there is one. It sees non-finite R only through
            the gradient of an ordinary parameter, so the model must have one.
        process_group: torch.distributed's. The mean over its processes is taken of R once a step, of the
            gradients of ordinary parameters too, and of a gradient from which a basis is chosen. Where
            `model` is a DistributedDataParallel it is that one's, and its own reduction is turned off;
            buffers are then broadcast once a step. Every parameter needs a gradient in each step, and the
            gradients must come in the same order in all processes. Leave it out for a model of FSDP2, whose
            gradients arrive reduced and sharded: each process then projects its parts.

    Returns:
        InBackward, whose remove() ends it.

    What else changes:
        torch.nn.utils.clip_grad_norm_ does not see R; optimizer.clip_grad_norm_ does. step(closure) is
        refused. step() and optimizer.zero_grad() drop R; model.zero_grad() does not. state_dict() does not
        hold it, as it does not hold .grad; load_state_dict() is refused while there is any. After a backward
        pass that raised, step() is refused until optimizer.zero_grad(); with update="immediately" some
        matrices have moved by then. Parameters that are added later keep full gradients. A compiled model
        frees its gradients at the end of each compiled part: compile the layers, not the whole. Reentrant
        checkpointing of a layer that is used twice counts each use as a pass. CUDA graphs are refused. With a
        GradScaler, a basis that is due in a step that is skipped is chosen from that step's gradient, if it
        is finite.

    Raises:
        ValueError, TypeError: for an argument out of range; where no parameter of the model is in a low-rank
            group; for a lift that needs the gradient, with update="deferred"; with several processes where a
            parameter of the model is not in the optimizer.
        RuntimeError: where the optimizer has an in_backward already, or gradients that no step has used.
    """
    if not hasattr(optimizer, "_in_backward"):
        raise TypeError(f"optimizer must be a low-rank optimizer of lowrank_kernels, got {type(optimizer).__name__}")
    if optimizer._in_backward is not None:
        raise RuntimeError("in_backward was called for this optimizer before; remove() what that call returned first")
    if scaler is not None and not scaler.is_enabled():
        scaler = None
    check_arguments(optimizer, accumulate, update, dtype, scaler)
    handle = InBackward(optimizer, accumulate, update, dtype, scaler)
    handle._begin(model, process_group)
    optimizer._in_backward = handle
    return handle


def check_arguments(
    optimizer: LowRankOptimizer, accumulate: int, update: str, dtype: torch.dtype, scaler: torch.amp.GradScaler | None
) -> None:
    """Raises ValueError where in_backward cannot work with these."""
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate must be a positive integer, got {accumulate!r}")
    if update not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(UPDATES)}, got {update!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if update == "immediately" and accumulate > 1:
        raise ValueError(f"update='immediately' takes one backward pass a step, got accumulate={accumulate}; leave update at 'deferred'")
    if update == "immediately" and scaler is not None:
        raise ValueError("update='immediately' moves weights before a GradScaler has looked at all gradients; leave update at 'deferred'")
    if getattr(optimizer, "moves_coordinates", False):
        raise ValueError("the gradients of coordinates are R already, so RSOAdamW needs no in_backward")
    for index, group in enumerate(optimizer.param_groups):
        if update == "deferred" and groups.is_low_rank(group) and optimizer.lifts[group["lift"]].takes_gradient:
            raise ValueError(
                f"lift={group['lift']!r} moves the weights by their gradients, for which R is not enough "
                f"({groups.describe(group, index)}); use update='immediately'"
            )


class InBackward:
    """What `in_backward` returns. Users call remove(), and average() with a GradScaler over several
    processes; optimizers call the rest.

    projected: parameter → R of the passes since the last step, (r, n) or (experts, r, n). moved: the
    parameters updated since then, with update="immediately". sent_bytes: what this process has given to
    all-reduces so far.
    """

    def __init__(
        self, optimizer: LowRankOptimizer, accumulate: int, update: str, dtype: torch.dtype, scaler: torch.amp.GradScaler | None
    ) -> None:
        self.projected: dict[Tensor, Tensor] = {}
        self.moved: set[Tensor] = set()
        self._optimizer = weakref.ref(optimizer)
        self._accumulate, self._at_once, self._dtype, self._scaler = accumulate, update == "immediately", dtype, scaler
        self._places: dict[Tensor, tuple[int, int]] = {}
        """Parameter → (index of its group, place in it)."""
        self._hooks: list[Any] = []
        self._together: Together
        self._passes: Counter[Tensor] = Counter()
        """How many gradients of a parameter have come since the last step."""
        self._running: set[int] = set()
        """Backward passes that have begun and not ended."""
        self._infinite: set[Tensor] = set()
        """Parameters whose gradient was not finite when a basis was due."""
        self._closed = self._averaged = self._unscaled = self._shown = False
        """Since the last step: whether gradients were clipped or averaged, so that no more may come; whether
        R is the mean over the processes, is unscaled, and was shown to the scaler."""

    def _begin(self, model: nn.Module, process_group: Any) -> None:
        optimizer = self.optimizer
        of_model = set(model.parameters())
        for index, group in enumerate(optimizer.param_groups):
            if not groups.is_low_rank(group):
                continue
            for place, param in enumerate(group["params"]):
                if param in of_model:
                    self._places.setdefault(param, (index, place))
                    if param.grad is not None:
                        raise RuntimeError(f"{groups.describe(group, index, place)} has a gradient already; call optimizer.zero_grad()")
        if not self._places:
            raise ValueError("no parameter of the model is in a low-rank group of the optimizer")
        model = getattr(model, "_orig_mod", model)  # torch.compile's
        together = Together(model, process_group)
        if self._scaler is not None and not any(param.requires_grad for param in self._ordinary()):
            raise ValueError("a GradScaler sees R only through the gradient of an ordinary parameter, and the optimizer has none")
        if not together.alone:
            held = {param for group in optimizer.param_groups for param in group["params"]}
            if left := [name for name, param in model.named_parameters() if param.requires_grad and param not in held]:
                raise ValueError(
                    f"in_backward takes the mean of this optimizer's gradients alone, and {len(left)} parameters of the model are not in "
                    f"it, {left[0]!r} for one; put all into one optimizer, or freeze them"
                )
        together.begin()
        self._together = together
        me = weakref.ref(self)
        for param in (*self._places, *self._ordinary()):
            requires_grad = param.requires_grad
            param.requires_grad_(True)  # a frozen parameter takes no hook, and may thaw later
            self._hooks.append(param.register_post_accumulate_grad_hook(functools.partial(_arrived, me)))
            param.requires_grad_(requires_grad)

    def _ordinary(self) -> list[Tensor]:
        """The parameters whose gradients stay."""
        return [param for param in self._params() if param not in self._places]

    @property
    def sent_bytes(self) -> int:
        return self._together.sent_bytes

    @property
    def optimizer(self) -> LowRankOptimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer of this in_backward is gone")
        return optimizer

    def remove(self) -> None:
        """Ends it. The next backward pass leaves full gradients. Raises RuntimeError between a backward pass
        and its step()."""
        self.refuse_pending("remove()")
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._together.remove()
        if (optimizer := self._optimizer()) is not None and optimizer._in_backward is self:
            optimizer._in_backward = None

    def refuse_pending(self, what: str) -> None:
        """Raises RuntimeError where there are gradients that no step has used."""
        if self.projected or self.moved:
            raise RuntimeError(f"{what} came between a backward pass and its step(); call optimizer.step() or optimizer.zero_grad() first")

    def bytes_of(self, param: Tensor, r_elements: int) -> int | None:
        """The bytes that stay of a parameter's gradient until the step; None where the gradient itself stays.
        r_elements: of its R."""
        if param not in self._places:
            return None
        if (held := self.projected.get(param)) is not None:
            return local(held).nbytes
        dtype = torch.float64 if param.dtype == torch.float64 else self._dtype
        return 0 if self._at_once else r_elements * dtype.itemsize

    def clear(self) -> None:
        """Forgets all since the last step."""
        for held in (self.projected, self.moved, self._passes, self._running, self._infinite):
            held.clear()
        self._together.clear()
        self._closed = self._averaged = self._unscaled = self._shown = False

    # In the backward pass.

    @outside_training
    def arrived(self, param: Tensor) -> None:
        """Projects or uses up a gradient that is complete, and frees it. That of an ordinary parameter
        stays."""
        if self._closed:
            raise RuntimeError("a backward pass came after clip_grad_norm_() or average(); call optimizer.step() first")
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a backward pass with in_backward cannot be captured in a CUDA graph")
        self._note_pass()
        if param not in self._places:
            return
        optimizer, (index, place) = self.optimizer, self._places[param]
        group = find_group(optimizer, param, index, place)
        if param.grad is None:
            where = groups.describe(group, index, place)
            raise RuntimeError(f"another hook has taken the gradient of {where}; remove() the in_backward of its other optimizer")
        self._passes[param] += 1
        if self._passes[param] > self._accumulate:
            raise RuntimeError(
                f"{groups.describe(group, index, place)} got gradient number {self._passes[param]} since the last step(), more than "
                f"accumulate={self._accumulate} of in_backward; call optimizer.step() after that many backward passes"
            )
        hyper = optimizer._hyper(group)
        members = bucket_of_one(group, index, optimizer.state, functools.partial(optimizer._layout, hyper), place, param.grad)
        if not self._together.alone:
            self._together.note(index, place)
            optimizer._waiting.settle(optimizer.state, wait=True)  # all processes must find the same bases due
        due = optimizer._due(group, [members])
        if due:
            if not self._together.alone or members.sharding is not None:
                self._compare_once()
            if not self._together.alone:
                self._together.average_(members.grads)
                self._together.chose = True
            infinite = self._is_infinite(members, refreshes.is_refresh(due))
            if self._scaler is not None and refreshes.is_refresh(due) and bool(infinite):
                # The scale was too large, and the scaler will skip this step.
                self._infinite.add(param)
                param.grad = None
                return
            optimizer._refresh(group, members, optimizer._chosen(group, members, due[0], infinite), hyper)
        if self._at_once:
            self._move(group, members, hyper, bool(due))
            self.moved.add(param)
        else:
            self._add(param, members)
        param.grad = None

    def _note_pass(self) -> None:
        """Notes that a backward pass runs, until it ends without an error."""
        task = torch._C._current_graph_task_id()
        if task not in self._running:
            optimizer = self.optimizer
            for index in dict.fromkeys(index for index, _ in self._places.values()):
                groups.check_values(optimizer.param_groups[index], index, optimizer.own_keys, optimizer.fixed)
            self._running.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._end_pass, task))

    def _end_pass(self, task: int) -> None:
        self._running.discard(task)
        if self._scaler is not None:
            self._show_to_scaler()

    def _is_infinite(self, members: Members, is_refresh: bool) -> Tensor | None:
        """What a device decides by about a matrix that waits for its first basis: one fp32, not zero where
        the gradient is not finite. None without a scaler."""
        if self._scaler is None:
            return None
        flags = [~grad.isfinite().all() for grad in members.grads]
        found = torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool, device=members.device)
        # Whether an expert waits for its first basis, only the process that has it knows.
        together = refreshes.needs_others(members) or (is_refresh and members.sharding is not None)
        return (anywhere(found, members.sharding) if together else found).float()

    def _compare_once(self) -> None:
        optimizer = self.optimizer
        if not optimizer._compared:
            optimizer._compare_ranks()
            optimizer._compared = True

    def _add(self, param: Tensor, members: Members) -> None:
        each = project(members)
        if param.dim() != 3:
            arrived = each[0]
        else:
            arrived = torch.stack(each) if each else torch.empty((0, members.rank, members.extents[1]), device=members.device)
        if param in self.projected:
            local(self.projected[param]).add_(arrived)
            return
        arrived = arrived if arrived.dtype == torch.float64 else arrived.to(self._dtype)
        if members.sharding is not None:  # so that clipping finds the norm of the whole
            dim = None if members.cut is None else 0 if members.cut == OVER_EXPERTS else arrived.dim() - 1
            arrived = members.sharding.wrap(arrived, dim, param.shape[0] if members.cut == OVER_EXPERTS else members.extents[1])
        self.projected[param] = arrived

    def _move(self, group: dict[str, Any], members: Members, hyper: Hyper, is_mean: bool) -> None:
        """Updates one parameter. is_mean: whether its gradient is that of all processes already."""
        if not self._together.alone and not is_mean:
            if not hyper.lift.takes_gradient:
                members.grads, members.is_projected = project(members), True
            self._together.average_(members.grads)
        self.optimizer._move(group, members, hyper, None)

    # Between the backward pass and the step.

    def finish(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Makes R ready for a step. Raises RuntimeError where no step can use it."""
        self._refuse_unfinished("step()")
        for param, (index, place) in self._params().items() if self.moved else ():
            if param in self.moved and param.grad is not None:
                where = groups.describe(self.optimizer.param_groups[index], index, place)
                raise RuntimeError(
                    f"{where} was updated in the backward pass and has a gradient again; let backward() alone make gradients between two "
                    "steps, and put no DistributedDataParallel around the model after in_backward"
                )
        if found_inf is not None and self._at_once:
            raise RuntimeError(
                "update='immediately' has moved weights before the GradScaler looked at all gradients; use update='deferred'"
            )
        if found_inf is not None and self._scaler is None:
            raise RuntimeError(
                "a GradScaler steps this optimizer, and in_backward does not know it; pass it: in_backward(…, scaler=scaler)"
            )
        if found_inf is not None and not self._together.alone and not self._averaged:
            raise RuntimeError(
                "a GradScaler must look at the mean over all processes: call optimizer.clip_grad_norm_(), or average() of what in_backward "
                "returned, before scaler.step(optimizer)"
            )
        if found_inf is not None and (self.projected or self._infinite) and not self._shown:
            raise RuntimeError(
                "no ordinary parameter had a gradient when the backward pass ended, through which the GradScaler would see R"
            )
        self._average_all()
        if found_inf is not None and grad_scale is None:
            self._unscale()

    def to_clip(self) -> list[Tensor]:
        """R of all parameters, unscaled, and the mean over the processes. Unscales the ordinary gradients
        too."""
        self._refuse_unfinished("clip_grad_norm_()")
        if self._at_once:
            raise RuntimeError("update='immediately' has used the gradients up before their norm is known; use update='deferred' to clip")
        self.average()
        return list(self.projected.values())

    @outside_training
    def average(self) -> None:
        """Takes the mean of all gradients over the processes, and unscales them. step() and clip_grad_norm_()
        do that too. A user calls this with a GradScaler and without clipping, before scaler.step(optimizer).

        Raises RuntimeError after scaler.unscale_(optimizer), which has looked at this process's gradients
        alone.
        """
        self._closed = True
        is_first = not self._averaged
        self._average_all()
        if self._scaler is None:
            return
        try:
            self._scaler.unscale_(self.optimizer)
        except RuntimeError as error:
            if "already been called" not in str(error):
                raise
            if is_first and not self._together.alone:
                raise RuntimeError(
                    "scaler.unscale_(optimizer) came before the mean over all processes, of whose gradients it knew nothing; leave it out: "
                    "clip_grad_norm_() and average() unscale"
                ) from None
        self._unscale()

    def _average_all(self) -> None:
        """Takes the mean of all gradients over the processes, once a step."""
        if self._together.alone or self._averaged:
            return
        self._compare_once()
        self._together.compare_order(next(iter(self._places)).device)
        tensors = []
        for param, (index, place) in self._params().items():
            if not param.requires_grad or param in self.moved or param in self._infinite:
                continue
            tensor = self.projected.get(param, param.grad)
            if tensor is None:
                where = groups.describe(self.optimizer.param_groups[index], index, place)
                raise RuntimeError(
                    f"{where} has no gradient; the processes take the mean of all gradients together, so that each parameter needs one in "
                    "every step; freeze those that are not used (requires_grad_(False))"
                )
            tensors.append(tensor)
        self._together.average_(tensors)
        self._together.broadcast_buffers()
        self._averaged = True
        if self._scaler is not None:
            self._show_to_scaler()

    def _params(self) -> dict[Tensor, tuple[int, int]]:
        """All parameters of the optimizer, once each → (index of the group, place in it)."""
        found: dict[Tensor, tuple[int, int]] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            for place, param in enumerate(group["params"]):
                found.setdefault(param, (index, place))
        return found

    def _refuse_unfinished(self, what: str) -> None:
        if self._running:
            raise RuntimeError(f"{what} came after a backward pass that did not finish; call optimizer.zero_grad() and begin the step anew")

    def _unscale(self) -> None:
        """Divides R by the scaler's scale, once a step."""
        if self._unscaled:
            return
        self._unscaled = True
        for tensor in map(local, self.projected.values()):
            tensor.div_(self._scaler.scale(torch.ones((), device=tensor.device)))

    @torch.no_grad()
    def _show_to_scaler(self) -> None:
        """Makes an ordinary gradient NaN where R is not finite, since a scaler looks at ordinary gradients
        alone."""
        if not self.projected and not self._infinite:
            return
        parts = [part for part in map(local, self.projected.values()) if part.numel()]
        largest_of = list(torch._foreach_norm(parts, torch.inf)) if parts else []
        if meshes := [r.device_mesh for r in self.projected.values() if is_sharded(r)]:
            largest_of = [_largest_anywhere(largest_of, meshes)]
        ordinary = [param.grad for param in self._params() if param.grad is not None and param.grad.numel()]
        self._shown = bool(ordinary)
        held = next((grad for grad in map(local, ordinary) if grad.numel()), None)
        if held is None:  # of sharded gradients another process shows its part
            return
        first = held[(0,) * held.dim()]
        if self._infinite:
            first.fill_(torch.nan)
        for largest in largest_of:
            first.add_((largest * 0).to(first.device, first.dtype, non_blocking=first.is_cuda))


def _largest_anywhere(largest_of: list[Tensor], meshes: list[Any]) -> Tensor:
    """0, or NaN where a number is not finite in any process of these meshes."""
    flag = torch.zeros((), dtype=torch.bool, device=meshes[0].device_type)
    for largest in largest_of:
        flag |= ~largest.isfinite().to(flag.device)
    return torch.where(anywhere_on(flag, meshes), torch.nan, 0.0)


def find_group(optimizer: LowRankOptimizer, param: Tensor, index: int, place: int) -> dict[str, Any]:
    """The group that holds the parameter. Raises RuntimeError where it is no longer in its place."""
    if index < len(optimizer.param_groups):
        group = optimizer.param_groups[index]
        if place < len(group["params"]) and group["params"][place] is param:
            return group
    raise RuntimeError("the optimizer's param_groups have been rearranged since its gradients were given to a hook; do that before")


def project(members: Members) -> list[Tensor]:
    """R (r, n) of each matrix; of sharded ones this process's columns."""
    weights = [matrix for param in members.weights for matrix in matrices_of(param.detach())]
    steps = [state["step"] for state in members.states for _ in range(members.per_param)]
    if not weights:
        return []
    bucket = Bucket(weights, members.of_matrices("basis"), {}, steps, right=members.right, grads=members.grads)
    return backends.project(bucket) if members.sharding is None else project_sharded(bucket, members.sharding)


def _arrived(handle: weakref.ref[InBackward], param: Tensor) -> None:
    """The hook. It keeps neither the optimizer nor the handle alive."""
    if (alive := handle()) is not None:
        alive.arrived(param)
