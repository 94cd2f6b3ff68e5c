"""The launch of a case, by the launcher's own code on unfilled CPU tensors."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowrank_kernels.backends.bucket import Bucket, Hyper
from lowrank_kernels.backends.triton import (
    back_project,
    limiter,
    moments,
    project,
    project_moments,
    residual,
    scaling,
    single_pass,
    table,
)
from lowrank_kernels.storage.eight_bit import scales_shape

from .. import dry, formulas
from .cases import DTYPES, SHAPES, Case

SCALARS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.25}


def bucket_of(case: Case) -> tuple[Bucket, Hyper]:
    """A bucket of one matrix, with what the case's options ask for. Bases are by columns, as the package
    keeps them."""
    dtype, (m, n), rank = DTYPES[case.dtype], SHAPES[case.shape], case.rank
    weight = torch.empty((n, m) if case.right else (m, n), dtype=dtype)
    coded = case.has("8-bit")
    states = [torch.empty(rank, n, dtype=torch.uint8 if coded else torch.float32) for _ in range(2)]
    scales = [[torch.empty(scales_shape((rank, n)))] if coded else None for _ in range(2)]
    bucket, hyper = formulas.bucket_of(
        [weight], [torch.empty_like(weight)], [torch.empty(rank, m, dtype=dtype).mT], *([state] for state in states), **SCALARS,
        right=case.right, found_inf=torch.empty(1), exp_avg_scales=scales[0], exp_avg_sq_scales=scales[1],
        device_lr=torch.empty(()) if case.has("lr on device") else None,
        rounding_seeds=torch.empty(1, dtype=torch.int64) if case.has("stochastic") else None,
    )  # fmt: skip
    if case.kernel == "moments" or case.has("R from memory"):
        of_r = DTYPES[case.normalised] if case.kernel == "moments" else dtype
        bucket = replace(bucket, grads=None, projected=[torch.empty(rank, n, dtype=of_r)])
    return bucket, hyper


def launch(case: Case) -> None:
    bucket, hyper = bucket_of(case)
    rows = table.rows_of(bucket)
    if case.kernel == "single_pass":
        row = case.config if case.given else single_pass.row_for(bucket, rows.aligned)
        if row is None:
            raise LookupError(f"no row of the single pass for {case.name}")
        single_pass.step(bucket, hyper, rows, row)
        return
    if case.kernel == "project":
        project.launch(bucket, rows)
        return
    if case.kernel in ("residual", "residual_norm", "scaling", "limiter"):
        _launch_of_a_lift(case, bucket, hyper, rows)
        return
    normalised = torch.empty((1, case.rank, SHAPES[case.shape][1]), dtype=DTYPES[case.normalised])
    if case.has("R to memory"):
        project_moments.launch(bucket, hyper, rows, normalised, projected=torch.empty_like(normalised), sums=True)
        return
    if case.has("squares of G"):
        project_moments.launch(bucket, hyper, rows, None, sums=True, of_grad=True)
        return
    {"project_moments": project_moments.launch, "moments": moments.launch, "back_project": back_project.launch}[case.kernel](
        bucket, hyper, rows, normalised
    )


def _launch_of_a_lift(case: Case, bucket: Bucket, hyper: Hyper, rows: table.Rows) -> None:
    n = SHAPES[case.shape][1]
    projected = torch.empty((1, case.rank, n), dtype=DTYPES[case.dtype])
    factors = torch.empty(1, n)
    if case.kernel == "residual":
        residual.launch(bucket, hyper, rows, torch.empty_like(projected), projected, factors)
    elif case.kernel == "residual_norm":
        residual.launch(bucket, hyper, rows, None, projected, None)
    elif case.kernel == "scaling":
        scaling.launch(bucket, hyper, rows, factors)
    else:
        sums, squares, last_at = torch.empty(1, 2, 3, n), torch.empty(1, n), torch.empty(1, dtype=torch.int64)
        limiter.launch(sums, squares, last_at, bucket.found_inf, whole=case.has("whole"))


def compiled(case: Case) -> tuple[object, dict]:
    """The kernel that the launch compiles, and the options with which it is launched. The process must not
    have TRITON_INTERPRET set."""
    found = []
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.kind == "tf32" else "highest")
    try:
        with dry.launches(case.arch, lambda kernel, grid, options: found.append((kernel, options))):
            launch(case)
    finally:
        torch.set_float32_matmul_precision(precision)
    [(kernel, options)] = found
    return kernel, options
