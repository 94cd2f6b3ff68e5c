"""Each part of a step alone, and whole steps by path, on one bucket of equal matrices: the time of the
device, without the host's.

On a GPU the Triton kernels: project, moments, back_project, then the whole step, split and in a single pass.
On a CPU the functions of backends/cpu.py: the same three, and its step. A case is checked on the first and
the last matrix of the bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_kernels import backends
from lowrank_kernels.backends import cpu, reference
from lowrank_kernels.storage import eight_bit

from .. import formulas, roofline, shapes, timing
from ..cases import Context, Selection, Unavailable, not_measured, require_room
from ..checks import MOMENT_ERROR, MOMENTS, SCALES, UPDATE_ERROR, decoded, exact_step, relative_error, require
from ..records import OURS, Row, timed_rows

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 2}
SCALE, DECAY = 0.25, 0.01
PARTS = ("project", "moments", "back_project")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest relative error of a part's result: sums of up to 2¹⁴ terms in fp32, or one rounding of a factor
(2⁻⁹) and one of the result."""


@dataclass(frozen=True)
class KernelCase:
    op: str
    count: int
    rows: int
    columns: int
    rank: int
    dtype: torch.dtype
    state_bits: int = 32

    @property
    def label(self) -> str:
        bits = " 8-bit states" if self.state_bits == 8 else ""
        return f"kernel {self.op} {self.count}x{self.rows}x{self.columns} r={self.rank} {shapes.dtype_name(self.dtype)}{bits}"

    @property
    def right(self) -> bool:
        return shapes.is_right(self.rows, self.columns)

    @property
    def extents(self) -> tuple[int, int, int]:
        """m, n, r."""
        m, n = sorted((self.rows, self.columns))
        return m, n, min(self.rank, m)

    def work(self) -> roofline.Work:
        forms = {"project": roofline.project, "back_project": roofline.back_project}
        if self.op in forms:
            found = forms[self.op](*self.extents, self.dtype)
        else:
            form = {"moments": roofline.moments, "split": roofline.split}.get(self.op, roofline.single_pass)
            found = form(*self.extents, self.dtype, self.state_bits)
        return tuple(cost * self.count for cost in found)

    def bytes_needed(self) -> int:
        """Twice the matrices and states, and two matrices in fp64 a few times over."""
        m, n, r = self.extents
        return 2 * self.count * (2 * m * n * self.dtype.itemsize + 16 * r * n) + 64 * m * n


