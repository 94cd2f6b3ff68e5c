"""A step of a bucket whose matrices are cut among processes.

    cut along n      every process: R = PᵀG', the rule, P·N on its own columns; nothing is sent
    cut along m      R = Σ PᵀG' over the processes, each of which gets a piece of its columns: reduce-scatter
                     the rule on that piece
                     N of all columns: all-gather; P·N on its own rows

A rule that looks at whole rows of R adds up its means, and a limited lift the square of a norm, whichever way
the cut goes.

A step is a generator. It yields when it has begun to send, so that `overlapped` may do another bucket's work
until it has arrived. All processes send in the same order.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from ..backends import Bucket, Hyper, foreach
from ..backends.reference import compute_dtype, kept_where, move_, number, orient
from ..lifts.limiter import Limited, limit_
from ..rules.rule import WHOLE, Across
from .collectives import all_gather, reduce_scatter
from .layout import ALONG_M, ALONG_N, Sharding
from .refresh import total_

PART_ELEMENTS = 2**25
"""The most elements of R of all columns that one message carries, 128 MiB in fp32, or one matrix. About four
such tensors exist while it is under way."""
T = TypeVar("T")
Steps = Iterator[None]
Sending = Generator[None, None, T]
"""Yields while messages are under way, and returns a T."""


def overlapped(steps: Iterable[Steps]) -> None:
    """Runs the steps of several buckets. Each time that a bucket has begun, those before it go on by one
    message, which has had that long to arrive."""
    waiting: list[Steps] = []
    for step in steps:
        begun = [step] if _goes_on(step) else []
        waiting = list(filter(_goes_on, waiting)) + begun
    while waiting:
        waiting = list(filter(_goes_on, waiting))


def _goes_on(step: Steps) -> bool:
    """Runs a step until its next message is under way. Whether there was one."""
    return next(step, step) is not step


class _Pieces(Across):
    """Means and norms over rows of which each process holds a piece."""

    def __init__(self, sharding: Sharding, columns: int) -> None:
        self._sharding, self._columns = sharding, columns

    def mean(self, values: Tensor, dim: tuple[int, ...]) -> Tensor:
        count = self._columns * (values.shape[-2] if -2 in dim else 1)
        return total_(values.sum(dim, keepdim=True), self._sharding) / count

    def norm(self, values: Tensor, dim: tuple[int, ...]) -> Tensor:
        return total_(values.square().sum(dim, keepdim=True), self._sharding).sqrt()


def step(bucket: Bucket, hyper: Hyper, sharding: Sharding, columns: int) -> Steps:
    """Moves this process's part of the bucket's weights and states by one update, in place. The bucket holds
    those parts; where it brings R, that is of the columns that this process's states are of. columns: n of
    the whole matrices."""
    cut = sharding.cut(bucket.right)
    alone = hyper.rule.elementwise and not hyper.lift.takes_gradient
    if cut not in (ALONG_M, ALONG_N) or (cut == ALONG_N and alone):
        if bucket.weights[0].numel():
            backends.step(bucket, hyper)
        return
    if hyper.lift.takes_gradient and not isinstance(hyper.lift, Limited):
        raise TypeError(
            f"the lift {hyper.lift.name!r} takes the gradient, of which this process has a part, and says nothing of parts; make it a "
            "lowrank_kernels.lifts.limiter.Limited, or replicate the parameters"
        )
    at_once = max(1, PART_ELEMENTS // (bucket.extents[2] * columns))
    for start in range(0, len(bucket), at_once):
        yield from _step(bucket.part(start, start + at_once), hyper, sharding, columns)


def _step(bucket: Bucket, hyper: Hyper, sharding: Sharding, columns: int) -> Steps:
    cut, limited, projected = sharding.cut(bucket.right), isinstance(hyper.lift, Limited), bucket.projected
    if projected is None:
        projected = yield from _project(bucket, sharding)
    normalised = _update(bucket, hyper, projected, _Pieces(sharding, columns), most=sharding.piece(columns, 0)[1])
    if cut == ALONG_M:
        sent = torch.cat((normalised, torch.stack(projected).to(normalised.dtype)), dim=1) if limited else normalised
        sent = yield from _all_gather(sent, columns, sharding)
        rank = normalised.shape[1]
        normalised, projected = sent[:, :rank], list(sent[:, rank:].unbind())
    if limited:
        yield from _lift(bucket, hyper, projected, normalised, sharding, WHOLE if cut == ALONG_M else _Pieces(sharding, columns))
    elif bucket.weights[0].numel():
        # A kernel takes n from what the bucket brings, which may have been R of a piece of the columns.
        backends.lift(replace(bucket, grads=None, projected=list(normalised.unbind())), hyper, projected, normalised)


def project(bucket: Bucket, sharding: Sharding) -> list[Tensor]:
    """R (r, n') of each matrix, of the columns that this process's states are of."""
    projecting = _project(bucket, sharding)
    while True:
        try:
            next(projecting)
        except StopIteration as done:
            return done.value


def _project(bucket: Bucket, sharding: Sharding) -> Sending[list[Tensor]]:
    projected = backends.project(bucket) if bucket.weights[0].numel() else _no_rows(bucket)
    if sharding.cut(bucket.right) == ALONG_M:
        projected = yield from _reduce_scatter(projected, sharding)
    return projected


def _no_rows(bucket: Bucket) -> list[Tensor]:
    """R of a process that has no row or no column of these matrices."""
    _, n, rank = bucket.extents
    dtype = compute_dtype(bucket.bases[0], bucket.grads[0])
    return [torch.zeros((rank, n), dtype=dtype, device=bucket.device) for _ in range(len(bucket))]


def _update(bucket: Bucket, hyper: Hyper, projected: list[Tensor], across: Across, most: int) -> Tensor:
    """N (B, r, n') from R (r, n') of the same columns as the states. most: the largest n' of a process."""
    bucket = replace(bucket, grads=None, projected=projected)
    if not hyper.rule.elementwise:
        return foreach.batched(bucket, replace(hyper, options={**hyper.options, "across": across}), projected, most)
    if not projected[0].numel():
        return torch.stack(projected).to(compute_dtype(bucket.weights[0], bucket.bases[0], projected[0]))
    return backends.update(bucket, hyper, projected)


def _reduce_scatter(projected: list[Tensor], sharding: Sharding) -> Sending[list[Tensor]]:
    """This process's columns of ΣR, (r, n') of each matrix."""
    whole = torch.stack(projected)
    columns = whole.shape[-1]
    each = -(-columns // sharding.size)
    padded = torch.nn.functional.pad(whole, (0, each * sharding.size - columns))
    outgoing = padded.unflatten(-1, (sharding.size, each)).movedim(-2, 0).contiguous()
    piece = torch.empty_like(outgoing[0])
    work = reduce_scatter(piece, outgoing.flatten(0, 1), group=sharding.group, async_op=True)
    yield
    work.wait()
    _, count = sharding.piece(columns)
    return [matrix[:, :count].contiguous() for matrix in piece.unbind()]


def _all_gather(piece: Tensor, columns: int, sharding: Sharding) -> Sending[Tensor]:
    """(B, r, n) from the (B, r, n') of each process."""
    each = -(-columns // sharding.size)
    mine = torch.nn.functional.pad(piece, (0, each - piece.shape[-1])).contiguous()
    everyones = mine.new_empty((sharding.size, *mine.shape))
    work = all_gather(everyones.flatten(0, 1), mine, group=sharding.group, async_op=True)
    yield
    work.wait()
    return everyones.movedim(0, -2).flatten(-2)[..., :columns].contiguous()


def _lift(bucket: Bucket, hyper: Hyper, projected: list[Tensor], normalised: Tensor, sharding: Sharding, across: Across) -> Steps:
    """Moves the weights by a limited lift. The part that is limited is computed twice, rather than held for
    all matrices of the bucket."""
    lift: Limited = hyper.lift
    dtype = compute_dtype(bucket.weights[0], normalised)
    normalised, r = normalised.to(dtype), torch.stack(projected).to(dtype)
    scale = lift.factor(normalised, r, across)

    def beyond(index: int) -> Tensor:
        grad = orient(bucket.grads[index], bucket.right).to(dtype)
        return scale[index] * lift.outside(bucket.bases[index].to(dtype), grad, r[index])

    squares = torch.stack([beyond(index).square().sum() for index in range(len(bucket))])
    work = dist.all_reduce(squares, group=sharding.group, async_op=True)
    yield
    work.wait()
    rate = hyper.lr.double().reshape(()) if isinstance(hyper.lr, Tensor) else hyper.lr
    options = dict(lr=rate, scale=hyper.scale, weight_decay=hyper.weight_decay, right=bucket.right)
    for index, (weight, last) in enumerate(zip(bucket.weights, bucket.states[lift.limit], strict=True)):
        seed = None if bucket.rounding_seeds is None else bucket.rounding_seeds[index : index + 1]
        with kept_where(bucket.found_inf, [weight, last]):
            limited = limit_(squares[index].sqrt(), last).to(dtype) * beyond(index)
            along = lift.along(bucket.bases[index].to(dtype), normalised[index])
            direction = limited if along is None else along + limited
            move_(weight, direction, **options, rounding_seed=seed, step=number(bucket.steps[index]))
