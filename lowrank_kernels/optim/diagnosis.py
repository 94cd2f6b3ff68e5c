"""What a refresh has found, for `optimizer.diagnostics()`. It is computed on the device, and nobody waits for
it before they ask."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..sharded import is_sharded, local, sharding_of
from ..sharded.layout import ALONG_M, OVER_EXPERTS
from ..sharded.state import like
from . import groups
from .buckets import Members, split
from .waiting import is_chosen_each

if TYPE_CHECKING:
    from .optimizer import LowRankOptimizer
    from .refreshes import Fresh

KEY = "refresh_diagnostics"
"""The figures of a parameter's last refresh in its state, (3,) or (experts, 3) in fp32."""
FIGURES = ("overlap", "captured_energy", "effective_rank")


def of_member(group: dict[str, Any], members: Members, fresh: Fresh) -> Tensor:
    """The figures of one parameter's new basis. Its state still holds the old one. Without orthonormal bases
    only the effective rank has a meaning; the others are NaN."""
    slot, basis, figures = fresh.slot, fresh.basis, fresh.figures
    if figures is None:
        grads = members.grads[slot * members.per_param : (slot + 1) * members.per_param]
        each = [of_matrix(grad.mT if members.right else grad, one) for grad, one in zip(grads, split(basis), strict=True)]
        figures = torch.stack(each) if each else basis.new_empty((0, len(FIGURES)), dtype=torch.float32)
    if (old := local(members.states[slot].get("basis"))) is not None:  # a basis that is zero has waited for its first gradient
        had = old.flatten(-2).any(-1)
        had = members.anywhere(had) if members.cut == ALONG_M else had
        overlap = members.inner(basis, old).square().sum((-2, -1)) / members.rank
        figures[:, 0] = torch.where(had, overlap, torch.nan)
    if group["selection"] == "gaussian":
        figures[:, :2] = torch.nan
    found = figures if basis.dim() == 3 else figures[0]
    if members.cut != OVER_EXPERTS:
        return found
    return members.sharding.wrap(found, 0, members.params[slot].shape[0])


def of_matrix(grad: Tensor, basis: Tensor) -> Tensor:
    """(3,) for G' (m, n), of which the first, the overlap, is NaN. The Gram matrix of its shorter side costs
    2·m²·n flops."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    grad = grad / grad.abs().amax()  # squares of squares may leave the range of fp32
    energy = grad.square().sum()
    captured = (basis.mT.to(grad.dtype) @ grad).square().sum() / energy
    gram = grad @ grad.mT if grad.shape[0] <= grad.shape[1] else grad.mT @ grad
    return torch.stack((torch.full_like(captured, torch.nan), captured, energy.square() / gram.square().sum())).float()


def of_stored(right: bool, grad: Tensor, basis: Tensor) -> Tensor:
    """As `of_matrix`, for a gradient as stored."""
    return of_matrix(grad.mT if right else grad, basis)


def where_new(state: dict[str, Any], measured: Tensor) -> Tensor:
    """The figures where a matrix had no basis before, and those that it had elsewhere."""
    waited = ~is_chosen_each(state["basis"])[..., None]
    before = local(state[KEY]).to(local(measured).device) if KEY in state else torch.nan
    found = torch.where(waited, local(measured), before)
    return like(measured, found) if is_sharded(measured) else found


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
                each, first = local(state[KEY]).view(-1, len(FIGURES)), 0
                if is_sharded(state[KEY]):
                    first = sharding_of(state[KEY]).piece(state[KEY].shape[0])[0]
                mine = [{**of_param, "expert": first + expert if state[KEY].dim() == 2 else None} for expert in range(len(each))]
                figures[each.device].append((each, mine))
                found += mine
            index += 1
    for parts in figures.values():  # one copy to the host a device
        values = torch.cat([each for each, _ in parts]).tolist()
        for row, numbers in zip((row for _, mine in parts for row in mine), values, strict=True):
            row.update(zip(FIGURES, numbers, strict=True))
    return found


def flat(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The rows as one dict of floats, and their means. NaNs are left out."""
    found: dict[str, float] = {}
    for key in FIGURES:
        each = {
            f"{key}/{row['param']}" + ("" if row["expert"] is None else f"[{row['expert']}]"): row[key]
            for row in rows
            if not math.isnan(row[key])
        }
        if each:
            found |= each | {f"{key}/mean": sum(each.values()) / len(each)}
    return found


def warn_if_nothing_is_measured(optimizer: LowRankOptimizer) -> None:
    """Warns, once an optimizer, where `flat` will always be empty."""
    if optimizer._nothing_to_log_warned or any(group.get("diagnostics") for group in optimizer.param_groups):
        return
    optimizer._nothing_to_log_warned = True
    remedy = (
        "its subspaces are random, and nothing is measured"
        if getattr(optimizer, "moves_coordinates", False)
        else "lowrank_kernels.param_groups(model, rank=…, diagnostics=True) makes groups that are measured"
    )
    warnings.warn(
        f"no group of this {type(optimizer).__name__} has diagnostics=True, so that diagnostics(flat=True) is empty: {remedy}",
        UserWarning,
        stacklevel=5,
    )


def overlaps(optimizer: LowRankOptimizer) -> dict[Tensor, float]:
    """The overlap of each parameter's last basis with the one before, the mean over its experts, where there
    is one that is no NaN. It waits for a GPU, once a device."""
    found: dict[torch.device, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for param, state in optimizer.state.items():
        if KEY in state and (each := local(state[KEY]).view(-1, len(FIGURES))[:, 0]).numel():
            found[each.device].append((param, each.nanmean()))
    values = {}
    for parts in found.values():
        values |= zip((param for param, _ in parts), torch.stack([mean for _, mean in parts]).tolist(), strict=True)
    return {param: value for param, value in values.items() if not math.isnan(value)}
