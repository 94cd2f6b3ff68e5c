"""python -m benchmarks.gpu.smoke: is it right at all? Every kernel by every way it has of doing its work,
once, against fp64.

The kernels of csrc/ by the operators that call them, the step on each path and side, and a CUDA graph. On a
CPU the operators and paths that it has. A check that fails is printed, and the next one runs, unless the GPU
is lost to the process. --operators: csrc/ alone, for compute-sanitizer. --registered: only says, and by the
exit status, whether every operator of the refresh has a kernel for the device.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_kernels import backends, extension, ops, philox, range_finder
from lowrank_kernels.backends import reference
from lowrank_kernels.lifts import Lift
from lowrank_kernels.lifts.back_projection import BackProjection
from lowrank_kernels.lifts.residual import Residual
from lowrank_kernels.lifts.scaling import ChannelScaling
from lowrank_kernels.ops import parts

from .. import checks, contenders
from ..cases import Unavailable
from ..suites import kernel
from . import lost

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORTHONORMAL = 1e-5
"""‖PᵀP − I‖ of a basis before it is cast, at most."""
JACOBI_ROWS, CHOLESKY_COLUMNS = (64, 500, 2000), (1, 33, 240, 300, 400)
CUSOLVER_ROWS = (1, 64, 500, 2056)
"""jacobi.cu: a warp up to 128 rows, two up to 1024, eight above. cholesky_inverse.cu: 128 threads up to 64
columns, 384 above; fp64 while its triangle fits shared memory (240 columns on sm_90), fp32 up to 340, then
cuSOLVER. cusolver.cpp: up to l = 2r + 8 of rank 1024."""
EIGENVALUES = 1e-11
"""Error of eigenvalues in fp64, relative to their norm, at most: l·u is 2e-13 at l = 2056."""

Check = Callable[[], str]
"""Returns what it found, or raises checks.WrongResult."""


def registered() -> bool:
    """Whether the dispatcher has a kernel of each operator for the device itself, where else the default in
    PyTorch runs."""
    key = DEVICE.upper()
    missing = extension.missing(key)
    print(f"extension: {extension.status()}")
    print(f"kernels for {key}: " + ", ".join(f"{name} {'NO' if name in missing else 'yes'}" for name in extension.OPERATORS))
    if missing:
        print(f"!!!!! THE {key} PART OF THE EXTENSION IS NOT THERE: what follows runs and times the refresh in PyTorch !!!!!")
    return not missing


def defect(basis: Tensor) -> float:
    """‖PᵀP − I‖, in fp64 on the CPU."""
    basis = basis.cpu().double()
    return torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(basis.shape[-1], dtype=torch.float64)).item()


def eigenproblem(solver: str, rows: int, coupled: int | None = None) -> str:
    """The eigenproblems of the Gram matrices of G (rows, rows + 20) and of zeros. coupled: G is diagonal but
    for as many rows. A CPU has LAPACK for either solver."""
    torch.manual_seed(rows)
    grad = torch.randn(rows, rows + 20, dtype=torch.float64)
    if coupled is not None:
        diagonal = torch.zeros_like(grad)
        diagonal[range(rows), range(rows)] = torch.linspace(2, 1, rows, dtype=torch.float64)
        diagonal[:coupled, :coupled] = grad[:coupled, :coupled]
        grad = diagonal
    gram = torch.stack([grad @ grad.mT, torch.zeros(rows, rows, dtype=torch.float64)])
    vectors, values = parts.eigh(gram.to(DEVICE), rows + 20, solver if DEVICE == "cuda" else "auto")
    exact = torch.linalg.eigvalsh(gram[0]).flip(-1)
    off = checks.require("λ", checks.relative_error(values[0].cpu(), exact), EIGENVALUES)
    turned = vectors[0].cpu()
    checks.require("V·Λ", checks.relative_error(gram[0] @ turned, turned * exact), EIGENVALUES)
    checks.require("λ of zeros", values[1].abs().max().item(), 0.0)
    return f"λ off by {off:.1e}, ‖VᵀV − I‖ {max(checks.require('the vectors', defect(each), ORTHONORMAL) for each in vectors):.1e}"


def cholesky(columns: int) -> str:
    """orth(Y) of (512, columns), whose every pass inverts a Cholesky factor."""
    torch.manual_seed(columns)
    matrix = torch.randn(512, columns)
    basis = ops.orthonormalise(matrix.to(DEVICE), seed=1)
    exact, found = matrix.double(), basis.cpu().double()
    lost_span = checks.require("the span", ((exact - found @ (found.mT @ exact)).norm() / exact.norm()).item(), ORTHONORMAL)
    return f"outside its span {lost_span:.1e}, ‖PᵀP − I‖ {checks.require('the basis', defect(basis), ORTHONORMAL):.1e}"


def sketch(dtype: torch.dtype) -> str:
    """The random Ω, in the dtype of the products: by the energy that the leading directions hold."""
    torch.manual_seed(0)
    grad = torch.randn(400, 900) / torch.arange(1, 401)[:, None]
    grad = grad.to(dtype)
    basis, _ = ops.range_finder(grad.to(DEVICE), 32, power_iters=2)
    held = (basis.cpu().double().mT @ grad.double()).square().sum() / torch.linalg.svdvals(grad.double())[:32].square().sum()
    checks.require("the energy", abs(1 - held.item()), 0.03)
    return f"energy {held.item():.4f}, ‖PᵀP − I‖ {checks.require('the basis', defect(basis), ORTHONORMAL):.1e}"


def normals() -> str:
    """A single random column is a Gaussian vector, normalised: the same words as in Python."""
    [basis] = ops.choose_bases(
        [torch.zeros(100_003, 2, device=DEVICE)], None, rank=1, right=False, selection="random", svd="randomized", oversample=8,
        power_iters=1, seed=7, refresh_number=0, places=[(0, 0)], dtype=torch.float32,
    )  # fmt: skip
    key = philox.signed64(philox.derive_seed(7, 0, 0, 0))
    exact = philox.normal(philox.seed_tensor([key], "cpu"), (100_003, 1), philox.BASIS, torch.float64)[0]
    return f"off by {checks.require('the draws', checks.relative_error(basis.cpu(), exact / exact.norm()), 1e-5):.1e}"


def gumbels() -> str:
    """Directions drawn, against the CPU's: but for ties of rounding the same."""
    torch.manual_seed(0)
    sigma = torch.rand(200, 64)
    seeds = list(range(200))
    found = ops.sample_importance(sigma.to(DEVICE), 10, seed=seeds).cpu()
    other = (found != range_finder.sample_importance(sigma, 10, seeds)).any(-1).double().mean().item()
    return f"{checks.require('the share of rows with other draws', other, 0.02):.1%} of rows draw otherwise than in Python"


