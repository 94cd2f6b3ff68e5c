"""What becomes of a parameter's moments when it gets another basis: the group's key `moments`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rules import Rule
from ..storage import Storage


def carry(moments: str, state: dict[str, Any], fresh: Tensor, rule: Rule, storage: Storage) -> None:
    """Before state["basis"] becomes `fresh`, (m, r) or (experts, m, r).

    "keep": they stay as they are, in the coordinates of the new basis (GaLore, I3S).
    "rotate": C = P_newᵀ·P_old turns them, as the rule says (LDAdam, arXiv 2410.16103); experts each by
    itself.
    "reset": they are zero, and the count of updates with them; of experts, which share one count, all.

    Where a basis stays, as with a gradient that is not finite, they stay too. The device decides it.
    """
    if moments == "keep":
        return
    old = state["basis"]
    changed = (fresh != old).flatten(-2).any(-1)[..., None, None]
    state_dtype = torch.promote_types(old.dtype, torch.float32)
    stored = {name: state[name] for name in storage.layout(rule.state(1, 1), state_dtype)}
    if moments == "rotate":
        values = storage.load(stored, state_dtype)
        turn = fresh.mT.to(state_dtype) @ old.to(state_dtype)
        rule.rotate(values, torch.where(changed, turn, torch.eye(turn.shape[-1], dtype=state_dtype, device=turn.device)))
        storage.store_(values, stored)
        return
    for tensor in (*stored.values(), state["step"]):  # one count for all experts, so their moments go with it
        tensor.copy_(torch.where(changed.any(), 0, tensor))
