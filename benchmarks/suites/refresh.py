"""A new basis for one gradient, or for each one of a model in as many calls as there are chunks of equal
shape. On a GPU also the eigenproblem of a refresh alone, by each solver that csrc/ has for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import lowrank_kernels as lrk
from lowrank_kernels import range_finder
from lowrank_kernels.ops import parts

from .. import roofline, shapes, timing
from ..cases import Context, Selection, Unavailable, not_measured, require_room
from ..checks import WrongResult
from ..memory import peak_bytes
from ..records import OURS, Row, timed_rows
from ..roofline import OVERSAMPLE, POWER_ITERS

CHUNK_BYTES = 2**31
"""Of gradients in one call: what a randomized method allocates grows with it."""
CHECKED = (OURS, "PyTorch version")
"""Contenders that must reach the bars below; of the others it is recorded what they reach."""
ORTHONORMAL, ENERGY = 1e-5, 0.95
EIGENPROBLEMS = {24: 224, 40: 224, 72: 224, 136: 224, 264: 64, 520: 16, 1032: 4, 2056: 1}
"""l, and how many matrices (l, l) are solved in one call. l is r + 8 or 2r + 8, for ranks 16 to 1024. These
figures are what the table in csrc/cuda/eigensolvers.h can be set by."""
SOLVERS = {OURS: "auto", f"{OURS}, Jacobi": "jacobi", f"{OURS}, cuSOLVER": "cusolver"}
BACKWARD_ERROR = 1e-11
"""‖V·Λ·Vᵀ − A‖_F and ‖VᵀV − I‖_F at most, relative to ‖A‖_F and ‖I‖_F. In fp64 l·u is 2e-13 at l = 2056, and
Jacobi's shift is (2l + terms)·u."""


