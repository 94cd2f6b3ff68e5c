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

from benchmarks.aot import DTYPES, OPTIONS, ROOT
from lowrank_kernels.backends import reference
from lowrank_kernels.backends.triton import back_project, configs, moments, pointers, project, single_pass
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
MATRICES = ("weights_at", "grads_at", "bases_at", "exp_avgs_at", "exp_avg_sqs_at")


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
    kernels = project._project_kernel, moments._update_moments_kernel, back_project._back_project_kernel, single_pass._adamw_step_kernel
    for kernel in kernels:
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
    prepare = {"project": _project, "moments": _moments, "back_project": _back_project, "single_pass": _single_pass}[case.kernel]
    calls = []

    def record(self, *arguments, grid, warmup, **options):
        calls.append((self, arguments, options, (grid[0], 1)))  # one matrix, whatever the size of the row that stands for its address

    run, architecture = triton.JITFunction.run, configs.architecture
    triton.JITFunction.run, configs.architecture = record, lambda device: case.arch
    torch.set_float32_matmul_precision("high" if case.kind == "tf32" else "highest")  # the bounds ask for it, too
    try:
        launch, judge = prepare(case)
        launch()
    finally:
        triton.JITFunction.run, configs.architecture = run, architecture
    [(kernel, arguments, options, grid)] = calls
    if options != vars(case.config):
        raise AssertionError(f"the launcher chose {options}, {vars(case.config)} was meant")
    if grid[0] < 2:
        raise AssertionError(f"{grid[0]} program")
    return Launch(kernel, arguments, options, grid, judge)


def _options(case: Case) -> tuple[bool, ...]:
    return tuple(option in case.options for option in OPTIONS)


def _stored(case: Case) -> Tensor:
    return torch.randn(*((case.n, case.m) if case.right else (case.m, case.n))).to(DTYPES[case.dtype])


def _basis(case: Case) -> Tensor:
    return (case.m**-0.5 * torch.randn(case.m, case.rank)).to(DTYPES[case.dtype])


def _states(case: Case, coded: bool) -> list[Tensor]:
    """M and V as fp32, or as two tensors of codes and two of scales."""
    exp_avg, exp_avg_sq = torch.randn(case.rank, case.n), 0.1 + torch.rand(case.rank, case.n)
    if not coded:
        return [exp_avg, exp_avg_sq]
    shape = case.rank, case.n
    codes = [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)] + [torch.zeros(eight_bit.scales_shape(shape)) for _ in range(2)]
    eight_bit.encode_(exp_avg, exp_avg_sq, *codes, step=SCALARS["step"] - 1)
    return codes


def _seed() -> Tensor:
    return torch.randint(2**62, (1,), dtype=torch.int64)


def _counter() -> Tensor:
    """Updates before this one, as the device counts them."""
    return torch.tensor([float(SCALARS["step"] - 1)])


def _tf32(case: Case) -> float:
    return UNIT["tf32"] if case.kind == "tf32" else 0.0


def _project(case: Case):
    basis, grad = _basis(case), _stored(case)
    projected = torch.full((case.rank, case.n), float("nan"))

    def judge() -> None:
        expected = reference.project(basis.double(), grad.double(), case.right)
        assert_within(projected, expected, project_error(basis, grad.mT if case.right else grad, _tf32(case)), "R")

    launch = project.prepare(basis, grad, basis, grad, right=case.right, aligned=True)
    return lambda: launch(projected), judge


