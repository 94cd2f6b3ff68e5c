"""A step in two launches, for ranks that do not fit a single pass: R = PᵀG' with the moments in the epilogue
(project_moments.py), then W' = (1 − lr·wd)·W' − lr·α·P·N (back_project.py).

R is never in memory. N passes through it in the dtype of the bases, to which the last dot rounds it anyway:
4·r·n bytes a matrix in 16 bits, written and read. Where a bucket brings R itself, the first launch is that of
moments.py.
"""

from __future__ import annotations

import torch

from ..bucket import Bucket, Hyper
from . import back_project, configs, moments, project_moments, table


def step(bucket: Bucket, hyper: Hyper, rows: table.Rows, row: configs.SplitConfig | None = None) -> None:
    """Two launches for each part of a bucket, given the bucket's table. row: None takes the built-in row of
    each launch."""
    (_, n, rank), dtype = bucket.extents, bucket.bases[0].dtype
    for part in table.launchable(bucket, rank * n * dtype.itemsize):
        part_rows = rows if part is bucket else table.rows_of(part)
        normalised = torch.empty((len(part), rank, n), dtype=dtype, device=part.device)
        if part.projected is None:
            project_moments.launch(part, hyper, part_rows, normalised, config=row and row.project_moments)
        else:
            moments.launch(part, hyper, part_rows, normalised)
        back_project.launch(part, hyper, part_rows, normalised, row and row.back_project)
        del normalised  # so that the next part gets its memory
