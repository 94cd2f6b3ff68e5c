"""What training on many GPUs sends, and holds, by formula.

    python -m benchmarks.scale                       # LLaMA 7B and 70B on 8 to 1024 GPUs
    python -m benchmarks.scale --between 25 --rank 512
    python -m benchmarks.scale --check               # counts what two processes on this machine send

This is a simulation. Bytes follow from the shapes. Times are bytes over the bandwidths that are given, with a
latency for each message, and nothing else: no computation, no overlap, no contention. No GPU was measured.

A ring sends (N − 1)·x bytes for an all-gather of pieces of x bytes, and (N − 1)/N·x for a reduce-scatter or
an all-to-all of x bytes; an all-reduce is a reduce-scatter and an all-gather.

What is compared, all with weights and gradients in bf16, and R, N and moments in fp32:

    AdamW              FSDP2, moments in fp32
    GaLore, copies     what a peer without sharding does: every process holds all, gradients are all-reduced
    GaLore, gathered   a peer under FSDP2: every gradient is gathered in every process, at each step
    std                ours, on the shorter side: cut along m, R and N are sent; cut along n, nothing
    unsharded          ours, on the side by which a step sends nothing
    RSO                FSDP2, weights without gradients
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, int]
WEIGHT, MOMENT, R = 2, 4, 4
"""Bytes of an element of weights, gradients and bases; of moments; and of R and N."""


@dataclass(frozen=True)
class Model:
    """matrices: of one decoder layer, (rows, columns). dense: elements of embedding, head and norms."""

    matrices: tuple[Shape, ...]
    layers: int
    dense: int
    rank: int

    @property
    def elements(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.matrices)


def llama(hidden: int, intermediate: int, layers: int, of_keys: int, vocabulary: int = 32000) -> Model:
    attention = ((hidden, hidden), (of_keys, hidden), (of_keys, hidden), (hidden, hidden))
    mlp = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    return Model((*attention, *mlp), layers, 2 * vocabulary * hidden + (2 * layers + 1) * hidden, hidden // 4)


MODELS = {"7b": llama(4096, 11008, 32, 4096), "70b": llama(8192, 28672, 80, 1024)}
METHODS = ("AdamW", "GaLore, copies", "GaLore, gathered", "std", "unsharded", "RSO")


@dataclass(frozen=True)
class Message:
    """One collective: its name, the bytes that a process gives to it, and how many there are a step."""

    collective: str
    given: float
    count: float = 1

    def sent(self, processes: int) -> float:
        """Bytes that a process of a ring sends."""
        factor = {
            "all_gather": processes - 1,
            "reduce_scatter": (processes - 1) / processes,
            "all_to_all": (processes - 1) / processes,
            "all_reduce": 2 * (processes - 1) / processes,
        }
        return factor[self.collective] * self.given * self.count


def is_left(shape: Shape, side: str) -> bool:
    """Whether the left side of a matrix is projected, whose rows FSDP2 cuts: the cut then goes along m."""
    return side == "std" and shape[0] < shape[1]


def piece(length: int, processes: int) -> int:
    return math.ceil(length / processes)


def of_fsdp(elements: float, processes: int, gathers: int, element: int = WEIGHT, has_gradient: bool = True) -> list[Message]:
    """FSDP2's own messages for parameters of so many elements. gathers: how often they are brought together,
    in the forward pass and before the backward pass."""
    local = math.ceil(elements / processes) * element
    return [Message("all_gather", local, gathers)] + [Message("reduce_scatter", local * processes)] * has_gradient


def of_step(shape: Shape, rank: int, processes: int, side: str, count: int = 1) -> list[Message]:
    """Our messages for `count` matrices of a bucket, in a step without a refresh."""
    if not is_left(shape, side):
        return []
    columns = count * min(rank, *shape) * piece(shape[1], processes) * R
    return [Message("reduce_scatter", columns * processes), Message("all_gather", columns)]


def of_refresh(shape: Shape, rank: int, processes: int, side: str, count: int = 1, element: int = WEIGHT) -> list[Message]:
    """Our messages for the refresh of `count` matrices: each piece goes to the process that chooses the basis
    of its matrix. Rows of the bases come back, and are gathered where the cut goes along n."""
    (rows, columns), rank = shape, min(rank, *shape)
    owned = math.ceil(count / processes)
    gather = Message("all_to_all", count * piece(rows, processes) * columns * element)
    m = rows if is_left(shape, side) else columns
    found = [gather, Message("all_to_all", owned * m * rank * element), Message("all_gather", owned * 4)]
    if not is_left(shape, side):
        found.append(Message("all_gather", count * piece(m, processes) * rank * element))
    return found


def of_gram(shape: Shape, processes: int) -> list[Message]:
    """The alternative by thin sums: the Gram matrix of the short side in fp64, all-reduced. The cut must go
    along the long side, or an all-to-all turns it."""
    rows, columns = shape
    turn = [Message("all_to_all", piece(rows, processes) * columns * WEIGHT)] if rows < columns else []
    return [*turn, Message("all_reduce", 8 * min(shape) ** 2)]


def of_sketch(shape: Shape, rank: int, passes: int = 8) -> list[Message]:
    """The alternative of a range finder on pieces: each pass all-reduces short × l elements in fp32."""
    return [Message("all_reduce", 4 * min(shape) * (min(rank, *shape) + 8), passes)]


def messages(model: Model, method: str, processes: int) -> list[Message]:
    """Of a step without a refresh."""
    if method == "GaLore, copies":
        return [Message("all_reduce", (model.elements + model.dense) * WEIGHT)]
    found = of_fsdp(model.dense, processes, gathers=1)
    if method == "RSO":
        coordinates = model.layers * sum(model.rank * rows for rows, _ in model.matrices)
        return found + of_fsdp(model.elements, processes, 2, has_gradient=False) + of_fsdp(coordinates, processes, 2)
    found += of_fsdp(model.elements, processes, gathers=2)
    if method == "GaLore, gathered":
        found.append(Message("all_gather", math.ceil(model.elements / processes) * WEIGHT))
    if method in ("std", "unsharded"):
        found += [each for shape, count in _buckets(model) for each in of_step(shape, model.rank, processes, method, count)]
    return found


def refresh_messages(model: Model, method: str, processes: int) -> list[Message]:
    if method not in ("std", "unsharded"):  # the others have the whole gradient in each process already, or need none
        return []
    return [each for shape, count in _buckets(model) for each in of_refresh(shape, model.rank, processes, method, count)]


def refresh_ways(model: Model, processes: int) -> dict[str, list[Message]]:
    """The messages of a refresh of all bases, by what could be done."""

    def each_matrix(of: Callable[[Shape], list[Message]]) -> list[Message]:
        return [replace(each, count=each.count * count) for shape, count in _buckets(model) for each in of(shape)]

    return {
        "ours: each matrix to one process": refresh_messages(model, "std", processes),
        "Gram matrices, all-reduced": each_matrix(lambda shape: of_gram(shape, processes)),
        "thin products, all-reduced": each_matrix(lambda shape: of_sketch(shape, model.rank)),
        "whole gradients in each process": [Message("all_gather", math.ceil(model.elements / processes) * WEIGHT)],
    }


def _buckets(model: Model) -> Iterable[tuple[Shape, int]]:
    return ((shape, count * model.layers) for shape, count in Counter(model.matrices).items())


def held(model: Model, method: str, processes: int) -> float:
    """Bytes of weights, gradients and optimizer state in one process, activations and what is gathered for a
    moment left out."""
    parts = 1 if method == "GaLore, copies" else processes
    dense = (2 * WEIGHT + 2 * MOMENT) * model.dense / parts
    if method == "AdamW":
        return dense + (2 * WEIGHT + 2 * MOMENT) * model.elements / parts
    total = dense
    for rows, columns in model.matrices:
        if method == "RSO":
            coordinates = model.rank * rows
            total += model.layers * (WEIGHT * rows * columns + (2 * WEIGHT + 2 * MOMENT) * coordinates) / parts
            continue
        left = is_left((rows, columns), method) if method in ("std", "unsharded") else rows < columns
        (m, n), rank = (rows, columns) if left else (columns, rows), min(model.rank, rows, columns)
        basis = WEIGHT * m * rank / (parts if left and method == "std" else 1)
        moments = 2 * MOMENT * rank * n / (parts if method in ("std", "unsharded") else 1)
        total += model.layers * (2 * WEIGHT * rows * columns / parts + basis + moments)
    if method == "RSO":  # one P for q, k and v, for gate and up
        total += (
            WEIGHT * model.rank * model.layers * sum(columns for _, columns in (model.matrices[0], *model.matrices[3:5], model.matrices[6]))
        )
    return total


def seconds(sent: float, count: float, processes: int, args: argparse.Namespace) -> float:
    bandwidth = args.within if processes <= args.node else args.between
    return sent / (bandwidth * 1e9) + count * args.latency * 1e-6


def report(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 130)
    print(__doc__.split("\n\n")[2].replace("\n", " "))
    print(f"Given: {args.within:g} GB/s a GPU within {args.node} GPUs, {args.between:g} GB/s beyond, {args.latency:g} µs a message.")
    for name in args.models:
        model = MODELS[name] if args.rank is None else replace(MODELS[name], rank=args.rank)
        table = Table(
            title=f"LLaMA {name.upper()}, rank {model.rank}, refresh every {args.gap} steps: GB sent a step / ms to send / GB held"
        )
        table.add_column("")
        for processes in args.gpus:
            table.add_column(f"{processes} GPUs", justify="right")
        for method in METHODS:
            cells = []
            for processes in args.gpus:
                step, refresh = messages(model, method, processes), refresh_messages(model, method, processes)
                sent = sum(each.sent(processes) for each in step) + sum(each.sent(processes) for each in refresh) / args.gap
                count = sum(each.count for each in step) + sum(each.count for each in refresh) / args.gap
                time = 1e3 * seconds(sent, count, processes, args)
                cells.append(f"{sent / 1e9:.2f} / {time:.0f} / {held(model, method, processes) / 1e9:.1f}")
            table.add_row(method, *cells)
        console.print(table)
        table = Table(title=f"LLaMA {name.upper()}: GB sent by one refresh of all bases")
        table.add_column("")
        for processes in args.gpus:
            table.add_column(f"{processes} GPUs", justify="right")
        each = [refresh_ways(model, processes) for processes in args.gpus]
        for way in each[0]:
            sent = (sum(message.sent(n) for message in ways[way]) for n, ways in zip(args.gpus, each, strict=True))
            table.add_row(way, *(f"{total / 1e9:.2f}" for total in sent))
        console.print(table)


# Two processes on this machine.

COLLECTIVES = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
}
"""Operators of torch.distributed → the collective, and the place of what a process gives to it."""


class Counted(TorchDispatchMode):
    """Counts the bytes given to each collective inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if found := COLLECTIVES.get(function._schema.name):
            name, place = found
            given = args[place]
            self.given[name] += sum(tensor.nbytes for tensor in (given if isinstance(given, list) else [given]))
        return function(*args, **(kwargs or {}))


HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, RANK = 64, 96, 2, 32, 8


def counted(method: str) -> list[dict[str, float]]:
    """Bytes given to each collective by a process, as one of several, in fp32: of a step without a refresh,
    and of one with."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    import lowrank_kernels as lrk

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(HIDDEN, INTERMEDIATE, bias=False), nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(VOCABULARY, HIDDEN, bias=False), *(Layer() for _ in range(LAYERS)))
    options = {}
    if method == "RSO":
        lrk.to_subspace(model, rank=RANK, target_modules=["up", "down"])
        options = {"shard_placement_fn": lrk.distributed.shard_placement}
    for layer in model[1:]:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    if method == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters())
    elif method == "RSO":
        optimizer = lrk.RSOAdamW(model.parameters(), inner_steps=2)
    else:
        groups = lrk.param_groups(model, rank=RANK, target_modules=["up", "down"], update_proj_gap=2, proj_type=method)
        optimizer = lrk.I3SAdamW(groups)
    found = []
    for _ in range(3):
        with Counted() as counted:
            model(torch.randn(4, VOCABULARY)).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        found.append(dict(counted.given))
    return found[1:]  # the first step compares the processes' settings


def expected(method: str, processes: int) -> list[dict[str, float]]:
    """The same by the formulas."""
    shapes = ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    element = 4
    step = of_fsdp(HIDDEN * VOCABULARY, processes, 1, element)
    elements = LAYERS * sum(rows * columns for rows, columns in shapes)
    step += of_fsdp(elements, processes, 2, element, has_gradient=method != "RSO")
    refresh: list[Message] = []
    if method == "RSO":
        step += of_fsdp(LAYERS * RANK * (INTERMEDIATE + HIDDEN), processes, 2, element)
    elif method != "AdamW":
        step += [each for shape in shapes for each in of_step(shape, RANK, processes, method, LAYERS)]
        refresh = [each for shape in shapes for each in of_refresh(shape, RANK, processes, method, LAYERS, element)]
    found = []
    for each in (step, step + refresh):
        total: Counter[str] = Counter()
        for message in each:
            total[message.collective] += message.given * message.count
        found.append(dict(total))
    return found


def _process(rank: int, folder: str, processes: int) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=processes)
    agree = True
    for method in ("AdamW", "std", "unsharded", "RSO"):
        for what, one, other in zip(("step", "step with a refresh"), counted(method), expected(method, processes), strict=True):
            agree &= one == other
            if rank == 0:
                print(
                    f"{'ok  ' if one == other else 'DIFF'} {method}, {what}: counted {one}"
                    + ("" if one == other else f", expected {other}")
                )
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if agree else 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 256, 1024])
    parser.add_argument("--rank", type=int, help="a quarter of the width")
    parser.add_argument("--gap", type=int, default=200, help="steps between refreshes (200)")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node (8)")
    parser.add_argument("--within", type=float, default=450, help="GB/s that a GPU sends within a node (450, NVLink of an H100)")
    parser.add_argument("--between", type=float, default=50, help="GB/s that a GPU sends to another node (50, one 400 Gb/s adapter each)")
    parser.add_argument("--latency", type=float, default=20, help="µs of a message (20)")
    parser.add_argument("--check", action="store_true", help="count what two processes send on this machine, against the formulas")
    args = parser.parse_args(arguments)
    if not args.check:
        report(args)
        return 0
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(_process, (folder, 2), nprocs=2, join=False, start_method="spawn")
        while not context.join(timeout=60):
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
