"""Which members of a bucket need a basis before an update, and which one they get. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..sharded import local
from ..sharded import refresh as sharded
from ..sharded.layout import ALONG_M, ALONG_N
from ..subspaces import BLIND
from . import diagnosis, groups
from .buckets import Members, matrices_of
from .periods import Periods, most

REFRESHED_ELEMENTS = 2**29
"""The most elements of gradients from which bases are chosen together. A batch of matrices takes temporaries
of its own size on a GPU."""

Due = dict[tuple[int, str], list[int]]
"""(number of the refresh, kind) → slots of the members.

kind: "first" where there is no state yet; "next" where a new period begins; "waits" where the basis may still
be zero, because no gradient other than zero has come yet.
"""


@dataclass(frozen=True)
class Fresh:
    """The new basis of one member: this process's part, (m, r) or (experts, m, r). chosen: whether each of
    its matrices has one; None where this process has whole matrices (`needs_others`), and sees it. figures:
    what `measure` found of each whole matrix."""

    slot: int
    kind: str
    basis: Tensor
    chosen: Tensor | None = None
    figures: Tensor | None = None


def due(group: dict[str, Any], members: Members, waiting: set[Tensor], periods: Periods) -> Due:
    """The members that need a basis before the group's next update. waiting: parameters that may wait."""
    last, number = groups.last_refresh(group, 0, group["calls"])
    slots: Due = {}
    for slot, state in enumerate(members.states):
        if group["stagger"]:
            last, number = groups.last_refresh(group, members.places[slot], group["calls"])
        if not state:
            slots.setdefault((number, "first"), []).append(slot)
        elif not last <= state["refreshed_at"] <= group["calls"] and _is_over(group, members, slot, number, periods):
            slots.setdefault((number, "next"), []).append(slot)
        elif waiting and members.params[slot] in waiting:
            slots.setdefault((number, "waits"), []).append(slot)
    return slots


def _is_over(group: dict[str, Any], members: Members, slot: int, number: int, periods: Periods) -> bool:
    """Whether the basis of a member, which is of an earlier period, has been in use for as many periods as it
    should be."""
    refreshed_at = members.states[slot]["refreshed_at"]
    if group["refresh_threshold"] >= 1 or refreshed_at > group["calls"]:  # a later one is of another group's count
        return True
    _, chosen_in = groups.last_refresh(group, members.places[slot], refreshed_at)
    return number - chosen_in >= min(most(group), periods.of(members.params[slot], members.states[slot]))


def steps_until_next(group: dict[str, Any], place: int, state: dict[str, Any], periods: Periods) -> int:
    """How many calls of step() it takes until parameter number `place` of the group gets its next basis, if
    it has a gradient then: 1 if the coming one chooses it."""
    if not state or state["refreshed_at"] > group["calls"]:  # none yet, or one of another group's count
        return 1
    lasts = min(most(group), periods.of(group["params"][place], state)) if group["refresh_threshold"] < 1 else 1
    chosen_in, _ = groups.last_refresh(group, place, state["refreshed_at"])
    return max(1, chosen_in + lasts * group["update_proj_gap"] - group["calls"] + 1)


def is_refresh(each: list[Due]) -> bool:
    """Whether any basis is to be replaced or made. Members of the kind "waits" do not count: the device
    decides about them."""
    return any(kind != "waits" for slots in each for _, kind in slots)


