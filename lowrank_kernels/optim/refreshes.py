"""Which members of a bucket need a basis before an update, and which one they get. Changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import groups
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
    each = members.per_param
    grads = [members.grads[slot * each + matrix] for slot in slots for matrix in range(each)]
    previous = None if kind == "first" else [m for slot in slots for m in matrices_of(members.states[slot]["basis"])]
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
        chosen += ops.choose_bases(
            [grads[matrix] for matrix in part],
            None if previous is None else [previous[matrix] for matrix in part],
            rank=members.rank,
            right=members.right,
            selection=group["selection"],
            svd=group["svd"],
            oversample=group["oversample"],
            power_iters=group["power_iters"],
            seed=group["seed"],
            refresh_number=number,
            places=[places[matrix] for matrix in part],
            dtype=members.params[0].dtype,
            found_inf=found_inf,
        )
    if kind != "waits":
        return chosen
    bases = list(previous)
    for matrix, basis in zip(wanted, chosen, strict=True):
        bases[matrix] = torch.where(bases[matrix].any(), bases[matrix], basis)
    return bases
