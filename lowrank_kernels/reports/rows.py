"""The rows of a report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bytes:
    """Bytes in this process.

    weights         of the parameters
    gradients       those that exist together when the backward pass ends; with `in_backward` R in their place
    bases           P
    states          everything else that the optimizer keeps: moments, counts, diagnostics
    coordinates     of RSO's layers
    """

    weights: int = 0
    gradients: int = 0
    bases: int = 0
    states: int = 0
    coordinates: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @staticmethod
    def sum(each: Iterable[Bytes]) -> Bytes:
        columns = zip(*map(dataclasses.astuple, each), strict=True)
        return Bytes(*map(sum, columns))


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model. A converted layer is its weight; its coordinates have no row of their own.

    name: also the other names of a tied parameter, with " = " between them. shape, elements: of the whole,
    where it is sharded. optimizer: the class, or None. optimizer_index, group: its place in the optimizers.
    reason: why it is not projected, or None where it is. side: "left" or "right", of the weight as stored.
    next_refresh: in how many calls of step() its next basis is chosen, 1 for the coming one. overlap: of its
    last basis with the one before; NaN where that is not known. adamw: the bytes under AdamW with moments in
    fp32. is_estimated: whether the optimizer has no state for it yet, and its bytes are those to come.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    elements: int
    optimizer: str | None
    optimizer_index: int | None
    group: int | None
    reason: str | None
    side: str | None
    rank: int | None
    next_refresh: int | None
    overlap: float
    bytes: Bytes
    adamw: Bytes
    is_estimated: bool


@dataclass(frozen=True)
class Group:
    """The projected parameters of one group. share: of the model's elements. side: "left", "right" or
    "mixed". ranks: the least and the greatest. next_refresh: the earliest. overlap: the mean of those that
    are known, else NaN."""

    optimizer: str
    optimizer_index: int
    group: int
    parameters: int
    elements: int
    share: float
    side: str
    ranks: tuple[int, int]
    next_refresh: int
    overlap: float
    bytes: Bytes


@dataclass(frozen=True)
class Unprojected:
    """The parameters that are not projected for one reason. largest: the name of the largest one, and
    largest_shape its shape."""

    reason: str
    parameters: int
    elements: int
    share: float
    largest: str
    largest_shape: tuple[int, ...]
    bytes: Bytes


@dataclass(frozen=True, repr=False)
class Report:
    """What `report` returns; str() and repr() of it are three tables.

    parameters      a row for each parameter of the model, and for those of the optimizers that are not in it
    groups          the projected ones, by group
    unprojected     the others, by reason
    bytes           of all
    adamw           of the same model under AdamW with moments in fp32
    is_sharded      whether parameters are sharded, so that bytes are those of this process's parts
    unknown         classes of optimizers whose states are not counted, as they are not known before a step
    """

    parameters: tuple[Parameter, ...]
    groups: tuple[Group, ...]
    unprojected: tuple[Unprojected, ...]
    bytes: Bytes
    adamw: Bytes
    is_sharded: bool
    unknown: tuple[str, ...]

    @property
    def elements(self) -> int:
        return sum(each.elements for each in self.parameters)

    @property
    def is_estimated(self) -> bool:
        """Whether the states of some parameters are still to come."""
        return any(each.is_estimated for each in self.parameters)

    def __str__(self) -> str:
        from .text import text

        return text(self)

    __repr__ = __str__


def groups_of(parameters: Iterable[Parameter], elements: int) -> tuple[Group, ...]:
    together: dict[tuple[int, int], list[Parameter]] = {}
    for each in parameters:
        if each.reason is None:
            together.setdefault((each.optimizer_index, each.group), []).append(each)
    found = []
    for (optimizer_index, group), members in sorted(together.items()):
        sides = {each.side for each in members}
        overlaps = [each.overlap for each in members if not math.isnan(each.overlap)]
        count = sum(each.elements for each in members)
        found.append(
            Group(
                optimizer=members[0].optimizer,
                optimizer_index=optimizer_index,
                group=group,
                parameters=len(members),
                elements=count,
                share=count / elements,
                side=sides.pop() if len(sides) == 1 else "mixed",
                ranks=(min(each.rank for each in members), max(each.rank for each in members)),
                next_refresh=min(each.next_refresh for each in members),
                overlap=math.fsum(overlaps) / len(overlaps) if overlaps else math.nan,
                bytes=Bytes.sum(each.bytes for each in members),
            )
        )
    return tuple(found)


def unprojected_of(parameters: Iterable[Parameter], elements: int) -> tuple[Unprojected, ...]:
    """By reason, the largest first."""
    together: dict[str, list[Parameter]] = {}
    for each in parameters:
        if each.reason is not None:
            together.setdefault(each.reason, []).append(each)
    found = []
    for reason, members in together.items():
        largest = max(members, key=lambda each: each.elements)
        count = sum(each.elements for each in members)
        share = count / elements if elements else 0.0
        total = Bytes.sum(each.bytes for each in members)
        found.append(Unprojected(reason, len(members), count, share, largest.name, largest.shape, total))
    return tuple(sorted(found, key=lambda each: -each.elements))
