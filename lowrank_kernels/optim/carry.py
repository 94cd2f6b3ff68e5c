"""What happens to a parameter's moments when it gets another basis. The group's key `moments` decides it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rules import Rule
from ..sharded import local
from ..sharded.layout import ALONG_M
from ..storage import Storage
from .buckets import Members


def carry(members: Members, moments: str, state: dict[str, Any], fresh: Tensor, rule: Rule, storage: Storage) -> None:
    """Changes the moments in `state`, in place. Call it before state["basis"] becomes `fresh`, (m, r) or
    (experts, m, r), of which this process has a part.

    "keep": the moments stay as they are and are read in the coordinates of the new basis (GaLore, I3S).
    "rotate": the rule turns the moments by C = P_newᵀ·P_old (LDAdam, arXiv 2410.16103). Each expert is turned
    by its own C.
    "reset": the moments and the count of updates become zero. Experts share one count, so all experts of a
    parameter are reset together.

    Where the basis stays the same, as after a gradient that is not finite, the moments stay too. The device
    decides this.
    """
    if moments == "keep":
        return
    old = local(state["basis"])
    state_dtype = torch.promote_types(old.dtype, torch.float32)
    stored = {name: local(state[name]) for name in storage.layout(rule.state(1, 1), state_dtype)}
    if moments == "rotate":
        values = storage.load(stored, state_dtype)
        changed = (fresh != old).flatten(-2).any(-1)
        changed = members.anywhere(changed) if members.cut == ALONG_M else changed
        turn = members.inner(fresh, old)
        rule.rotate(values, torch.where(changed[..., None, None], turn, torch.eye(turn.shape[-1], dtype=state_dtype, device=turn.device)))
        storage.store_(values, stored, state["step"])
        return
    changed = members.anywhere((fresh != old).any())
    for tensor in (*stored.values(), state["step"]):  # all experts: they share one count
        tensor.copy_(torch.where(changed, 0, tensor))