def step(path: str, rows: int, columns: int, small: bool) -> str:
    """A step of a bucket: enough matrices to fill a GPU, so that the single pass serves them."""
    case = kernel.KernelCase(path, 2 if small else 64, rows, columns, 128, torch.bfloat16)
    bucket = kernel.Bucket(case, DEVICE)
    with torch.no_grad():
        error = kernel.check(bucket, (kernel.cpu_runs if DEVICE == "cpu" else kernel.triton_runs)(bucket))
    return f"‖ΔW − exact‖ {error:.1e}"


def method(lift: Lift, from_memory: bool, rows: int, columns: int, small: bool) -> str:
    """A step by the backend of this device, with another lift or with R from memory, against plain PyTorch in
    fp64."""
    case = kernel.KernelCase("step", 2 if small else 64, rows, columns, 128, torch.bfloat16)
    bucket = kernel.Bucket(case, DEVICE)
    made, hyper = bucket.inputs(1.0)
    made.states |= {name: [torch.full((), 30.0, device=DEVICE) for _ in made.weights] for name in lift.state()}  # the limiter acts
    if from_memory:
        made = replace(made, grads=None, projected=list(bucket.projected.unbind()))
    hyper, errors = replace(hyper, lift=lift), []
    exact = [_in_fp64(made.part(index, index + 1)) for index in (0, len(made) - 1)]
    before = [made.weights[index].double() for index in (0, len(made) - 1)]
    backends.step(made, hyper)
    for one, weight, index in zip(exact, before, (0, len(made) - 1), strict=True):
        reference.step(one, hyper)
        moved = made.weights[index].double() - weight
        errors.append(checks.require("ΔW", checks.relative_error(moved, one.weights[0] - weight), checks.UPDATE_ERROR[case.dtype]))
    return f"‖ΔW − exact‖ {max(errors):.1e}"