@dataclass(frozen=True)
class RefreshCase:
    model: str | tuple[int, int]
    rank: int
    dtype: torch.dtype = torch.float32
    spectrum: str = "1/i"
    """ "noise": Gaussian elements, a flat spectrum; "1/i": σᵢ falls so, over noise of a hundredth, which is
    steep."""

    @property
    def label(self) -> str:
        if isinstance(self.model, str):
            return f"refresh {self.model} r={self.rank} {shapes.dtype_name(self.dtype)}"
        return f"refresh {self.model[0]}x{self.model[1]} r={self.rank} {self.spectrum}"

    def chunks(self) -> list[tuple[int, int, int]]:
        """(count, rows, columns) of the gradients that go into one call; (1, rows, columns) for a single
        matrix."""
        found = []
        for left, rows, columns in [(1, *self.model)] if isinstance(self.model, tuple) else shapes.buckets(self.model):
            most = max(1, CHUNK_BYTES // (rows * columns * self.dtype.itemsize))
            while left:
                found.append((min(left, most), rows, columns))
                left -= found[-1][0]
        return found

    def work(self) -> roofline.Work:
        return roofline.over_buckets(self.chunks(), self.rank, lambda m, n, r: roofline.refresh(m, n, r, self.dtype))

    def sketch_bytes(self) -> int:
        """(m + n)·l·4 of the largest call: what a range finder needs at least, the fp32 sketches on both
        sides of G."""
        return max(count * (rows + n) * (self.rank + OVERSAMPLE) * 4 for count, rows, n in self.chunks())


@dataclass(frozen=True)
class EigenCase:
    """`batch` Gram matrices (l, l) in fp64, of Gaussian vectors of length 4·l."""

    l: int
    batch: int

    @property
    def label(self) -> str:
        return f"refresh eigenproblem {self.batch}x{self.l}x{self.l}"


def cases(selection: Selection, on_gpu: bool) -> list[RefreshCase | EigenCase]:
    if selection.explicit:
        return [RefreshCase(*each) for each in selection.combinations(("60m",), (128,), (torch.bfloat16 if on_gpu else torch.float32,))]
    if on_gpu:
        matrices = [RefreshCase((1024, 2736), 256), RefreshCase((4096, 11008), 128)]
        solved = {l: batch for l, batch in EIGENPROBLEMS.items() if not selection.quick or l in (40, 136)}
        model = RefreshCase("60m" if selection.quick else "7b", 128, torch.bfloat16)
        return [*matrices, model, *(EigenCase(l, batch) for l, batch in solved.items())]
    matrices = {(512, 1376): 128, (1024, 2736): 256} | ({} if selection.quick else {(2048, 5461): 512})
    found = [RefreshCase(shape, rank, spectrum=spectrum) for shape, rank in matrices.items() for spectrum in ("noise", "1/i")]
    return found if selection.quick else [*found, RefreshCase("28x512", 128)]


def contenders(grads: list[Tensor], rank: int, exact: bool) -> dict[str, Callable[[], list[Tensor]]]:
    """Each returns a basis (…, m, r) for each of the gradients (…, m, n). A full SVD only where `exact`: a
    model takes it an hour."""
    found = {
        OURS: lambda grad: lrk.ops.range_finder(grad, rank, oversample=OVERSAMPLE, power_iters=POWER_ITERS),
        "PyTorch version": lambda grad: pytorch_version(grad, rank),
        "torch.svd_lowrank": lambda grad: torch.svd_lowrank(grad.float(), q=rank, niter=POWER_ITERS),  # it takes no bf16
        "torch.linalg.svd": lambda grad: torch.linalg.svd(grad.float(), full_matrices=False),
    }
    if not exact:
        del found["torch.linalg.svd"]
    return {name: lambda find=find: [find(grad)[0][..., :rank] for grad in grads] for name, find in found.items()}


def pytorch_version(grad: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What runs where the extension is not built."""
    basis, sigma = range_finder.leading([grad], range_finder.peaks([grad]), rank, OVERSAMPLE, POWER_ITERS, 0)
    return (basis, sigma) if grad.dim() > 2 else (basis[0], sigma[0])


def make_gradients(case: RefreshCase, device: str) -> list[Tensor]:
    """(count, m, n) for each chunk, m ≤ n; of a model as it stores them, so transposed where rows are
    more."""
    generator = torch.Generator(device).manual_seed(0)
    grads = []
    for count, rows, columns in case.chunks():
        grad = torch.randn(count, rows, columns, generator=generator, device=device)
        if case.spectrum == "1/i":
            terms = min(rows, columns, 4 * case.rank)
            left = torch.randn(count, rows, terms, generator=generator, device=device) / torch.arange(1, terms + 1, device=device)
            grad = grad.mul_(0.01).baddbmm_(left, torch.randn(count, terms, columns, generator=generator, device=device))
        grad = grad.to(case.dtype)
        grad = grad[0] if isinstance(case.model, tuple) else grad
        grads.append(grad.mT if rows > columns else grad)
    return grads


def first(batch: Tensor) -> Tensor:
    """The first matrix of a batch (count, m, n), or the only one (m, n), in fp64."""
    return (batch[0] if batch.dim() > 2 else batch).double()


@torch.no_grad()
def best_energies(grads: list[Tensor], rank: int) -> list[Tensor]:
    """Σ_{i≤r} σᵢ² of the first matrix of each batch."""
    return [torch.linalg.eigvalsh(first(grad) @ first(grad).mT)[-rank:].sum() for grad in grads]


@torch.no_grad()
def check_bases(bases: list[Tensor], grads: list[Tensor], best: list[Tensor]) -> tuple[float, float]:
    """In fp64: the largest ‖PᵀP − I‖₂ of all bases, and the smallest ‖PᵀG‖²_F / `best` of the first one of
    each batch."""
    defects, energies = [], []
    for basis, grad, most in zip(bases, grads, best, strict=True):
        identity = torch.eye(basis.shape[-1], dtype=torch.float64, device=basis.device)
        defects.append(torch.linalg.matrix_norm(basis.double().mT @ basis.double() - identity, ord=2).max().item())
        energies.append(((first(basis).mT @ first(grad)).square().sum() / most).item())
    return max(defects), min(energies)


def run(case: RefreshCase | EigenCase, context: Context) -> list[Row]:
    return _eigenproblems(case, context) if isinstance(case, EigenCase) else _bases(case, context)


def _eigenproblems(case: EigenCase, context: Context) -> list[Row]:
    require_room(case.batch * case.l**2 * 8 * 12, context.on_gpu)
    generator = torch.Generator(context.device).manual_seed(0)
    terms = 4 * case.l
    vectors = torch.randn(case.batch, case.l, terms, dtype=torch.float64, generator=generator, device=context.device)
    gram = vectors @ vectors.mT
    runs = {name: lambda solver=solver: parts.eigh(gram, terms, solver) for name, solver in SOLVERS.items()}
    runs["torch.linalg.eigh"] = lambda: torch.linalg.eigh(gram)[::-1]
    errors: dict[str, float] = {}
    rest: list[Row] = []
    for name, solve in runs.items():
        try:
            if SOLVERS.get(name, "auto") != "auto" and not context.on_gpu:
                raise Unavailable("a CPU has LAPACK alone")
            with context.setting_up("refresh", name):
                errors[name] = _solved(gram, *solve())
        except Exception as why:
            rest.append(not_measured(case.label, name, why))
    if OURS not in errors:
        return rest
    timings = timing.interleave({name: runs[name] for name in errors}, context.on_gpu, context.measuring_s(), least_rounds=3)
    fields = {"suite": "refresh", "rank": case.l, "shapes": [(case.batch, case.l, case.l)]}
    rows = timed_rows(case.label, torch.float64, timings, {}, context.machine, **fields)
    return [row | {"defect": errors[row["contender"]]} for row in rows] + rest


def _solved(gram: Tensor, vectors: Tensor, values: Tensor) -> float:
    """The larger one of the two errors that BACKWARD_ERROR bounds. Raises WrongResult where it is above."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    orthogonal = (vectors.mT @ vectors - identity).norm() / (identity.norm() * len(gram) ** 0.5)
    residual = (vectors * values[..., None, :] @ vectors.mT - gram).norm() / gram.norm()
    error = max(orthogonal.item(), residual.item())
    if not error <= BACKWARD_ERROR:
        raise WrongResult(f"‖VΛVᵀ − A‖ or ‖VᵀV − I‖ is {error:.2g}; not timed")
    return error


def _bases(case: RefreshCase, context: Context) -> list[Row]:
    total = sum(count * rows * columns for count, rows, columns in case.chunks())
    require_room(total * case.dtype.itemsize + 6 * CHUNK_BYTES * isinstance(case.model, str), context.on_gpu)
    grads = make_gradients(case, context.device)
    best = best_energies(grads, case.rank)
    runs = contenders(grads, case.rank, exact=isinstance(case.model, tuple))
    found: dict[str, dict[str, float]] = {}
    rest: list[Row] = []
    for name, find in runs.items():
        try:
            with context.setting_up("refresh", name):
                found[name] = _weighed(name, find, grads, best, context.on_gpu)
        except Exception as why:
            rest.append(not_measured(case.label, name, why))
    if OURS not in found:
        return rest
    timings = timing.interleave({name: runs[name] for name in found}, context.on_gpu, context.measuring_s(), least_rounds=3)
    fields = {"suite": "refresh", "rank": case.rank, "shapes": case.chunks()}
    fields |= {"model": case.model} if isinstance(case.model, str) else {"spectrum": case.spectrum}
    rows = timed_rows(case.label, case.dtype, timings, {OURS: case.work()}, context.machine, **fields)
    rows = [row | found[row["contender"]] for row in rows]
    rows[0]["sketch_mb"] = case.sketch_bytes() / 1e6
    return rows + rest


def _weighed(name: str, find: Callable[[], list[Tensor]], grads: list[Tensor], best: list[Tensor], on_gpu: bool) -> dict[str, float]:
    """What the bases of a contender are like, and its peak; WrongResult where one of CHECKED does not reach
    the bars."""
    if on_gpu:
        find()  # the first call makes workspaces that stay
    bases, peak = peak_bytes(find, on_gpu)
    defect, energy = check_bases(bases, grads, best)
    if name in CHECKED and not (defect <= ORTHONORMAL and energy >= ENERGY):
        raise WrongResult(f"the basis has ‖PᵀP − I‖ = {defect:.2g} and energy {energy:.4g}; not timed")
    return {"captured_energy": energy, "defect": defect, "peak_mb": peak / 1e6}