def _moments(case: Case):
    coded, _, on_device = _options(case)
    states, projected = _states(case, coded), torch.randn(case.rank, case.n)
    normalised = torch.full((case.rank, case.n), float("nan"), dtype=DTYPES[case.normalised])
    before = eight_bit.decode(*states, torch.float64) if coded else [state.double() for state in states]
    adam = {name: SCALARS[name] for name in ("beta1", "beta2", "eps", "step")}

    def judge() -> None:
        m, v = before
        of_states = decoded_error(m, v) if coded else (0.0, 0.0)
        errors = moments_error(m, v, projected, adam["beta1"], adam["beta2"], state_errors=of_states)
        expected = formulas.update_moments_(m, v, projected.double(), **adam)
        if coded:
            assert_codes(tuple(states), m, v, errors, adam["step"])
        else:
            assert_within(states[0], m, errors[0], "M")
            assert_within(states[1], v, errors[1], "V")
        store = UNIT[normalised.dtype] if normalised.dtype != torch.float32 else 0.0
        correction = BIAS_CORRECTION_ERROR if on_device else UNIT[torch.float32]
        assert_within(normalised, expected, normalised_error(m, v, errors, **adam, store=store, correction=correction), "N")

    scales = dict(zip(("exp_avg_scales_at", "exp_avg_sq_scales_at"), states[2:], strict=False))
    launch = moments.prepare(*states[:2], states[0], aligned=True, steps_at=_counter() if on_device else None, **scales)
    return lambda: launch(projected, normalised, **adam, found_inf=torch.zeros(1)), judge


def _back_project(case: Case):
    _, stochastic, on_device = _options(case)
    weight, basis = _stored(case), _basis(case)
    normalised = torch.randn(case.rank, case.n).to(DTYPES[case.normalised])
    seed, before = _seed() if stochastic else None, weight.double()
    update = {name: SCALARS[name] for name in ("lr", "scale", "weight_decay")}
    device_lr = torch.tensor(update["lr"]) if on_device else None

    def judge() -> None:
        exact = update | ({"lr": float(device_lr)} if on_device else {})
        rounds = 2 * UNIT[basis.dtype] if normalised.dtype != basis.dtype else 0.0
        old = (before.mT if case.right else before).to(weight.dtype)
        bound = back_project_error(
            old, basis, normalised, **exact, store=0.0 if stochastic else UNIT[weight.dtype], operand_unit=rounds + _tf32(case),
            basis_unit=_tf32(case), device_lr=on_device,
        )  # fmt: skip
        expected = formulas.updated_weight(before, basis.double(), normalised.double(), **exact, right=case.right)
        bound = bound.mT if case.right else bound
        if stochastic:
            least, greatest = rounded_between(expected, bound, seed, SCALARS["step"])
            assert ((least <= weight) & (weight <= greatest)).all(), "W is not the stochastic rounding of anything within its bounds"
        else:
            assert_within(weight, expected, bound, "W")

    launch = back_project.prepare(weight, basis, weight, basis, right=case.right, aligned=True, steps_at=_counter() if on_device else None)
    scalars = {**update, "step": SCALARS["step"], "device_lr": device_lr, "rounding_seeds": seed}
    return lambda: launch(normalised, **scalars, found_inf=torch.zeros(1)), judge


def _single_pass(case: Case):
    coded, stochastic, on_device = _options(case)
    lists = dict(zip(steps.NAMES, (_stored(case), _stored(case), _basis(case), *_states(case, coded)), strict=False))
    before = {name: [tensor.clone()] for name, tensor in lists.items()}
    seed, device_lr = _seed() if stochastic else None, torch.tensor(SCALARS["lr"]) if on_device else None

    def judge() -> None:
        scalars = SCALARS | ({"lr": float(device_lr)} if on_device else {})
        after = {name: [tensor] for name, tensor in lists.items()}
        steps.judge(before, after, 0, case.right, scalars, seed=seed, counted_on_device=on_device, lr_on_device=on_device)

    rows = Rows(**lists, steps=_counter() if on_device else None)
    first = (lists[name] for name in steps.NAMES[:4])
    launch = single_pass.prepare(rows, *first, count=1, right=case.right, aligned=True, stochastic=stochastic)
    return lambda: launch(**SCALARS, found_inf=torch.zeros(1), device_lr=device_lr, rounding_seeds=seed), judge
