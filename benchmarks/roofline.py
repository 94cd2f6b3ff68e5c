"""What the work costs, and how long it must take: a static model, no measurement.

    time = Σ over launches of max(bytes / copy bandwidth, flops / matmul rate, L2 bytes / L2 bandwidth where
    that is known)

    python -m benchmarks.roofline --model 7b --rank 128 256        # predicted on an H100
    python -m benchmarks.roofline --model 60m --results FILE       # from the ceilings of a results file

Assumptions. Within a launch memory, tensor cores and L2 work at the same time, each at its ceiling. Launches
follow one another. Launches and latencies cost nothing. A launch passes each of its tensors between memory
and chip once. Elementwise flops cost nothing. L2 bytes are those that other programs of the launch read
again. An element of G, W, P has b bytes, a moment has 4 (or 1, and 4 for every 64), R has 4, and N between
launches has b.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import shapes
from .provenance import print_table, short

OVERSAMPLE, POWER_ITERS = 8, 1
"""The arguments that the refresh suite passes to every randomized method."""
BLOCK_N = {256: 128}
"""Columns of R that one program of the single pass owns, by the largest rank at which that many fit on an
H100's chip. Above the last rank none fit."""
TILE, RANK_TILE = 128, 256
"""A product alone has tiles of 128 columns of R over at most 256 directions, or of 128 × 128 of W. Only L2
bytes depend on these."""


@dataclass(frozen=True)
class Cost:
    """bytes_moved: to and from memory. l2_bytes: read again from the L2 cache."""

    bytes_moved: float = 0
    flops: float = 0
    l2_bytes: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes_moved + other.bytes_moved, self.flops + other.flops, self.l2_bytes + other.l2_bytes)

    def __mul__(self, count: int) -> Cost:
        return Cost(self.bytes_moved * count, self.flops * count, self.l2_bytes * count)


Work = tuple[Cost, ...]
"""Launches that run one after another."""


def total(work: Work) -> Cost:
    return sum(work, Cost())


@dataclass(frozen=True)
class Machine:
    """The rates that costs are divided by. A dtype without a rate has no prediction."""

    name: str
    copy_gb_per_s: float
    matmul_tflop_per_s: Mapping[torch.dtype, float]
    l2_gb_per_s: float | None = None

    @classmethod
    def measured(cls, row: Mapping[str, object], on_gpu: bool) -> Machine:
        """The machine from the ceilings in a result's row. On a GPU 16-bit products run at the rate of bf16.
        On a CPU fp16 is multiplied in fp32, and bf16 too if that is faster."""
        rates = {torch.float32: row.get("matmul_tflop_per_s_float32"), torch.bfloat16: row.get("matmul_tflop_per_s_bfloat16")}
        if rates[torch.bfloat16] and rates[torch.float32]:
            rates[torch.bfloat16] = max(rates.values())
        rates[torch.float16] = rates[torch.bfloat16 if on_gpu else torch.float32]
        return cls(str(row.get("device", "measured")), row["copy_gb_per_s"], {dtype: rate for dtype, rate in rates.items() if rate})

    def times_ms(self, cost: Cost, dtype: torch.dtype) -> dict[str, float]:
        """The time of each resource alone, in ms. Empty if there is something to multiply and the rate of
        `dtype` is not known."""
        if cost.flops and dtype not in self.matmul_tflop_per_s:
            return {}
        times = {"memory": cost.bytes_moved / self.copy_gb_per_s / 1e6}
        times["matmul"] = cost.flops / self.matmul_tflop_per_s[dtype] / 1e9 if cost.flops else 0.0
        if self.l2_gb_per_s:
            times["L2"] = cost.l2_bytes / self.l2_gb_per_s / 1e6
        return times

    def predicted_ms(self, work: Work, dtype: torch.dtype) -> float | None:
        times = [self.times_ms(cost, dtype) for cost in work]
        return sum(max(each.values()) for each in times) if all(times) else None


GPUS = {
    "h100": Machine("NVIDIA H100", 3000, {torch.bfloat16: 800, torch.float16: 800, torch.float32: 66.9}, 7000),
}
"""An H100. The rates of copy and bf16 were measured on one; the fp32 rate is from the data sheet (no tf32).
The L2 rate is a guess: with it, the re-reads of P at r = 256 with 64 columns a program take as long as the
reads from memory."""


