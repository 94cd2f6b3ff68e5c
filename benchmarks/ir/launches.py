"""A case's tensors, its launch as the launcher makes it, and the judgement of what came out, by the reference
in fp64.

ttsem follows a pointer by the tensor that it came from, and an address that was loaded from a table is an
offset of the table to it. So the rows of the table are the matrices themselves here, one a launch, and the
device function that would load an address hands its row on.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.aot import ROOT
from benchmarks.aot.cases import DTYPES
from lowrank_kernels.backends import Bucket, Hyper, reference
from lowrank_kernels.backends.triton import (
    back_project,
    choose,
    limiter,
    moments,
    pointers,
    project,
    project_moments,
    residual,
    scaling,
    single_pass,
)
from lowrank_kernels.backends.triton.table import Rows
from lowrank_kernels.storage import eight_bit

from .. import formulas
from .cases import Case

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "kernels")]  # the bounds are those of the tests

import steps  # noqa: E402
from coded import assert_codes  # noqa: E402
from tolerances import (  # noqa: E402
    BIAS_CORRECTION_ERROR,
    UNIT,
    assert_within,
    back_project_error,
    decoded_error,
    moments_error,
    normalised_error,
    project_error,
    rounded_between,
)

SCALARS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.2, "scale": 0.5, "step": 4}
MATRICES = ("weights_at", "grads_at", "projected_at", "bases_at", "exp_avgs_at", "exp_avg_sqs_at")
KERNELS = (
    single_pass._adamw_step_kernel,
    project_moments._project_moments_kernel,
    back_project._back_project_kernel,
    project._project_kernel,
    moments._update_moments_kernel,
    residual._residual_kernel,
    limiter._limit_kernel,
    scaling._scale_kernel,
)


@triton.jit
def _matrix_itself(addresses, matrix, DTYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """In place of pointers.matrix_at, where the row is the matrix."""
    tl.static_assert(addresses.dtype.element_ty == DTYPE)
    return addresses


def replace_table() -> None:
    """For the rest of this process, before any kernel is compiled. That a matrix starts at a multiple of 16
    bytes, the compiler then learns from the tensor, where the kernels say it of the address that they loaded.
    """
    pointers.matrix_at = _matrix_itself
    for kernel in KERNELS:
        for parameter in kernel.params:
            if parameter.name in MATRICES:
                parameter.do_not_specialize_on_alignment = False


@dataclasses.dataclass
class Launch:
    """The kernel, what it is called with, and how its results are judged: judge() raises AssertionError."""

    kernel: triton.JITFunction
    arguments: tuple
    options: dict
    grid: tuple[int, int]
    judge: Callable[[], None]


def launch_of(case: Case) -> Launch:
    """Runs the launcher on fresh tensors up to the launch."""
    prepare = {
        "project": _project,
        "moments": _moments,
        "project_moments": _project_moments,
        "back_project": _back_project,
        "single_pass": _single_pass,
        "residual": _residual,
        "residual_norm": _residual_norm,
        "limiter": _limiter,
        "scaling": _scaling,
    }[case.kernel]
    calls = []

    def record(self, *arguments, grid, warmup, **options):
        calls.append((self, arguments, options, (grid[0], 1)))  # one matrix, whatever the size of the row that stands for its address

    run, architecture = triton.JITFunction.run, choose.architecture
    triton.JITFunction.run, choose.architecture = record, lambda device: case.arch
    torch.set_float32_matmul_precision("high" if case.kind == "tf32" else "highest")  # the bounds ask for it, too
    try:
        bucket, hyper = _bucket(case)
        judge = prepare(case, bucket, hyper, _rows(bucket))
    finally:
        triton.JITFunction.run, choose.architecture = run, architecture
    [(kernel, arguments, options, grid)] = calls
    if options != case.config.launch_options():
        raise AssertionError(f"the launcher chose {options}, {case.config} was meant")
    if grid[0] < 2 and case.kernel != "limiter":  # which has one for each matrix
        raise AssertionError(f"{grid[0]} program")
    return Launch(kernel, arguments, options, grid, judge)


def _bucket(case: Case) -> tuple[Bucket, Hyper]:
    """One matrix. Bases are by columns, as the package keeps them."""
    dtype = DTYPES[case.dtype]
    weight, grad = (torch.randn(*((case.n, case.m) if case.right else (case.m, case.n))).to(dtype) for _ in range(2))
    basis = (case.m**-0.5 * torch.randn(case.rank, case.m)).to(dtype).mT
    states, on_device = _states(case), case.has("lr on device")
    bucket, hyper = formulas.bucket_of(
        [weight], [grad], [basis], *([state] for state in states[:2]), **SCALARS, right=case.right, found_inf=torch.zeros(1),
        device_steps=[torch.tensor([float(SCALARS["step"] - 1)])], device_lr=torch.tensor(SCALARS["lr"]) if on_device else None,
        exp_avg_scales=[states[2]] if case.has("8-bit") else None, exp_avg_sq_scales=[states[3]] if case.has("8-bit") else None,
        rounding_seeds=torch.randint(2**62, (1,), dtype=torch.int64) if case.has("stochastic") else None,
    )  # fmt: skip
    if case.kernel == "moments" or case.has("R from memory"):
        of_r = DTYPES[case.normalised] if case.kernel == "moments" else dtype
        bucket = dataclasses.replace(bucket, grads=None, projected=[torch.randn(case.rank, case.n).to(of_r)])
    return bucket, hyper


def _states(case: Case) -> list[Tensor]:
    """M and V as fp32, or as two tensors of codes and two of scales."""
    exp_avg, exp_avg_sq = torch.randn(case.rank, case.n), 0.1 + torch.rand(case.rank, case.n)
    if not case.has("8-bit"):
        return [exp_avg, exp_avg_sq]
    shape = case.rank, case.n
    codes = [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)] + [torch.zeros(eight_bit.scales_shape(shape)) for _ in range(2)]
    eight_bit.encode_(exp_avg, exp_avg_sq, *codes, step=SCALARS["step"] - 1)
    return codes


def _rows(bucket: Bucket) -> Rows:
    """A table whose rows are the matrices."""
    lists = {"weights": bucket.weights, "bases": bucket.bases, "steps": bucket.steps, "grads": bucket.grads, "projected": bucket.projected}
    lists |= {f"{name}s": tensors for name, tensors in bucket.states.items()}
    return Rows(**{name: None if tensors is None else tensors[0] for name, tensors in lists.items()}, aligned=True)


def _normalised(case: Case) -> Tensor:
    """Room for N."""
    return torch.full((1, case.rank, case.n), float("nan"), dtype=DTYPES[case.normalised])


def _tf32(case: Case) -> float:
    return UNIT["tf32"] if case.kind == "tf32" else 0.0


def _project(case: Case, bucket: Bucket, hyper: Hyper, rows: Rows) -> Callable[[], None]:
    basis, grad = bucket.bases[0], bucket.grads[0]
    projected = project.launch(bucket, rows)[0].fill_(float("nan"))

    def judge() -> None:
        expected = reference.project(basis.double(), grad.double(), case.right)
        assert_within(projected, expected, project_error(basis, grad.mT if case.right else grad, _tf32(case)), "R")

    return judge


def _moments(case: Case, bucket: Bucket, hyper: Hyper, rows: Rows) -> Callable[[], None]:
    normalised, projected = _normalised(case), bucket.projected[0].double()
    moments.launch(bucket, hyper, rows, normalised)
    return _judge_moments(case, bucket, normalised[0], projected, torch.zeros_like(projected))


def _project_moments(case: Case, bucket: Bucket, hyper: Hyper, rows: Rows) -> Callable[[], None]:
    normalised, basis, grad = _normalised(case), bucket.bases[0].double(), bucket.grads[0].double()
    project_moments.launch(bucket, hyper, rows, normalised)
    of_r = project_error(basis, grad.mT if case.right else grad, _tf32(case))
    return _judge_moments(case, bucket, normalised[0], reference.project(basis, grad, case.right), of_r)


def _judge_moments(case: Case, bucket: Bucket, normalised: Tensor, projected: Tensor, of_r: Tensor) -> Callable[[], None]:
    """projected: the exact R, which the kernel knows to of_r."""
    states = [tensors[0] for tensors in bucket.states.values()]
    before = eight_bit.decode(*states, torch.float64) if case.has("8-bit") else [state.double() for state in states]
    adam = {name: SCALARS[name] for name in ("beta1", "beta2", "eps", "step")}

    def judge() -> None:
        m, v = before
        of_states = decoded_error(m, v) if case.has("8-bit") else (0.0, 0.0)
        errors = moments_error(m, v, projected, adam["beta1"], adam["beta2"], projected_error=of_r, state_errors=of_states)
        expected = formulas.update_moments_(m, v, projected, **adam)
        if case.has("8-bit"):
            assert_codes(tuple(states), m, v, errors, adam["step"])
        else:
            assert_within(states[0], m, errors[0], "M")
            assert_within(states[1], v, errors[1], "V")
        store = UNIT[normalised.dtype] if normalised.dtype != torch.float32 else 0.0
        assert_within(normalised, expected, normalised_error(m, v, errors, **adam, store=store, correction=BIAS_CORRECTION_ERROR), "N")

    return judge


def _back_project(case: Case, bucket: Bucket, hyper: Hyper, rows: Rows) -> Callable[[], None]:
    weight, basis, on_device = bucket.weights[0], bucket.bases[0], case.has("lr on device")
    normalised = torch.randn(1, case.rank, case.n).to(DTYPES[case.normalised])
    seed, before = bucket.rounding_seeds, weight.double()
    update = {name: SCALARS[name] for name in ("lr", "scale", "weight_decay")} | ({"lr": float(hyper.lr)} if on_device else {})
    back_project.launch(bucket, hyper, rows, normalised)

    def judge() -> None:
        old = (before.mT if case.right else before).to(weight.dtype)
        bound = back_project_error(
            old, basis, normalised[0], **update, store=0.0 if seed is not None else UNIT[weight.dtype], operand_unit=_tf32(case),
            basis_unit=_tf32(case), device_lr=on_device,
        )  # fmt: skip
        expected = formulas.updated_weight(before, basis.double(), normalised[0].double(), **update, right=case.right)
        bound = bound.mT if case.right else bound
        if seed is not None:
            least, greatest = rounded_between(expected, bound, seed, SCALARS["step"])
            assert ((least <= weight) & (weight <= greatest)).all(), "W is not the stochastic rounding of anything within its bounds"
        else:
            assert_within(weight, expected, bound, "W")

    return judge


def _residual(case: Case, bucket: Bucket, hyper: Hyper, rows: Rows) -> Callable[[], None]:
    """W' = … − lr·α·([P, I]·[N − s·R, s·G'])."""
    weight, basis, grad = bucket.weights[0], bucket.bases[0].double(), bucket.grads[0].double()
    normalised, projected = (torch.randn(1, case.rank, case.n).to(DTYPES[case.normalised]) for _ in range(2))
    factors, before = torch.rand(1, case.n), weight.double()
    residual.launch(bucket, hyper, rows, normalised, projected, factors)
    n, r, s = normalised[0].double(), projected[0].double(), factors[0].double()
    g = grad.mT if case.right else grad
    directions = torch.cat([basis, torch.eye(case.m, dtype=torch.float64)], 1)
    of_x = 3 * UNIT[torch.float32] * (n.abs() + s * r.abs())
    units = dict(operand_unit=(0.0 if weight.dtype == torch.float32 else 2 * UNIT[weight.dtype]) + _tf32(case), basis_unit=_tf32(case))
    return _judge_weights(case, bucket, hyper, before, directions, torch.cat([n - s * r, s * g]), torch.cat([of_x, 0 * g]), units)


def _residual_norm(case: Case, bucket: Bucket, hyper: Hyper, rows: Rows) -> Callable[[], None]:
    basis, grad = bucket.bases[0].double(), bucket.grads[0].double()
    projected = torch.randn(1, case.rank, case.n).to(DTYPES[case.dtype])
    squares = residual.launch(bucket, hyper, rows, None, projected, None).fill_(float("nan"))

    def judge() -> None:
        g, r = grad.mT if case.right else grad, projected[0].double()
        inside = basis.abs() @ r.abs()
        error = ((case.rank + 1) * 2.0**-23 + 2 * _tf32(case)) * inside + UNIT[torch.float32] * g.abs()
        outside = (g - basis @ r).abs()
        tiles = torch.arange(case.m).div(case.config.BLOCK_M, rounding_mode="floor")
        for tile, found in enumerate(squares[0]):
            x, e = outside[tiles == tile], error[tiles == tile]
            bound = (2 * x * e + e**2 + (len(x) + 2) * UNIT[torch.float32] * (x + e) ** 2).sum(0)
            assert_within(found, (x**2).sum(0), bound, "Σ S²")

    return judge


def _limiter(case: Case, bucket: Bucket, hyper: Hyper, rows: Rows) -> Callable[[], None]:
    sums, squares, last = torch.rand(1, 2, 3, case.n), torch.rand(1, case.n), torch.tensor([0.5])
    factors = limiter.launch(sums, squares, last, bucket.found_inf, whole=case.has("whole"))

    def judge() -> None:
        of_n, of_r = sums.double().sum(1)[0, :2]
        ratio = (of_n.sum() / of_r.sum()).sqrt() if case.has("whole") else (of_n / of_r).sqrt()
        norm = (ratio**2 * squares.double()[0]).sum().sqrt()
        exact = (0.505 / norm * ratio).expand(case.n)
        assert_within(factors[0], exact, (case.n + 10) * UNIT[torch.float32] * exact, "f·s")
        assert_within(last, torch.tensor([0.505], dtype=torch.float64), torch.tensor([1e-6]), "last")

    return judge


def _scaling(case: Case, bucket: Bucket, hyper: Hyper, rows: Rows) -> Callable[[], None]:
    weight, grad, factors = bucket.weights[0], bucket.grads[0].double(), torch.rand(1, case.n)
    before = weight.double()
    scaling.launch(bucket, hyper, rows, factors)
    g = grad.mT if case.right else grad
    directions = torch.eye(case.m, dtype=torch.float64)
    return _judge_weights(case, bucket, hyper, before, directions, factors[0].double() * g, 0 * g, {})


def _judge_weights(
    case: Case, bucket: Bucket, hyper: Hyper, before: Tensor, directions: Tensor, factors: Tensor, error: Tensor, units: dict[str, float]
) -> Callable[[], None]:
    """W' = (1 − lr·wd)·W' − lr·α·directions·factors, with factors known to `error`."""
    weight, seed, on_device = bucket.weights[0], bucket.rounding_seeds, case.has("lr on device")
    numbers = dict(lr=float(hyper.lr), scale=hyper.scale, weight_decay=hyper.weight_decay)

    def judge() -> None:
        old = before.mT if case.right else before
        bound = back_project_error(
            old.to(weight.dtype), directions, factors, **numbers, store=0.0 if seed is not None else UNIT[weight.dtype],
            normalised_error=error, device_lr=on_device, **units,
        )  # fmt: skip
        expected = (1 - numbers["lr"] * hyper.weight_decay) * old - numbers["lr"] * hyper.scale * (directions @ factors)
        found = weight.mT if case.right else weight
        if seed is None:
            assert_within(found, expected, bound, "W")
            return
        stored = [matrix.mT if case.right else matrix for matrix in (expected, bound)]
        least, greatest = rounded_between(*stored, seed, SCALARS["step"])
        assert ((least <= weight) & (weight <= greatest)).all(), "W is not the stochastic rounding of anything within its bounds"

    return judge


def _single_pass(case: Case, bucket: Bucket, hyper: Hyper, rows: Rows) -> Callable[[], None]:
    names = (("weights", bucket.weights), ("grads", bucket.grads), ("projected", bucket.projected), ("bases", bucket.bases))
    lists = {name: tensors for name, tensors in names if tensors is not None}
    lists |= {f"{name}s": tensors for name, tensors in bucket.states.items()}
    before = {name: [tensor.clone() for tensor in tensors] for name, tensors in lists.items()}
    row = single_pass.row_for(bucket, aligned=True)
    if row is None:
        raise AssertionError("no row of the single pass serves this bucket")
    single_pass.step(bucket, hyper, rows, row)

    def judge() -> None:
        on_device = case.has("lr on device")
        scalars = SCALARS | ({"lr": float(hyper.lr)} if on_device else {})
        steps.judge(before, lists, 0, case.right, scalars, seed=bucket.rounding_seeds, lr_on_device=on_device)

    return judge
