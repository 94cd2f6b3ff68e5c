"""The parts of a step as launches of their own, for methods that have no kernel for the whole: R from G, N
from R by AdamW, and W from N."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..bucket import Bucket, Hyper
from . import back_project, moments, table
from . import project as projection


def project(bucket: Bucket) -> list[Tensor]:
    """R of every matrix, (r, n) fp32."""
    found = []
    for part in table.launchable(bucket):
        with table.on_device(part.device):
            found += projection.launch(part, table.rows_of(part)).unbind()
    return found


def update(bucket: Bucket, hyper: Hyper, projected: list[Tensor]) -> Tensor:
    """N (B, r, n) in fp32. Updates M and V in place."""
    bucket = replace(bucket, grads=None, projected=projected)
    _, n, rank = bucket.extents
    normalised = torch.empty((len(bucket), rank, n), dtype=torch.float32, device=bucket.device)
    start = 0
    for part in table.launchable(bucket):
        with table.on_device(part.device):
            moments.launch(part, hyper, table.rows_of(part), normalised[start:])
        start += len(part)
    return normalised


def lift(bucket: Bucket, hyper: Hyper, normalised: Tensor) -> None:
    """Moves the weights by P·N. N is rounded to the bases' dtype, as the product would round it; transposed
    on its way from fp32, it would move 4 bytes an access."""
    normalised, start = normalised.to(bucket.bases[0].dtype), 0
    for part in table.launchable(bucket):
        with table.on_device(part.device):
            back_project.launch(part, hyper, table.rows_of(part), normalised[start:])
        start += len(part)
