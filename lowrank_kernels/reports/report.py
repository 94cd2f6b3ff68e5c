"""report: sorts the parameters of a model by what its optimizers do with them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn import SubspaceLayer
from ..optim import LowRankOptimizer, RSOAdamW, diagnosis, groups
from ..sharded import is_sharded
from ..targets import check_is_module, without_wrappers
from . import measured, reasons
from .measured import Place, States
from .rows import Bytes, Parameter, Report, groups_of, unprojected_of


def report(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> Report:
    """What of a model is projected, what is not and why, and the bytes of weights, gradients, bases, states
    and coordinates against those of AdamW with moments in fp32.

        found = lrk.report(model, optimizer)
        print(found)
        found.bytes.total, found.groups[0].next_refresh, found.unprojected[0].reason

    It works before the first step, when the bytes are those of the states to come, and at any time after it,
    when they are those of the states. Sharded parameters count with this process's parts. Tied parameters
    count once. Call it outside of forward, backward and step; it waits for a GPU where there are diagnostics.

    Args:
        model: the model that is trained.
        optimizer: what trains it; several optimizers where each has some of the parameters. Those of torch
            and others may be among them.

    Raises:
        TypeError: for a model that is no nn.Module, an optimizer that is none, or one that wraps a low-rank
            optimizer.
        ValueError: for no optimizer, and where two of them hold the same parameter.
    """
    check_is_module(model)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else _several(optimizer)
    for each in optimizers:
        _check(each)
        if isinstance(each, LowRankOptimizer):
            each._ask_for_skips()
    layers = [module for module in model.modules() if isinstance(module, SubspaceLayer)]
    sorting = _Sorting(model, optimizers, layers)
    own = {id(layer.coordinates) for layer in layers}
    for name, param in _named(model).values():
        if id(param) not in own:
            sorting.add(name, param)
    sorting.add_strangers()
    found, unknown = sorting.found, tuple(sorting.unknown)
    elements = sum(each.elements for each in found)
    return Report(
        parameters=tuple(found),
        groups=groups_of(found, elements),
        unprojected=unprojected_of(found, elements),
        bytes=Bytes.sum([Bytes(), *(each.bytes for each in found)]),
        adamw=Bytes.sum([Bytes(), *(each.adamw for each in found)]),
        is_sharded=any(map(is_sharded, model.parameters())),
        unknown=unknown,
    )


def _several(optimizers: object) -> list[Optimizer]:
    if not isinstance(optimizers, Iterable):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or several of them, got {type(optimizers).__name__}")
    found = list(optimizers)
    if not found:
        raise ValueError("optimizer is empty; give the optimizers that train the model")
    return found


def _check(optimizer: object) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or several of them, got {type(optimizer).__name__}")
    if not isinstance(optimizer, LowRankOptimizer) and any("rank" in group for group in optimizer.param_groups):
        raise TypeError(
            f"{type(optimizer).__name__} wraps a low-rank optimizer, or is another library's; give the low-rank optimizer itself "
            "(ZeroRedundancyOptimizer has it as .optim)"
        )


def _named(model: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """Each parameter once, with all of its names."""
    named = list(model.named_parameters(remove_duplicate=False))
    found: dict[int, tuple[str, Tensor]] = {}
    for name, (_, param) in zip(without_wrappers([name for name, _ in named]), named, strict=True):
        before = found.get(id(param))
        found[id(param)] = (name if before is None else f"{before[0]} = {name}", param)
    return found


class _Sorting:
    def __init__(self, model: nn.Module, optimizers: list[Optimizer], layers: list[SubspaceLayer]) -> None:
        self.found: list[Parameter] = []
        self.unknown: dict[str, None] = {}
        self._states, self._reasons = States(), reasons.Reasons(model)
        self._layers = {id(layer.weight): layer for layer in layers}
        self._places = _places(optimizers)
        self._left = dict(self._places)
        self._with_basis: set[int] = set()
        """The subspaces whose P is counted."""
        self._overlaps = {
            param: value for each in optimizers if isinstance(each, LowRankOptimizer) for param, value in diagnosis.overlaps(each).items()
        }
        self._ranks = {index: _largest_rank(each, layers) for index, each in enumerate(optimizers)}

    def add(self, name: str, param: Tensor) -> None:
        layer = self._layers.get(id(param))
        own = self._left.pop(param, None)
        if layer is not None:
            place, trained = self._left.pop(layer.coordinates, None), layer.coordinates.requires_grad
            if trained and place is not None and isinstance(place.optimizer, RSOAdamW):
                self._add_layer(name, layer, place)
                return
            place = place or own
        else:
            place, trained = own, param.requires_grad
            if trained and place is not None and groups.is_low_rank(place.group):
                self._add_low_rank(name, param, place)
                return
        self._add_other(name, param, place, self._why(param, place, trained, layer), trained)

    def _why(self, param: Tensor, place: Place | None, trained: bool, layer: SubspaceLayer | None) -> str:
        if not trained:
            return reasons.FROZEN
        if place is None:
            return reasons.IN_NO_OPTIMIZER
        name = type(place.optimizer).__name__
        if layer is not None:
            return f"in {name}, which does not move converted layers"
        why = self._reasons.why(param, self._ranks[place.index])
        if why in (reasons.LINEAR, reasons.EXPERTS) and not isinstance(place.optimizer, LowRankOptimizer):
            return f"in {name}, which does not project"
        return why

    def add_strangers(self) -> None:
        """The parameters of the optimizers that are not in the model."""
        for param, place in list(self._left.items()):
            name = groups.name_of(place.group, place.position)
            described = f"{type(place.optimizer).__name__}, {groups.describe(place.group, place.group_index, place.position)}"
            self._add_other(described if name is None else name, param, place, reasons.NOT_IN_THE_MODEL, trained=False)

    def _add_low_rank(self, name: str, param: Tensor, place: Place) -> None:
        projected, count = measured.of_low_rank(place, param, self._states)
        self._add(name, param, place, count, True, is_right=projected.right, rank=projected.rank, held=param)

    def _add_layer(self, name: str, layer: SubspaceLayer, place: Place) -> None:
        owns = id(layer.subspace) not in self._with_basis
        self._with_basis.add(id(layer.subspace))
        count = measured.of_layer(place, layer, self._states, owns)
        is_right = not layer.transposed  # P is on the side of the input features
        self._add(name, layer.weight, place, count, True, is_right=is_right, rank=layer.subspace.rank, held=layer.coordinates)

    def _add_other(self, name: str, param: Tensor, place: Place | None, reason: str, trained: bool) -> None:
        count = measured.of_other(place, param, self._states)
        if count is None:
            self.unknown[type(place.optimizer).__name__] = None
            count = measured.of_other(None, param, self._states)
        self._add(name, param, place, count, trained, reason=reason)

    def _add(
        self,
        name: str,
        param: Tensor,
        place: Place | None,
        count: Bytes,
        trained: bool,
        reason: str | None = None,
        is_right: bool | None = None,
        rank: int | None = None,
        held: Tensor | None = None,
    ) -> None:
        """held: the parameter in the optimizer, where it is projected."""
        in_optimizer = param if held is None else held
        self.found.append(
            Parameter(
                name=name,
                shape=tuple(param.shape),
                dtype=param.dtype,
                elements=param.numel(),
                optimizer=None if place is None else type(place.optimizer).__name__,
                optimizer_index=None if place is None else place.index,
                group=None if place is None else place.group_index,
                reason=reason,
                side=None if held is None else "right" if is_right else "left",
                rank=rank,
                next_refresh=None if held is None else measured.next_refresh(place, held),
                overlap=self._overlaps.get(in_optimizer, math.nan),
                bytes=count,
                adamw=measured.adamw(param, trained),
                is_estimated=trained and place is not None and not place.optimizer.state.get(in_optimizer) and count.states > 0,
            )
        )


def _places(optimizers: list[Optimizer]) -> dict[Tensor, Place]:
    found: dict[Tensor, Place] = {}
    for index, optimizer in enumerate(optimizers):
        for group_index, group in enumerate(optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                before = found.setdefault(param, Place(optimizer, index, group_index, position))
                if before.optimizer is not optimizer:
                    where = groups.describe(group, group_index, position)
                    raise ValueError(
                        f"{where} of {type(optimizer).__name__} is in {type(before.optimizer).__name__} too, and would be moved twice; "
                        "give each parameter to one optimizer"
                    )
    return found


def _largest_rank(optimizer: Optimizer, layers: list[SubspaceLayer]) -> int | None:
    if isinstance(optimizer, RSOAdamW):
        return max((layer.subspace.rank for layer in layers), default=None)
    return max((group["rank"] for group in optimizer.param_groups if groups.is_low_rank(group)), default=None)