def choose(
    group: dict[str, Any],
    members: Members,
    number: int,
    kind: str,
    slots: list[int],
    places: list[tuple[int, int]],
    may_look: bool,
    found_inf: Tensor | None,
) -> list[Tensor]:
    """The new bases of the members in `slots`, one (m, r) for each matrix.

    For the kind "waits" only matrices without a basis get a new one; the others keep theirs. Where the host
    may look, bases are chosen for those matrices alone. A GPU chooses one for every matrix, and keeps or
    takes it on the device. places: what the random draws of each matrix are keyed by.
    """
    grads, previous = _grads(members, slots), _previous(members, kind, slots)
    if not grads:
        return []
    wanted = range(len(grads))
    if kind == "waits" and may_look:
        wanted = [matrix for matrix in wanted if not previous[matrix].any()]
        if not wanted:
            return previous
    at_once = max(1, REFRESHED_ELEMENTS // max(1, grads[0].numel()))
    found_inf = None if found_inf is None or kind != "waits" else members.to_device(found_inf)
    chosen: list[Tensor] = []
    for start in range(0, len(wanted), at_once):
        part = wanted[start : start + at_once]
        old = None if previous is None else [previous[matrix] for matrix in part]
        chosen += _chosen(group, members, number, [grads[matrix] for matrix in part], old, [places[matrix] for matrix in part], found_inf)
    if kind != "waits":
        return chosen
    bases = list(previous)
    for matrix, basis in zip(wanted, chosen, strict=True):
        bases[matrix] = torch.where(bases[matrix].any(), bases[matrix], basis)
    return bases


def choose_sharded(
    group: dict[str, Any],
    members: Members,
    number: int,
    kind: str,
    slots: list[int],
    places: list[tuple[int, int]],
    found_inf: Tensor | None,
    measure: Callable[[Tensor, Tensor], Tensor] | None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """As `choose`, for members of which other processes have other parts: this process's part of each basis;
    whether each matrix has a basis now; and what `measure` found of each, NaN where nothing was chosen. All
    processes get the same."""
    grads, previous = _grads(members, slots), _previous(members, kind, slots)
    first = members.places[slots[0]] % members.sharding.size
    if kind != "waits":
        bases, chosen, figures = _chosen_sharded(group, members, number, kind, grads, places, None, measure, first)
        return _kept_where(~chosen, previous, bases), chosen, figures
    # The host may look: `Waiting.settle` has waited already.
    had = members.anywhere(torch.stack([basis.any() for basis in previous]))
    figures = None if measure is None else had.new_full((len(grads), len(diagnosis.FIGURES)), torch.nan, dtype=torch.float32)
    wanted = [matrix for matrix, has_basis in enumerate(had.tolist()) if not has_basis]
    if not wanted:
        return previous, had, figures
    found_inf = None if found_inf is None else members.to_device(found_inf)
    of_wanted = [grads[matrix] for matrix in wanted], [places[matrix] for matrix in wanted]
    new, chosen, found = _chosen_sharded(group, members, number, kind, *of_wanted, found_inf, measure, first)
    bases = list(previous)
    for matrix, basis in zip(wanted, _kept_where(~chosen, [previous[matrix] for matrix in wanted], new), strict=True):
        bases[matrix] = basis
    had[wanted] = chosen
    if figures is not None:
        figures[wanted] = found
    return bases, had, figures


def _kept_where(keep: Tensor, previous: list[Tensor] | None, bases: list[Tensor]) -> list[Tensor]:
    if previous is None:
        return bases
    return [torch.where(keeps, old, basis) for keeps, old, basis in zip(keep, previous, bases, strict=True)]


def _chosen_sharded(
    group: dict[str, Any],
    members: Members,
    number: int,
    kind: str,
    grads: list[Tensor],
    places: list[tuple[int, int]],
    found_inf: Tensor | None,
    measure: Callable[[Tensor, Tensor], Tensor] | None,
    first: int,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """This process's parts of new bases from its parts of gradients; whether each was chosen; and the
    figures. first: the process that chooses the first one."""
    m = members.extents[0]
    if group["selection"] in BLIND and measure is None:
        shape = grads[0].new_ones(()).expand(members.extents if not members.right else members.extents[::-1])
        wholes = _chosen(group, members, number, [shape] * len(grads), None, places, None)
        bases = [members.sharding.piece_of(basis, 0) if members.cut == ALONG_M else basis for basis in wholes]
        return bases, torch.ones(len(bases), dtype=torch.bool, device=members.device), None

    def choose_whole(matrices: Sequence[int], wholes: list[Tensor]) -> list[Tensor]:
        # A basis of zeros comes back where none was chosen, and the old one then stays.
        old = None if kind == "first" else [wholes[0].new_zeros((m, members.rank), dtype=members.params[0].dtype)] * len(wholes)
        return _chosen(group, members, number, wholes, old, [places[matrix] for matrix in matrices], found_inf)

    return sharded.choose(grads, members.sharding, members.right, members.rank, members.params[0].dtype, choose_whole, measure, first)


def needs_others(members: Members) -> bool:
    """Whether this process holds only a part of each matrix."""
    return members.cut in (ALONG_M, ALONG_N)


def _grads(members: Members, slots: list[int]) -> list[Tensor]:
    each = members.per_param
    return [members.grads[slot * each + matrix] for slot in slots for matrix in range(each)]


def _previous(members: Members, kind: str, slots: list[int]) -> list[Tensor] | None:
    return None if kind == "first" else [matrix for slot in slots for matrix in matrices_of(local(members.states[slot]["basis"]))]


def _chosen(
    group: dict[str, Any],
    members: Members,
    number: int,
    grads: list[Tensor],
    previous: list[Tensor] | None,
    places: list[tuple[int, int]],
    found_inf: Tensor | None,
) -> list[Tensor]:
    return ops.choose_bases(
        grads,
        previous,
        rank=members.rank,
        right=members.right,
        selection=group["selection"],
        svd=group["svd"],
        oversample=group["oversample"],
        power_iters=group["power_iters"],
        seed=group["seed"],
        refresh_number=number,
        places=places,
        dtype=members.params[0].dtype,
        found_inf=found_inf,
    )
