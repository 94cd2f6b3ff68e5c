"""Longer gaps for matrices whose bases hardly change, after Q-GaLore (arXiv 2407.08296).

A matrix keeps its basis for p periods of update_proj_gap steps. p starts at 1. It doubles where the new basis
overlaps the old one by more than `refresh_threshold`, as long as p·update_proj_gap stays within
`max_update_proj_gap`. Unlike Q-GaLore, which looks at several refreshes, this looks at one.

The device decides, and writes p into the state. The host needs p only where the next period ends, and by then
the number has long arrived.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sharded import local
from ..sharded.layout import ALONG_M
from .arriving import Arriving
from .buckets import Members

KEY = "periods"
"""p in a parameter's state, one fp32; 1 where it is missing."""


def most(group: dict[str, Any]) -> int:
    """The largest p that `max_update_proj_gap` allows."""
    return max(1, group["max_update_proj_gap"] // group["update_proj_gap"])


class Periods:
    """What the host knows of p."""

    def __init__(self) -> None:
        self._known: dict[Tensor, Any] = {}
        """A number, or a function that waits for it."""

    def of(self, param: Tensor, state: dict[str, Any]) -> int:
        """p of a parameter. It may wait for a GPU where p comes from a checkpoint."""
        if KEY not in state:
            return 1
        known = self._known.get(param)
        if known is None:
            known = int(state[KEY].item())
        elif not isinstance(known, int):
            known = int(known())
        self._known[param] = known
        return known

    def lengthen(self, group: dict[str, Any], members: Members, slots: list[int], fresh: list[Tensor]) -> None:
        """Doubles p where the new bases are like the old ones, which are still in the states. A basis that
        has not changed at all says nothing: its gradient was not finite."""
        longest, lengthened = most(group), []
        params, states = ([each[slot] for slot in slots] for each in (members.params, members.states))
        with torch.inference_mode(False):  # the states outlive a step in inference mode
            for state, basis in zip(states, fresh, strict=True):
                old = local(state["basis"])
                p = state[KEY].to(old.device) if KEY in state else torch.ones((), dtype=torch.float32, device=old.device)
                differs = (basis != old).flatten(-2).any(-1)
                differs = members.anywhere(differs) if members.cut == ALONG_M else differs
                alike = (members.inner(basis, old).square().sum((-2, -1)) / members.rank > group["refresh_threshold"]) & differs
                state[KEY] = torch.where(~members.anywhere(~alike.all()) & (2 * p <= longest), 2 * p, p)
                lengthened.append(state[KEY])
        arriving = Arriving(torch.stack(lengthened))
        for place, param in enumerate(params):
            self._known[param] = lambda place=place: arriving.values()[place].item()