# One matrix: G' (m, n) is projected on r directions of its side m. `dtype` is that of W, G and P.


def moments_bytes(n: int, r: int, state_bits: int = 32) -> int:
    """Bytes of M and V as stored: fp32, or a byte an element and an fp32 scale for every 64 along n."""
    return 8 * r * n if state_bits == 32 else 2 * r * (n + 4 * -(-n // 64))


def project(m: int, n: int, r: int, dtype: torch.dtype) -> Work:
    """R = PᵀG': reads P and G, writes R. P is read again for each tile of columns, G for each tile of
    directions."""
    grad, basis = m * n * dtype.itemsize, m * r * dtype.itemsize
    again = _again(n, TILE) * basis + _again(r, RANK_TILE) * grad
    return (Cost(basis + grad + 4 * r * n, 2 * m * n * r, again),)


def moments(m: int, n: int, r: int, dtype: torch.dtype, state_bits: int = 32) -> Work:
    """Reads R, reads and writes M and V, writes N."""
    return (Cost(4 * r * n + 2 * moments_bytes(n, r, state_bits) + r * n * dtype.itemsize),)


def back_project(m: int, n: int, r: int, dtype: torch.dtype) -> Work:
    """W' = … − lr·α·P·N: reads P and N, reads and writes W. P is read again for each tile of columns, N for
    each tile of rows."""
    weight, basis, normalised = (size * dtype.itemsize for size in (m * n, m * r, r * n))
    again = _again(n, TILE) * basis + _again(m, TILE) * normalised
    return (Cost(2 * weight + basis + normalised, 2 * m * n * r, again),)


def single_pass(m: int, n: int, r: int, dtype: torch.dtype, state_bits: int = 32) -> Work:
    """A whole step in which R and N stay on the chip. No implementation can move less. Every program reads P
    twice."""
    weight, basis = m * n * dtype.itemsize, m * r * dtype.itemsize
    block_n = next((block for rank, block in BLOCK_N.items() if r <= rank), min(BLOCK_N.values()))
    return (Cost(3 * weight + basis + 2 * moments_bytes(n, r, state_bits), 4 * m * n * r, basis * (2 * _again(n, block_n) + 1)),)


def project_moments(m: int, n: int, r: int, dtype: torch.dtype, state_bits: int = 32) -> Work:
    """R = PᵀG' with the moments in the epilogue: reads P and G, reads and writes M and V, writes N."""
    (alone,) = project(m, n, r, dtype)
    moved = 2 * moments_bytes(n, r, state_bits) + r * n * (dtype.itemsize - 4)
    return (replace(alone, bytes_moved=alone.bytes_moved + moved),)


def split(m: int, n: int, r: int, dtype: torch.dtype, state_bits: int = 32) -> Work:
    """Two launches. N goes through memory between them."""
    return project_moments(m, n, r, dtype, state_bits) + back_project(m, n, r, dtype)


def residual(m: int, n: int, r: int, dtype: torch.dtype, state_bits: int = 32) -> Work:
    """Fira's step, in three launches; a sum and the limiter, of m / 64 numbers a column and fewer, are not
    counted. R goes through memory too. Two launches more read G, P and R: one for the residual's norm, one
    that moves W."""
    matrix, basis, projected = (size * dtype.itemsize for size in (m * n, m * r, r * n))
    (first,) = project_moments(m, n, r, dtype, state_bits)
    again = _again(n, TILE) * basis + _again(m, TILE) * projected
    norm = Cost(matrix + basis + projected, 2 * m * n * r, again)
    moved = Cost(3 * matrix + basis + 2 * projected, 2 * m * n * r, again + _again(m, TILE) * projected)
    return (replace(first, bytes_moved=first.bytes_moved + projected), norm, moved)


def scaling(m: int, n: int, r: int, dtype: torch.dtype, state_bits: int = 32) -> Work:
    """APOLLO's step: R and N stay on the chip; a second launch reads G, and reads and writes W."""
    (first,) = project_moments(m, n, r, dtype, state_bits)
    return (replace(first, bytes_moved=first.bytes_moved - r * n * dtype.itemsize), Cost(3 * m * n * dtype.itemsize))


def adamw(m: int, n: int, dtype: torch.dtype, state_bytes: float) -> Work:
    """Full-rank AdamW: reads G, reads and writes W and two states of `state_bytes` an element."""
    return (Cost(m * n * (3 * dtype.itemsize + 4 * state_bytes)),)


def refresh(m: int, n: int, r: int, dtype: torch.dtype) -> Work:
    """The products of a randomized range finder with G: two, and two more for each power iteration, on l = r
    + oversample columns.

    Each reads G and, in fp32, the sketch on the other side, and writes its own sketch. Orthonormalisation,
    O(l²·(m + n)), is not counted.
    """
    l = min(r + OVERSAMPLE, m, n)
    return (Cost(m * n * dtype.itemsize + 4 * (m + n) * l, 2 * m * n * l),) * (2 + 2 * POWER_ITERS)


def _again(size: int, tile: int) -> int:
    """How often programs read something beyond the first time, if each of them owns `tile` of `size`."""
    return -(-size // tile) - 1


# An iteration of linear layers, y = x·Wᵀ on T tokens with W (out, in), in x's dtype. Also the work around
# them in a LLaMA block.


def product(rows: int, inner: int, columns: int, dtype: torch.dtype) -> Work:
    """(rows, inner) · (inner, columns): each matrix moves between memory and chip once."""
    return (Cost((rows * inner + inner * columns + rows * columns) * dtype.itemsize, 2 * rows * inner * columns),)


def forward_and_dx(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> Work:
    """y = x·Wᵀ and dx = dy·W."""
    return product(tokens, inputs, outputs, dtype) + product(tokens, outputs, inputs, dtype)


def weight_gradient(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> Work:
    """dW = dyᵀ·x."""
    return product(outputs, tokens, inputs, dtype)


def coordinates_gradient(tokens: int, outputs: int, r: int, dtype: torch.dtype) -> Work:
    """dB = Zᵀ·dy."""
    return product(r, tokens, outputs, dtype)


def subspace_step(inputs: int, outputs: int, r: int, dtype: torch.dtype) -> Work:
    """RSO's step, where N stays on the chip: reads dB and P, reads and writes W, M and V."""
    moved = (r * outputs + inputs * r + 2 * inputs * outputs) * dtype.itemsize
    return (Cost(moved + 2 * moments_bytes(outputs, r), 2 * inputs * outputs * r),)


def causal_attention(tokens: int, sequence: int, hidden: int, dtype: torch.dtype) -> Work:
    """softmax(QKᵀ)·V and its gradients, without what a backward pass computes again. There are two products
    and four, and half of each is masked.

    The forward pass reads Q, K, V and writes y. The backward pass reads these and dy and writes three
    gradients.
    """
    size, flops = tokens * hidden * dtype.itemsize, tokens * sequence * hidden
    return Cost(4 * size, 2 * flops), Cost(8 * size, 4 * flops)


# A whole model.


WorkOf = Callable[[int, int, int], Work]
"""The work for one matrix, as a function of (m, n, r)."""


def over_model(model: str, rank: int, work_of: WorkOf) -> Work:
    """The work for a model's projected weights, bucket by bucket. Each bucket has the launches of one
    matrix."""
    return over_buckets(shapes.buckets(model), rank, work_of)


def over_buckets(buckets: list[tuple[int, int, int]], rank: int, work_of: WorkOf) -> Work:
    """As over_model, for (count, rows, columns)."""
    found = []
    for count, *shape in buckets:
        m, n = sorted(shape)
        found += [cost * count for cost in work_of(m, n, min(rank, m))]
    return tuple(found)


def state_bytes(shape: tuple[int, int], rank: int, dtype: torch.dtype, state_bits: int = 32) -> int:
    """Bytes of the state of one parameter in a low-rank group: moments, a basis of its dtype, and the count
    of updates."""
    m, n = sorted(shape)
    rank = min(rank, m)
    return moments_bytes(n, rank, state_bits) + m * rank * dtype.itemsize + 4


def works(model: str, rank: int, dtype: torch.dtype) -> dict[str, Work]:
    """Everything that this cost model knows, by name. There is no single pass above the rank that fits a
    chip."""
    forms: dict[str, WorkOf] = {
        "project": lambda m, n, r: project(m, n, r, dtype),
        "moments": lambda m, n, r: moments(m, n, r, dtype),
        "back-project": lambda m, n, r: back_project(m, n, r, dtype),
    }
    for bits, name in ((32, ""), (8, ", 8-bit states")):
        forms[f"step, split{name}"] = lambda m, n, r, bits=bits: split(m, n, r, dtype, bits)
        if rank <= max(BLOCK_N):
            forms[f"step, single pass{name}"] = lambda m, n, r, bits=bits: single_pass(m, n, r, dtype, bits)
        forms[f"step of Fira{name}"] = lambda m, n, r, bits=bits: residual(m, n, r, dtype, bits)
        forms[f"step of APOLLO{name}"] = lambda m, n, r, bits=bits: scaling(m, n, r, dtype, bits)
    for size in dict.fromkeys((dtype.itemsize, 4)):
        forms[f"AdamW fused, {size}-byte states"] = lambda m, n, r, size=size: adamw(m, n, dtype, size)
    forms["AdamW, 8-bit states"] = lambda m, n, r: adamw(m, n, dtype, 1 + 4 / 256)
    forms["refresh"] = lambda m, n, r: refresh(m, n, r, dtype)
    return {name: over_model(model, rank, work_of) for name, work_of in forms.items()}


def print_predictions(model: str, rank: int, dtype: torch.dtype, machine: Machine) -> None:
    lines = []
    for name, work in works(model, rank, dtype).items():
        cost, predicted = total(work), machine.predicted_ms(work, dtype)
        times = machine.times_ms(cost, dtype)
        sizes = [f"{part / 1e9:.4g}" for part in (cost.bytes_moved, cost.l2_bytes, cost.flops)]
        alone = [short(times[key]) if key in times else "–" for key in ("memory", "matmul", "L2")]
        verdict = ("–", "no matmul rate") if predicted is None else (short(predicted), max(times, key=times.get))
        lines.append((name, *sizes, *alone, *verdict))
    title = f"PREDICTED, not measured: {model}, r = {rank}, {shapes.dtype_name(dtype)}, on {machine.name}"
    print_table(("", "GB", "L2 GB", "GFLOP", "ms memory", "ms matmul", "ms L2", "predicted ms", "mostly"), lines, title=title, rules=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=["7b"], help=f"{', '.join(shapes.LLAMA)}, or like 28x512 (default 7b)")
    parser.add_argument("--rank", nargs="+", type=int, default=list(shapes.RANKS))
    parser.add_argument("--dtype", nargs="+", choices=shapes.DTYPES, default=["bf16"])
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="whose figures to divide by")
    parser.add_argument("--results", type=Path, help="a results file, whose measured ceilings are taken instead")
    parser.add_argument("--l2-gb-per-s", type=float, help="another L2 rate; 0 leaves L2 out")
    settings = parser.parse_args(arguments)
    machine = GPUS[settings.gpu]
    if settings.results:
        row = json.loads(settings.results.read_text().splitlines()[-1])
        machine = Machine.measured(row, on_gpu=not str(row["device"]).startswith("cpu"))
    if settings.l2_gb_per_s is not None:
        machine = replace(machine, l2_gb_per_s=settings.l2_gb_per_s or None)
    l2 = f", L2 {machine.l2_gb_per_s:g} GB/s" if machine.l2_gb_per_s else ""
    rates = ", ".join(f"{shapes.dtype_name(dtype)} {rate:.3g}" for dtype, rate in machine.matmul_tflop_per_s.items())
    print(f"{machine.name}: copy {machine.copy_gb_per_s:.4g} GB/s{l2}, matmul TFLOP/s: {rates}")
    for model in settings.model:
        for rank in settings.rank:
            for dtype in settings.dtype:
                print_predictions(model, rank, shapes.DTYPES[dtype], machine)


if __name__ == "__main__":
    main()
