"""What a refresh has found, for `optimizer.diagnostics()`. It is computed on the device, and nobody waits for
it before they ask."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..subspaces import subspace_overlap
from . import groups
from .buckets import Members, split

if TYPE_CHECKING:
    from .optimizer import LowRankOptimizer

KEY = "refresh_diagnostics"
"""The figures of a parameter's last refresh in its state, (3,) or (experts, 3) in fp32."""
FIGURES = ("overlap", "captured_energy", "effective_rank")


def of_member(group: dict[str, Any], members: Members, slot: int, fresh: Tensor) -> Tensor:
    """The figures of one parameter's new basis, (m, r) or (experts, m, r). Its state still holds the old
    one. Without orthonormal bases only the effective rank has a meaning; the others are NaN."""
    grads = members.grads[slot * members.per_param : (slot + 1) * members.per_param]
    bases, old = split(fresh), members.states[slot].get("basis")
    each = zip(grads, bases, [None] * len(bases) if old is None else split(old), strict=True)
    figures = [_of_matrix(grad.mT if members.right else grad, basis, before) for grad, basis, before in each]
    found = torch.stack(figures) if fresh.dim() == 3 else figures[0]
    if group["selection"] == "gaussian":
        found[..., :2] = torch.nan
    return found


def _of_matrix(grad: Tensor, basis: Tensor, old: Tensor | None) -> Tensor:
    """(3,) for G' (m, n). The Gram matrix of its shorter side costs 2·m²·n flops."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    grad = grad / grad.abs().amax()  # squares of squares may leave the range of fp32
    energy = grad.square().sum()
    captured = (basis.mT.to(grad.dtype) @ grad).square().sum() / energy
    gram = grad @ grad.mT if grad.shape[0] <= grad.shape[1] else grad.mT @ grad
    overlap = torch.full_like(captured, torch.nan)
    if old is not None:  # a basis that is zero has waited for its first gradient
        overlap = torch.where(old.any(), subspace_overlap(basis, old).to(grad.dtype), overlap)
    return torch.stack((overlap, captured, energy.square() / gram.square().sum())).float()


def where_new(state: dict[str, Any], measured: Tensor) -> Tensor:
    """The figures where a matrix had no basis before, and those that it had elsewhere."""
    waited = ~state["basis"].flatten(-2).any(-1)[..., None]
    return torch.where(waited, measured, state[KEY].to(measured.device) if KEY in state else torch.nan)


def rows(optimizer: LowRankOptimizer) -> list[dict[str, Any]]:
    """See LowRankOptimizer.diagnostics."""
    found: list[dict[str, Any]] = []
    figures: dict[torch.device, list[tuple[Tensor, list[dict[str, Any]]]]] = defaultdict(list)
    index = 0
    for group in optimizer.param_groups:
        for place, param in enumerate(group["params"]):
            state, name = optimizer.state.get(param, {}), groups.name_of(group, place)
            if KEY in state:
                of_param = {"param": index if name is None else name, "refreshed_at": state["refreshed_at"]}
                each = state[KEY].view(-1, len(FIGURES))
                mine = [{**of_param, "expert": expert if state[KEY].dim() == 2 else None} for expert in range(len(each))]
                figures[each.device].append((each, mine))
                found += mine
            index += 1
    for parts in figures.values():  # one copy to the host a device
        values = torch.cat([each for each, _ in parts]).tolist()
        for row, numbers in zip((row for _, mine in parts for row in mine), values, strict=True):
            row.update(zip(FIGURES, numbers, strict=True))
    return found