class Bucket:
    """What a case works on. Moments, R and N as they are in the middle of a training."""

    def __init__(self, case: KernelCase, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        m, n, r = case.extents
        matrices, each = (case.rows, case.columns), range(case.count)
        self.case, self.right, self.device = case, case.right, device
        self.weights = [noise(*matrices).mul_(0.02).to(case.dtype) for _ in each]
        self.grads = [noise(*matrices).mul_(0.01).to(case.dtype) for _ in each]
        basis = torch.linalg.qr(noise(m, r))[0]
        self.bases = [(basis * noise(m, 1).sign()).to(case.dtype) for _ in each]  # another orthonormal one for each
        self.states = [self._state(noise(r, n).mul_(2e-3), noise(r, n).square_().mul_(1e-4)) for _ in each]
        self.projected = noise(case.count, r, n).mul_(0.01)
        self.normalised = noise(case.count, r, n).clamp_(-1, 1).to(case.dtype)
        self.steps = [torch.tensor(ADAM["step"] - 1.0, device=device) for _ in each]

    def _state(self, m: Tensor, v: Tensor) -> dict[str, Tensor]:
        if self.case.state_bits == 32:
            return dict(zip(MOMENTS, (m, v), strict=True))
        codes = [torch.empty_like(m, dtype=torch.uint8) for _ in MOMENTS]
        scales = [torch.empty(eight_bit.scales_shape(m.shape), device=m.device) for _ in SCALES]
        eight_bit.encode_(m, v, *codes, *scales, step=ADAM["step"] - 1)
        return dict(zip((*MOMENTS, *SCALES), (*codes, *scales), strict=True))

    def all(self, key: str) -> list[Tensor]:
        return [state[key] for state in self.states]

    def step(self, run: Callable[..., None], lr: float) -> None:
        run(*self.inputs(lr))

    def inputs(self, lr: float) -> tuple[backends.Bucket, backends.Hyper]:
        hyper = {"lr": lr, "scale": SCALE, "weight_decay": DECAY, "right": self.right}
        lists = self.weights, self.grads, self.bases, self.all("exp_avg"), self.all("exp_avg_sq")
        return formulas.bucket_of(*lists, **ADAM, **hyper, device_steps=self.steps, **self.scales())

    def scales(self) -> dict[str, list[Tensor]]:
        """exp_avg_scales and exp_avg_sq_scales, where there are any."""
        return {f"{key}s": self.all(key) for key in SCALES} if self.case.state_bits == 8 else {}


Run = Callable[[float], object]
"""One call of an operation at a learning rate: returns R or N, or moves weights and states."""


def cpu_runs(bucket: Bucket) -> Run:
    """backends/cpu.py."""
    b, moments = bucket, (bucket.all("exp_avg"), bucket.all("exp_avg_sq"))
    adam = {name: value for name, value in ADAM.items() if name != "step"}
    back = {"scale": SCALE, "weight_decay": DECAY, "right": b.right}
    return {
        "project": lambda lr: cpu.project(b.bases, b.grads, b.right),
        "moments": lambda lr: cpu.update_moments_(*moments, list(b.projected.unbind()), **adam, device_steps=b.steps),
        "back_project": lambda lr: cpu.back_project_(b.weights, b.bases, b.normalised, lr=lr, **back),
        "step": lambda lr: b.step(cpu.step, lr),
    }[b.case.op]


def triton_runs(bucket: Bucket) -> Run:
    """The launches of backends/triton/, with a pointer table made beforehand."""
    from lowrank_kernels.backends.triton import back_project, moments, project, single_pass, split, table
    from lowrank_kernels.backends.triton.configs import SinglePassConfig

    made, hyper = bucket.inputs(0.0)
    if bucket.case.op == "moments":
        made = replace(made, grads=None, projected=list(bucket.projected.unbind()))
    rows, out = table.rows_of(made), torch.empty_like(bucket.normalised)
    row = single_pass.row_for(made, rows.aligned)
    of_split = None if isinstance(row, SinglePassConfig) else row
    if bucket.case.op == "single_pass" and not isinstance(row, SinglePassConfig):
        raise Unavailable("no tiles for this bucket, or too few programs to fill the device: the optimizer splits the step")

    def launched_moments(lr: float) -> Tensor:
        moments.launch(made, hyper, rows, out)
        return out

    return {
        "project": lambda lr: project.launch(made, rows),
        "moments": launched_moments,
        "back_project": lambda lr: back_project.launch(made, replace(hyper, lr=lr), rows, bucket.normalised),
        "split": lambda lr: split.step(made, replace(hyper, lr=lr), rows, of_split),
        "single_pass": lambda lr: single_pass.step(made, replace(hyper, lr=lr), rows, row),
    }[bucket.case.op]


def in_pytorch(bucket: Bucket) -> Run:
    """reference.py, one matrix after another."""
    b, each = bucket, range(bucket.case.count)
    back = {"scale": SCALE, "weight_decay": DECAY, "right": b.right}
    moments = (b.all("exp_avg"), b.all("exp_avg_sq"))

    def step(lr: float) -> None:
        b.step(reference.step, lr)

    return {
        "project": lambda lr: [reference.project(b.bases[i], b.grads[i], b.right) for i in each],
        "moments": lambda lr: [formulas.update_moments_(moments[0][i], moments[1][i], b.projected[i], **ADAM) for i in each],
        "back_project": lambda lr: [formulas.back_project_(b.weights[i], b.bases[i], b.normalised[i], lr=lr, **back) for i in each],
    }.get(b.case.op, step)


def native_products(bucket: Bucket) -> Run:
    """The same with the two products in the weights' dtype, as PyTorch's own libraries do them best."""
    b, each = bucket, range(bucket.case.count)

    def project(i: int) -> Tensor:
        return b.bases[i].mT @ reference.orient(b.grads[i], b.right)

    def back_project(i: int, normalised: Tensor, lr: float) -> None:
        left, right = (normalised.mT, b.bases[i].mT) if b.right else (b.bases[i], normalised)
        b.weights[i].addmm_(left, right, beta=1 - lr * DECAY, alpha=-lr * SCALE)

    def step(lr: float) -> None:
        for i in each:
            normalised = formulas.update_moments_(b.states[i]["exp_avg"], b.states[i]["exp_avg_sq"], project(i).float(), **ADAM)
            back_project(i, normalised.to(b.case.dtype), lr)

    if b.case.op == "moments" or b.case.state_bits == 8:
        raise Unavailable("there is no product in it" if b.case.op == "moments" else "its moments are in fp32")
    return {
        "project": lambda lr: [project(i) for i in each],
        "back_project": lambda lr: [back_project(i, b.normalised[i], lr) for i in each],
    }.get(b.case.op, step)


def check(bucket: Bucket, run: Run) -> float:
    """The largest relative error of the first and the last matrix against fp64; WrongResult where it is too
    large."""
    case, chosen = bucket.case, (0, bucket.case.count - 1)
    before = [bucket.weights[i].double() for i in chosen]
    states = [{key: value.clone() for key, value in bucket.states[i].items()} for i in chosen]
    result = run(1.0)  # so that the update is not lost in the weight's rounding
    errors = []
    for i, weight, state in zip(chosen, before, states, strict=True):
        basis, grad, moved = bucket.bases[i].double(), bucket.grads[i].double(), bucket.weights[i].double()
        if case.op == "project":
            errors.append(require("R", relative_error(result[i], reference.project(basis, grad, bucket.right)), ROUNDING[case.dtype]))
        elif case.op == "moments":
            m, v = decoded(state)
            exact = formulas.update_moments_(m, v, bucket.projected[i].double(), **ADAM)
            errors.append(require("N", relative_error(result[i], exact), ROUNDING[case.dtype]))
            for name, found, truth in zip("MV", decoded(bucket.states[i]), (m, v), strict=True):
                require(name, relative_error(found, truth), ROUNDING[torch.float32])
        elif case.op == "back_project":
            exact = weight.clone()
            back = {"lr": 1.0, "scale": SCALE, "weight_decay": DECAY, "right": bucket.right}
            formulas.back_project_(exact, basis, bucket.normalised[i].double(), **back)
            errors.append(require("ΔW", relative_error(moved - weight, exact - weight), ROUNDING[case.dtype]))
        else:
            exact, moments = exact_step(weight, grad, state | {"basis": basis}, step=ADAM["step"], lr=1.0, scale=SCALE, decay=DECAY)
            errors.append(require("ΔW", relative_error(moved - weight, exact - weight), UPDATE_ERROR[case.dtype]))
            for name, found, truth in zip("MV", decoded(bucket.states[i]), moments, strict=True):
                require(name, relative_error(found, truth), MOMENT_ERROR[case.state_bits][case.dtype])
    return max(errors)


def cases(selection: Selection, on_gpu: bool) -> list[KernelCase]:
    paths = [(path, bits) for path in (("split", "single_pass") if on_gpu else ("step",)) for bits in (32, 8)]
    found = []
    for count, rows, columns, rank, dtype, with_parts in _buckets(selection, on_gpu):
        ops = [*((part, 32) for part in PARTS if with_parts), *paths]
        found += [KernelCase(op, count, rows, columns, rank, dtype, bits) for op, bits in ops]
    return found


def _buckets(selection: Selection, on_gpu: bool) -> Iterator[tuple[int, int, int, int, torch.dtype, bool]]:
    """(count, rows, columns, rank, dtype, whether the parts are timed too)."""
    half, single = torch.bfloat16, torch.float32
    if selection.explicit:
        for model, rank, dtype in selection.combinations(("60m",), (128,), (half,)):
            yield from ((*bucket, rank, dtype, True) for bucket in shapes.buckets(model))
    elif not on_gpu:
        yield 8, 512, 1376, 128, half, True
        yield 16, 1376, 512, 128, single, True
    elif selection.quick:
        yield 32, 4096, 11008, 128, half, True
    else:
        yield from ((32, 4096, 11008, rank, half, rank in (128, 512)) for rank in shapes.RANKS)
        yield 64, 11008, 4096, 128, half, True
        yield 96, 512, 512, 128, half, False
        yield 24, 1024, 2736, 256, single, True


def run(case: KernelCase, context: Context) -> list[Row]:
    require_room(case.bytes_needed(), context.on_gpu)
    bucket = Bucket(case, context.device)
    implementations = {
        OURS: triton_runs if context.on_gpu else cpu_runs,
        "formulas in PyTorch": in_pytorch,
        "native products": native_products,
    }
    runs: dict[str, Callable[[], object]] = {}
    rest: list[Row] = []
    with torch.no_grad():
        for name, build in implementations.items():
            try:
                with context.setting_up("kernel", name):
                    once = build(bucket)
                    if name == OURS:
                        error = check(bucket, once)
                    else:
                        once(1e-6)
                runs[name] = lambda once=once: once(1e-6)
            except Exception as why:
                rest.append(not_measured(case.label, name, why))
                if name == OURS:
                    return rest
        timings = timing.interleave(runs, context.on_gpu, context.measuring_s(), device_only=context.on_gpu)
    fields = {"suite": "kernel", "op": case.op, "rank": case.rank, "state_bits": case.state_bits}
    fields |= {"shapes": [(case.count, case.rows, case.columns)], "side": "right" if case.right else "left"}
    rows = timed_rows(case.label, case.dtype, timings, dict.fromkeys(runs, case.work()), context.machine, **fields)
    rows[0]["error"] = error
    return rows + rest