def _in_fp64(bucket: backends.Bucket) -> backends.Bucket:
    def doubled(tensors: list[Tensor] | None) -> list[Tensor] | None:
        return None if tensors is None else [tensor.double() for tensor in tensors]

    return replace(
        bucket, weights=doubled(bucket.weights), bases=doubled(bucket.bases), grads=doubled(bucket.grads),
        projected=doubled(bucket.projected), states={name: doubled(tensors) for name, tensors in bucket.states.items()},
    )  # fmt: skip


def graph() -> str:
    """Two replays of a captured step move the weights as two steps outside it. On a CPU nothing is
    captured."""
    shapes, moved = [(256, 688), (688, 256)] * 2, []
    for captured in (False, True):
        params = contenders.make_params(shapes, torch.bfloat16, DEVICE)
        optimizer = contenders.low_rank_optimizer(params, 64, {"capturable": True})
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        replay = optimizer.step
        if captured and DEVICE == "cuda":
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                optimizer.step()
            replay = recorded.replay
        before = [param.detach().clone() for param in params]
        for _ in range(2):
            replay()
        moved.append(torch.cat([(param.detach().double() - old.double()).flatten() for param, old in zip(params, before, strict=True)]))
    return f"off by {checks.require('the update', checks.relative_error(moved[1], moved[0]), 1e-6):.1e}"


def operator_checks(small: bool) -> Iterator[tuple[str, Check]]:
    """csrc/. Small: for a CPU and for the sanitizers, with hardly a rotation among the many pairs of the
    largest."""
    for rows in JACOBI_ROWS[: 1 if small else None]:
        yield f"jacobi, {rows} rows", lambda rows=rows: eigenproblem("jacobi", rows)
    for rows in (150, 1030) if small else ():
        yield f"jacobi, {rows} rows, 8 of them coupled", lambda rows=rows: eigenproblem("jacobi", rows, coupled=8)
    for rows in CUSOLVER_ROWS[: 2 if small else None]:
        yield f"cusolver, {rows} rows", lambda rows=rows: eigenproblem("cusolver", rows)
    for columns in CHOLESKY_COLUMNS:
        yield f"cholesky_inverse, {columns} columns", lambda columns=columns: cholesky(columns)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        yield f"normal, {dtype}", lambda dtype=dtype: sketch(dtype)
    yield "normal, bit for bit", normals
    yield "gumbel", gumbels


def step_checks(small: bool) -> Iterator[tuple[str, Check]]:
    for path in ("step",) if DEVICE == "cpu" else ("single_pass", "split"):
        for side, extents in (("left", (512, 1376)), ("right", (1376, 512))):
            yield f"{path}, {side}", lambda path=path, extents=extents: step(path, *extents, small)
    for name, lift, from_memory in (
        ("R from memory", BackProjection(), True), ("Fira", Residual(), False), ("APOLLO", ChannelScaling(), False),
    ):  # fmt: skip
        for side, extents in (("left", (512, 1376)), ("right", (1376, 512))):
            yield f"{name}, {side}", lambda of=(lift, from_memory), extents=extents: method(*of, *extents, small)
    yield "a step in a CUDA graph", graph


def run(checks_of: Iterable[tuple[str, Check]]) -> int:
    """How many failed."""
    done = failed = 0
    for name, check in checks_of:
        start = time.perf_counter()
        try:
            found = check()
        except Unavailable as why:
            found = f"not run: {why}"
        except Exception as why:
            failed += 1
            found = f"FAILED: {type(why).__name__}: {why}"
            traceback.print_exc(limit=-4)
            if lost.is_lost(why):
                print(f"{name}: {found}\nthe GPU is lost to this process: the checks after this one are not run")
                return failed
        done += 1
        print(f"{name}: {found} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{done} checks on {DEVICE}, {failed} failed")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="sizes for a CPU, and for the sanitizers")
    parser.add_argument("--operators", action="store_true", help="csrc/ alone")
    parser.add_argument("--registered", action="store_true", help="only which operators have kernels")
    settings = parser.parse_args()
    if settings.registered:
        return 0 if registered() else 1
    steps = () if settings.operators else step_checks(settings.small)
    return 1 if run(itertools.chain(operator_checks(settings.small), steps)) else 0


if __name__ == "__main__":
    sys.exit(main())
