"""LowRankOptimizer: the base class of all low-rank optimizers. It orders the parts of a step, and schedules
the refreshes of bases."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import backends, philox, subspaces
from ..backends import Bucket, Hyper
from ..backends.upload import pack, upload
from ..lifts import Lift
from ..ops.dispatch import outside_training
from ..rules import Rule
from ..sharded import is_sharded, local
from ..sharded import state as sharded_state
from ..sharded import step as sharded_step
from ..storage import Storage
from . import diagnosis, groups, initialising, keys, periods, ranks, refreshes
from .buckets import NOTHING, Members, buckets, check_grad, matrices_of
from .carry import carry
from .clipping import clip_grad_norm_
from .dense import dense_adamw_step_
from .in_backward import InBackward
from .periods import Periods
from .refreshes import Due, Fresh
from .saved import SavedOptimizer
from .scaler import Skips, unscaled
from .waiting import Waiting, is_chosen

HOST = ("cpu",)
"""Types of devices whose tensors the host can read without waiting."""


class LowRankOptimizer(SavedOptimizer):
    """Projects groups with `rank`, and trains the others with ordinary AdamW. A subclass names a rule, its
    lifts and its storages.

        group → buckets → (due? choose → carry → basis.copy_) → one backends.step a bucket → calls += 1

    The state of a projected parameter holds

        step            the number of updates made, fp32 on the parameter's device
        basis           P, (m, r) in the parameter's dtype; zero until a gradient is not all zero
        refreshed_at    the group's `calls` when the basis was chosen
        draw_key        a number made from the parameter's name, which keys its random draws; only where the
                        parameter has a name
        periods         for how many periods a basis lasts, fp32; only with `refresh_threshold`
        refresh_diagnostics     what the last refresh found; only with `diagnostics`

    and the tensors of the rule and the lift. The state of a dense parameter is that of torch.optim.AdamW.

    A group counts its own steps in `calls`. A step that a GradScaler skipped does not count. A parameter gets
    its first basis before its first update. It gets a new one with the first gradient at or after each step
    where calls % update_proj_gap equals the parameter's offset. The offset is 0; in a group with `stagger`
    the offsets spread over the period. With `refresh_threshold` a basis may last several periods. All checks
    run before anything moves.

    With a GradScaler the device skips the step. The host asks a GPU whether a step was skipped only where a
    refresh is due. Gradients that the scaler has not unscaled are unscaled here, in place, a bucket at a
    time; 16-bit gradients go through fp32 copies.
    """

    rule: Rule
    lifts: dict[str, Lift]
    storages: dict[int, Storage]
    """The storages by state_bits."""
    own_keys: tuple[keys.Key, ...] = ()
    """Keys of groups that only this class has. They are arguments of its constructor too."""
    fixed: dict[str, Any] = {}
    """Values of group keys that the class prescribes. A group with another value is refused."""
    preferred: dict[str, Any] = {}
    """The class's own defaults of group keys."""

    _in_backward: InBackward | None = None
    """Projects gradients while the backward pass runs."""
    _nothing_to_log_warned = False
    """Whether diagnostics(flat=True) has said that it will always be empty."""

    _step_supports_amp_scaling = True  # makes GradScaler hand over grad_scale and found_inf, as to torch's fused AdamW

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._forget()
        self._clamp_warned: set[tuple[int, int]] = set()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop everything known about the states; they may have been replaced."""
        self._skips = Skips()
        self._waiting = Waiting()
        self._periods = Periods()
        self._compared = False

    def __repr__(self) -> str:
        """A line for each group: how many parameters it has, and the keys that differ from their defaults."""
        lines = []
        for index, group in enumerate(self.param_groups):
            count, differing = len(group["params"]), keys.differing(group, self._defaults_of(group))
            lines.append(f"    group {index}: {count} parameter{'s' * (count != 1)}" + (f", {differing}" if differing else ""))
        return "\n".join((f"{type(self).__name__}(", *lines, ")"))

    def _defaults_of(self, group: dict[str, Any]) -> dict[str, Any]:
        """The class's defaults of a group's keys."""
        of_low_rank = (*keys.LOW_RANK, keys.CALLS) if groups.is_low_rank(group) else ()
        own = {key.name: key.default for key in (*of_low_rank, *keys.ADAMW, keys.CAPTURABLE, *self.own_keys)}
        return {name: (self.preferred | self.fixed).get(name, default) for name, default in own.items()}

    # Groups.

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does, then runs every check that is possible now. A refused group leaves the
        optimizer unchanged."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            self._complete(self.param_groups[index], index)
        except BaseException:
            del self.param_groups[index]
            raise

    def _complete(self, group: dict[str, Any], index: int) -> None:
        """Fills the group's missing keys with their defaults. Raises ValueError or TypeError for keys, values
        and parameters that cannot work."""
        groups.complete(group, index, self.own_keys, self.fixed, self.preferred)
        self._check_method(group, index)
        if groups.is_low_rank(group):
            groups.warn_if_clamped(group, index, self._clamp_warned)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return self.rule

    def _check_method(self, group: dict[str, Any], index: int) -> None:
        """Raises ValueError where a low-rank group's keys do not go together."""
        if not groups.is_low_rank(group):
            return
        rule, lift, where = self._rule(group), self.lifts[group["lift"]], groups.describe(group, index)
        if group["moments"] == "rotate" and type(rule).rotate is Rule.rotate:
            raise ValueError(
                f"moments='rotate' needs a rule that says what its state is in another basis, which {rule.name!r} does not ({where}); "
                "use 'keep' or 'reset'"
            )
        if group["selection"] == "gaussian" and (lift.needs_orthonormal or group["moments"] == "rotate"):
            wants = "moments='rotate'" if not lift.needs_orthonormal else f"lift={lift.name!r}"
            raise ValueError(f"{wants} needs orthonormal bases, which selection='gaussian' does not draw ({where}); use 'random'")
        if group["refresh_threshold"] < 1 and group["selection"] in subspaces.BLIND:
            raise ValueError(
                f"refresh_threshold={group['refresh_threshold']:g} compares bases that follow the gradient, and "
                f"selection={group['selection']!r} draws them at random ({where}); leave it at 1"
            )
        try:
            self.storages[group["state_bits"]].layout(rule.state(1, 1), torch.float32)
        except ValueError as error:
            raise ValueError(f"{error} ({where})") from None

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        lr = group["lr"]
        lr = lr if isinstance(lr, Tensor) and lr.is_cuda else float(lr)
        rule = self._rule(group)
        return Hyper(
            rule=rule,
            lift=self.lifts[group["lift"]],
            storage=self.storages[group["state_bits"]],
            lr=lr,
            scale=group["scale"],
            weight_decay=group["weight_decay"],
            options={key: group[key] for key in rule.keys},
        )

    # The step.

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient. Returns the closure's loss, if a closure is given.

        A CUDA graph of step() requires capturable=True and holds the update alone, without refreshes; see
        `refresh`.
        """
        loss = None
        if closure is not None:
            if self._in_backward is not None:
                raise RuntimeError("step(closure) cannot follow in_backward, which would project the gradients of every call; use step()")
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @outside_training
    def _update(self) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        # is_current_stream_capturing would initialise CUDA. Nothing can be captured before that.
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if self._in_backward is not None:
            if capturing:
                raise RuntimeError("step() after in_backward cannot be captured in a CUDA graph, whose replays would not make R anew")
            self._in_backward.finish(grad_scale, found_inf)
        work = self._work(capturing)
        counts_before = None if capturing or self.state else initialising.counts(self)
        if not (capturing or self._compared):
            self._compare_ranks()
            self._compared = True
        for group, dense, _ in work:
            if dense:
                dense_adamw_step_({**group, "params": dense}, self.state, grad_scale, found_inf)
        skipped = found_inf is not None and found_inf.device.type in HOST and bool(found_inf.item())
        if found_inf is not None and found_inf.device.type in HOST:
            found_inf = None
        for group, _, low_rank in work:
            # A group without parameters counts its steps too: ZeroRedundancyOptimizer leaves such groups.
            counts = low_rank or (groups.is_low_rank(group) and (not group["params"] or self._has_moved(group)))
            if not skipped and counts:
                self._step_group(group, low_rank, grad_scale, found_inf, capturing)
        if counts_before is None:
            self._after_step(skipped)
        else:
            initialising.forget(self, counts_before)
        if self._in_backward is not None:
            self._in_backward.clear()

    def _has_moved(self, group: dict[str, Any]) -> bool:
        """Whether a parameter of the group was updated in the backward pass before this step."""
        return self._in_backward is not None and not self._in_backward.moved.isdisjoint(group["params"])

    def _work(self, capturing: bool) -> list[tuple[dict[str, Any], list[Tensor], list[Members]]]:
        """Each group with its dense parameters and its low-rank buckets, after every check."""
        return [(group, *self._sorted(group, index, capturing)) for index, group in enumerate(self.param_groups)]

    def _sorted(self, group: dict[str, Any], index: int, capturing: bool) -> tuple[list[Tensor], list[Members]]:
        """Runs every check of a group. Returns its dense parameters and its low-rank buckets."""
        groups.check_values(group, index, self.own_keys, self.fixed)
        self._check_method(group, index)
        if not groups.is_low_rank(group):
            for place, param in enumerate(group["params"]):
                if param.grad is not None:
                    check_grad(group, index, place, param.grad)
            return group["params"], []
        low_rank = self._buckets(group, index)
        if capturing and low_rank:
            if not group["capturable"]:
                raise RuntimeError("step() is being captured in a CUDA graph; build the optimizer with capturable=True")
            if not all(state for members in low_rank for state in members.states):
                raise RuntimeError("step() is being captured before the first step, which makes the states; take one outside of the graph")
            if group["moments"] == "reset" and group["rounding"] == "stochastic":
                raise RuntimeError(
                    "a CUDA graph keeps the seeds of stochastic rounding, and moments='reset' starts the count anew: every period would "
                    "round alike; use moments='keep' or rounding='nearest'"
                )
        return [], low_rank

    def _buckets(self, group: dict[str, Any], index: int) -> list[Members]:
        projected = NOTHING if self._in_backward is None else self._in_backward.projected
        return buckets(group, index, self.state, functools.partial(self._layout, self._hyper(group)), projected)

    def _step_group(
        self,
        group: dict[str, Any],
        low_rank: list[Members],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        capturing: bool,
    ) -> None:
        hyper = self._hyper(group)
        due = [] if capturing else self._due(group, low_rank)
        if found_inf is not None and refreshes.is_refresh(due) and found_inf.item():
            return
        each = (
            self._step_bucket(group, members, hyper, due[slot] if due else {}, grad_scale, found_inf)
            for slot, members in enumerate(low_rank)
        )
        sharded_step.overlapped(each)
        if found_inf is not None and not capturing:
            self._skips.note(group, found_inf)
        group["calls"] += not capturing

    def _step_bucket(
        self, group: dict[str, Any], members: Members, hyper: Hyper, due: Due, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> sharded_step.Steps:
        with unscaled(members, grad_scale):
            if due:
                self._refresh(group, members, self._chosen(group, members, due, found_inf), hyper)
            yield from self._moving(group, members, hyper, found_inf)

    def _move(self, group: dict[str, Any], members: Members, hyper: Hyper, found_inf: Tensor | None) -> None:
        sharded_step.overlapped([self._moving(group, members, hyper, found_inf)])

    def _moving(self, group: dict[str, Any], members: Members, hyper: Hyper, found_inf: Tensor | None) -> sharded_step.Steps:
        """Moves a bucket. Yields while messages to other processes are under way."""
        found_inf = None if found_inf is None else members.to_device(found_inf)
        params = members.weights
        if params[0].dim() == 2:
            weights, counts = params, [state["step"] for state in members.states]
            copied = []
        else:
            each = [matrices_of(param.detach()) for param in params]
            weights = [weight for matrices in each for weight in matrices]
            counts = [state["step"] for state in members.states for _ in range(members.per_param)]
            # Some strides allow no view as a matrix. The matrix is then a copy, to be written back.
            copied = [(param, m[0]) for param, m in zip(params, each, strict=True) if m and m[0].data_ptr() != param.data_ptr()]
        if weights:  # a process may have none of the experts
            source = {"projected" if members.is_projected else "grads": members.grads}
            bases = members.of_matrices("basis")
            bucket = self._bucket(group, members, hyper, found_inf, weights=weights, bases=bases, steps=counts, **source)
            if isinstance(hyper.lr, Tensor):
                hyper = dataclasses.replace(hyper, lr=members.to_device(hyper.lr))
            if members.sharding is None:
                backends.step(bucket, hyper)
            else:
                yield from sharded_step.step(bucket, hyper, members.sharding, members.extents[1])
        for param, matrix in copied:
            param.copy_(matrix.view(param.shape))
        self._count(members, found_inf)

    def _bucket(
        self, group: dict[str, Any], members: Members, hyper: Hyper, found_inf: Tensor | None, **tensors: list[Tensor] | Tensor
    ) -> Bucket:
        """The bucket that a backend takes. tensors: weights, bases, steps, and grads or projected."""
        names = [*hyper.storage.layout(hyper.rule.state(1, 1), torch.float32), *hyper.lift.state()]
        return Bucket(
            states={name: members.of_matrices(name) for name in names},
            right=members.right,
            found_inf=found_inf,
            rounding_seeds=self._rounding_seeds(group, members) if group["rounding"] == "stochastic" else None,
            **tensors,
        )

    def _count(self, members: Members, found_inf: Tensor | None) -> None:
        """One update more for each parameter, unless the device finds that it skipped the step."""
        steps = [state["step"] for state in members.states]
        torch._foreach_add_(steps, 1.0 if found_inf is None else (found_inf == 0).to(torch.float32).reshape(()))

    def _rounding_seeds(self, group: dict[str, Any], members: Members) -> Tensor:
        """The seeds of stochastic rounding, (B,) int64, a function of the group's seed and each matrix's
        place. With moments="reset" they depend on `refreshed_at` too."""
        seeds = []
        for slot, state in enumerate(members.states):
            # The random bits depend on the count of updates, which "reset" sets to zero in each period.
            # Without this number every period would round alike.
            period = (state["refreshed_at"],) if group["moments"] == "reset" else ()
            if refreshes.needs_others(members):  # elements are counted from a part's first one, and parts should round apart
                period = (*period, members.sharding.index)
            places = self._places(group, members, slot)
            seeds += [philox.signed64(philox.derive_seed(group["seed"], *place, *period)) for place in places]
        return upload(pack([seeds]), 1, members.device)[0]

    def _places(self, group: dict[str, Any], members: Members, slot: int) -> list[tuple[int, int]]:
        """(key of the parameter, number of the matrix in it) for each of a parameter's matrices. The random
        draws of a matrix are keyed by this pair."""
        key = self._draw_key(group, members.places[slot], members.states[slot])
        return [(key, members.first_matrix + number) for number in range(members.per_param)]

    def _draw_key(self, group: dict[str, Any], place: int, state: dict[str, Any]) -> int:
        """The number that keys the parameter's random draws. It is made from the parameter's name. It is the
        parameter's index in the optimizer where there is no name, or where the state has none, as in an older
        checkpoint."""
        if "draw_key" in state:
            return state["draw_key"]
        named = None if state else groups.draw_key(group, place)
        return self._first_index(group) + place if named is None else named

    def _first_index(self, group: dict[str, Any]) -> int:
        first = 0
        for other in self.param_groups:
            if other is group:
                break
            first += len(other["params"])
        return first

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. It also drops what `in_backward` has projected since the last step."""
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            self._in_backward.clear()

    @torch._disable_dynamo
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
        """Scales all gradients of this optimizer by min(1, max_norm / (‖g‖ + 1e-6)), in place, and returns
        ‖g‖, a scalar tensor. Does not wait for a GPU.

        g is made of the parameters' gradients, as in torch.nn.utils.clip_grad_norm_. A parameter whose
        gradient `in_backward` has projected counts with R instead. ‖R‖ ≤ ‖G‖, so that such a norm is smaller,
        and the same max_norm clips less often. With the `scaler` of in_backward it first unscales, as
        scaler.unscale_(optimizer) does. Over several processes it first takes the mean of all gradients.

        Raises RuntimeError where in_backward updates the parameters at once, and with error_if_nonfinite=True
        (which waits for the GPU) where the norm is not finite.
        """
        return clip_grad_norm_(self, max_norm, error_if_nonfinite)

    def _after_step(self, skipped: bool) -> None:
        """Runs at the end of each step, after every parameter has moved. skipped: whether the step was
        skipped on the host."""

    # The refresh.

    def _due(self, group: dict[str, Any], low_rank: list[Members]) -> list[Due]:
        """The members of each bucket that need a basis before this update, as (number of the refresh, kind) →
        slots; [] where no member needs one.

        kind: "first" where there is no state yet; "next" where a new period begins; "waits" where the basis
        may still be zero, because no gradient other than zero has come yet.
        """
        # Processes that share a matrix must find the same bases due.
        self._waiting.settle(self.state, wait=any(map(refreshes.needs_others, low_rank)))
        due = self._due_now(group, low_rank)
        if refreshes.is_refresh(due) and (skipped := self._skips.ask(group)):
            group["calls"] -= skipped
            due = self._due_now(group, low_rank)
        return due if any(due) else []

    def _due_now(self, group: dict[str, Any], low_rank: list[Members]) -> list[Due]:
        """Members whose gradients are projected already got their bases from these."""
        return [{} if each.is_projected else refreshes.due(group, each, self._waiting.params, self._periods) for each in low_rank]

    def _chosen(self, group: dict[str, Any], members: Members, due: Due, found_inf: Tensor | None) -> list[Fresh]:
        """The new bases of the members that are due. Changes nothing."""
        fresh: list[Fresh] = []
        for (number, kind), slots in due.items():
            places = [place for slot in slots for place in self._places(group, members, slot)]
            chosen = figures = None
            if refreshes.needs_others(members):
                measure = functools.partial(diagnosis.of_stored, members.right) if group["diagnostics"] else None
                bases, chosen, figures = refreshes.choose_sharded(group, members, number, kind, slots, places, found_inf, measure)
            else:
                bases = refreshes.choose(group, members, number, kind, slots, places, members.device.type in HOST, found_inf)
            each = members.per_param
            for place, slot in enumerate(slots):
                mine = slice(place * each, (place + 1) * each)
                if members.params[slot].dim() != 3:
                    basis = bases[place]
                elif each:
                    basis = torch.stack(bases[mine])
                else:  # a process without any of the experts
                    basis = torch.empty((0, members.extents[0], members.rank), dtype=members.params[0].dtype, device=members.device)
                flags, found = (None if table is None else table[mine] for table in (chosen, figures))
                fresh.append(Fresh(slot, kind, basis, flags, found))
        return fresh

    def _refresh(self, group: dict[str, Any], members: Members, fresh: list[Fresh], hyper: Hyper) -> None:
        """Writes new bases into the states. An existing basis keeps its memory, since a CUDA graph may hold
        its address."""
        first = []
        if group["refresh_threshold"] < 1 and (again := [(each.slot, each.basis) for each in fresh if each.kind == "next"]):
            self._periods.lengthen(group, members, *map(list, zip(*again, strict=True)))
        for each in fresh:
            slot, kind, basis = each.slot, each.kind, each.basis
            param, state = members.params[slot], members.states[slot]
            measured = diagnosis.of_member(group, members, each) if group["diagnostics"] else None
            if kind == "first" or param in self._waiting.params:
                first.append((param, is_chosen(basis) if each.chosen is None else each.chosen.all()))
            if kind == "first":
                with torch.inference_mode(False):  # the states outlive a step in inference mode
                    state |= self._new_state(group, members, slot, subspaces.own_memory(basis), hyper)
                    if measured is not None:
                        state[diagnosis.KEY] = measured
                self.state[param] = state
                continue
            if measured is not None:
                state[diagnosis.KEY] = measured if kind == "next" else diagnosis.where_new(state, measured)
            if kind == "next":
                carry(members, group["moments"], state, basis, hyper.rule, hyper.storage)
                state["refreshed_at"] = group["calls"]
            local(state["basis"]).copy_(basis)
        if first and group["selection"] not in subspaces.BLIND:
            self._waiting.note(*map(list, zip(*first, strict=True)))

    @overload
    def diagnostics(self, flat: Literal[False] = False) -> list[dict[str, Any]]: ...

    @overload
    def diagnostics(self, flat: Literal[True]) -> dict[str, float]: ...

    @torch._disable_dynamo
    def diagnostics(self, flat: bool = False) -> list[dict[str, Any]] | dict[str, float]:
        """What the last refresh of each matrix has found, in groups with diagnostics=True. This call waits
        for a GPU; the refresh itself does not.

        A row has `param` (the parameter's name, or its index in the optimizer where none is known), `expert`
        (None for a parameter that is one matrix), `refreshed_at` (the group's count of steps then), and:

            overlap           ‖P_newᵀ·P_old‖²_F / r with the basis before, NaN for the first one
            captured_energy   ‖PᵀG‖²_F / ‖G‖²_F of the gradient that the basis was chosen from
            effective_rank    (Σσ²)² / Σσ⁴ of that gradient, between 1 and its shorter side

        flat: returns a dict of floats in place of rows, for a logger: "overlap/<parameter>" and so on, with
        "<parameter>[3]" for an expert, and the mean of each figure as "overlap/mean". Figures that are NaN
        are left out. It is empty before the first refresh. Where no group has diagnostics=True it is always
        empty, and a warning says so once.
        """
        if flat:
            diagnosis.warn_if_nothing_is_measured(self)
        rows = diagnosis.rows(self)
        return diagnosis.flat(rows) if flat else rows

    def _new_state(self, group: dict[str, Any], members: Members, slot: int, basis: Tensor, hyper: Hyper) -> dict[str, Any]:
        param, key = members.params[slot], self._draw_key(group, members.places[slot], {})
        state = {"step": torch.zeros((), dtype=torch.float32, device=param.device), "basis": basis, "refreshed_at": group["calls"]}
        if key != self._first_index(group) + members.places[slot]:
            state["draw_key"] = key
        if group["refresh_threshold"] < 1:
            state[periods.KEY] = torch.ones((), dtype=torch.float32, device=param.device)
        layout = functools.partial(self._layout, hyper)
        if members.sharding is None:
            batch = param.shape[:1] if param.dim() == 3 else ()
            for name, (shape, dtype) in layout(param, members.right, members.rank).items():
                state[name] = torch.zeros((*batch, *shape), dtype=dtype, device=param.device)
            return state
        each = members.state_parts(layout)
        state["basis"] = members.sharding.wrap(basis, each["basis"].dim, each["basis"].length)
        for name, part in each.items():
            if name != "basis":
                state[name] = sharded_state.zeros(part, members.sharding, members.device)
        return state

    def _layout(
        self, hyper: Hyper, param: Tensor, right: bool, rank: int, n: int | None = None
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → (shape for one matrix, dtype) of the tensors that the rule and the lift keep, of n columns
        or all."""
        if n is None:
            rows, columns = groups.matrix_shape(param)
            n = rows if right else columns
        state_dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        layout = hyper.storage.layout(hyper.rule.state(rank, n), state_dtype)
        return layout | {name: (shape, torch.float32) for name, shape in hyper.lift.state().items()}

    @torch.compiler.disable
    @outside_training
    def refresh(self) -> None:
        """Does the host's part of a step() in a CUDA graph. Call it once before each replay of the graph.

        Chooses the bases that are due before that update, and writes them into the same memory. Chooses them
        from the current gradients: those of the last replay, or those just computed where the backward pass
        is a graph of its own. Counts the update. Raises RuntimeError without capturable=True, before the
        first step, and where no parameter has a gradient.
        """
        work = []
        if self._in_backward is not None:
            raise RuntimeError("refresh() is for steps in a CUDA graph, which cannot be captured after in_backward")
        for index, group in enumerate(self.param_groups):
            if not groups.is_low_rank(group):
                continue
            if not group["capturable"]:
                raise RuntimeError(f"refresh() is for steps in a CUDA graph; group {index} has capturable=False, where step() does it")
            if low_rank := self._buckets(group, index):
                work.append((group, low_rank))
        if not work and any(map(groups.is_low_rank, self.param_groups)):
            raise RuntimeError(
                "refresh() found no gradient to choose bases from; leave those of the graph where they are, "
                "without a zero_grad() after step()"
            )
        if not all(state for _, low_rank in work for members in low_rank for state in members.states):
            raise RuntimeError("refresh() came before the first step; take one outside of the graph, which makes the states")
        # Choosing bases may run out of memory. All of it comes before anything changes.
        chosen = []
        for group, low_rank in work:
            due = self._due(group, low_rank)
            chosen += [(group, members, self._chosen(group, members, each, None)) for members, each in zip(low_rank, due, strict=False)]
        for group, members, fresh in chosen:
            self._refresh(group, members, fresh, self._hyper(group))
        for group, _ in work:
            group["calls"] += 1

    def _compare_ranks(self) -> None:
        """Raises RuntimeError where torch.distributed is initialised and the random draws of two processes
        would differ. A process without low-rank parameters takes part in the all-gather as well."""
        held, settings = [], []
        for group in filter(groups.is_low_rank, self.param_groups):
            sends = any(map(is_sharded, group["params"]))  # then diagnostics decide what a refresh sends
            compared = (key for key in keys.names((*keys.LOW_RANK, *self.own_keys)) if sends or key != "diagnostics")
            settings.append(tuple(group[key] for key in compared))
            first = self._first_index(group)
            for place, param in enumerate(group["params"]):
                name = groups.draw_key(group, place)
                held.append((tuple(param.shape), first + place if name is None else name))
        params = (param for group in self.param_groups for param in group["params"])
        ranks.check_equal(held, settings, next((param.device for param in params), torch.device("cpu")))
