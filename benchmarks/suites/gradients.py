"""What two processes exchange in a step, and what each of them holds of gradients: bytes and time.

Each process runs forward pass, backward pass and step over the linear layers of a few LLaMA blocks. They talk
over gloo on this machine's CPU, which is no network: times show what projecting costs, and what fewer bytes
spare within one machine. Bytes are counted at every all-reduce. Those of this package are asserted to be what
the formula says.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import shapes
from ..cases import Context, Selection, Unavailable
from ..checks import WrongResult
from ..records import OURS, Row, timed_rows
from ..timing import Timing

PROCESSES = 2
BLOCK = 7
"""Matrices of a LLaMA block."""
TOKENS = 64
GAP, PERIODS = 8, 5
"""Steps between refreshes, and how many such periods are run. Steps between refreshes are timed, from the
second period on."""
IN_BACKWARD, AT_ONCE, RSO = f"{OURS}, in backward", f"{OURS}, immediately", f"{OURS}, RSO"
FULL, POWER_SGD = "DDP", "DDP, PowerSGD hook"
CONTENDERS = (OURS, IN_BACKWARD, AT_ONCE, RSO, FULL, POWER_SGD)


@dataclass(frozen=True)
class GradientsCase:
    model: str
    rank: int
    dtype: torch.dtype
    blocks: int = 2

    @property
    def label(self) -> str:
        return f"gradients {self.blocks} blocks of {self.model} r={self.rank} {shapes.dtype_name(self.dtype)}"

    @property
    def weights(self) -> list[tuple[int, int]]:
        """(out, in)."""
        return shapes.model_shapes(self.model)[: self.blocks * BLOCK]

    def sent_bytes(self) -> dict[str, int]:
        """Of each process in a step between refreshes, by formula."""
        full = sum(rows * columns for rows, columns in self.weights)
        thin = sum(self.rank * max(shape) for shape in self.weights)
        coordinates = sum(self.rank * rows for rows, _ in self.weights)
        elements = {OURS: thin, RSO: coordinates, FULL: full}
        return {name: count * self.dtype.itemsize for name, count in elements.items()} | {IN_BACKWARD: thin * 4, AT_ONCE: thin * 4}


def cases(selection: Selection, on_gpu: bool) -> list[GradientsCase]:
    if selection.explicit:
        return [GradientsCase(*each) for each in selection.combinations(("60m",), (128,), (torch.float32,))]
    return [GradientsCase("60m", rank, torch.float32) for rank in ((128,) if selection.quick else (32, 128))]


def run(case: GradientsCase, context: Context) -> list[Row]:
    if context.on_gpu:
        raise Unavailable("two processes on a CPU say nothing about a GPU; on a machine without one this suite runs")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_process, (case, case.weights, folder), nprocs=PROCESSES, start_method="spawn")
        found: dict[str, dict[str, Any]] = torch.load(Path(folder) / "0.pt")
    formula = case.sent_bytes()
    for name, measured in found.items():
        if name in formula and measured["sent"] != formula[name]:
            raise WrongResult(f"{name} sent {measured['sent']} bytes a step, the formula says {formula[name]}")
    base = torch.tensor(found[OURS]["ms"]).quantile(0.5).item()
    timings = {}
    for name, measured in found.items():
        times = torch.tensor(measured["ms"])
        p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        timings[name] = Timing(p20, p50, p80, len(times), p50 / base)
    rows = timed_rows(case.label, case.dtype, timings, {}, context.machine, suite="gradients", rank=case.rank, shapes=case.weights)
    for row in rows:
        measured = found[str(row["contender"])]
        row |= {f"{what}_mb": measured[what] / 1e6 for what in ("sent", "refresh_sent", "gradient")}
    return rows


def _process(rank: int, case: GradientsCase, weights: list[tuple[int, int]], folder: str) -> None:
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=120))
    found = {name: _measure(case, weights, name) for name in CONTENDERS}
    torch.save(found, f"{folder}/{rank}.pt")
    while not all(os.path.exists(f"{folder}/{other}.pt") for other in range(PROCESSES)):
        time.sleep(0.05)  # a process that leaves while another one still talks to it aborts that one
    os._exit(0)  # destroying the group may deadlock with gloo's own thread


class _Counter:
    """Counts the bytes that are given to all-reduces."""

    def __init__(self) -> None:
        self.bytes = 0
        self._all_reduce = torch.distributed.all_reduce

    def __enter__(self) -> _Counter:
        torch.distributed.all_reduce = self._counted
        return self

    def __exit__(self, *exception: object) -> None:
        torch.distributed.all_reduce = self._all_reduce

    def _counted(self, tensor: Tensor, *rest: Any, **keywords: Any) -> Any:
        self.bytes += tensor.nbytes
        return self._all_reduce(tensor, *rest, **keywords)


def _measure(case: GradientsCase, weights: list[tuple[int, int]], name: str) -> dict[str, Any]:
    """Bytes sent in a step between refreshes and in one with a refresh, bytes of the gradients that are there
    after the backward pass, and milliseconds of the former steps."""
    torch.manual_seed(0)
    model = _Layers(weights).to(case.dtype)
    inputs = [torch.randn(TOKENS, columns, dtype=case.dtype) for _, columns in weights]
    forward, optimizer, projected = _build(case, name, model)
    sent: list[int] = []
    times: list[float] = []
    held = 0
    with _Counter() as counter:
        for _ in range(PERIODS * GAP):
            before, start = counter.bytes, time.perf_counter()
            forward(inputs).backward()
            held = sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
            held += sum(tensor.nbytes for tensor in projected().values())
            optimizer.step()
            times.append((time.perf_counter() - start) * 1e3)
            optimizer.zero_grad()
            sent.append(counter.bytes - before)
    between = [step for step in range(GAP, PERIODS * GAP) if step % GAP]
    (in_between,) = {sent[step] for step in between}
    return {"sent": in_between, "refresh_sent": sent[GAP], "gradient": held, "ms": [times[step] for step in between]}


def _build(case: GradientsCase, name: str, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], dict[Tensor, Tensor]]]:
    """What is called with the inputs, the optimizer, and what holds projected gradients."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    import lowrank_kernels as lrk

    if name == RSO:
        lrk.to_subspace(model, case.rank)
        optimizer: torch.optim.Optimizer = lrk.RSOAdamW(model.parameters(), inner_steps=GAP)
    else:
        optimizer = lrk.GaLoreAdamW(lrk.param_groups(model, case.rank, update_proj_gap=GAP))
    if name in (IN_BACKWARD, AT_ONCE):
        update = "deferred" if name == IN_BACKWARD else "immediately"
        handle = lrk.in_backward(model, optimizer, update=update, process_group=torch.distributed.group.WORLD)
        return model, optimizer, lambda: handle.projected
    # PowerSGD's hook starts further all-reduces where others have ended. With several buckets their order
    # differs between processes, which gloo finds out as messages of another size.
    whole = sum(param.nbytes for param in model.parameters()) / 2**20 + 1
    parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=whole if name == POWER_SGD else 25)
    if name == OURS:
        lrk.distributed.compress_gradients(parallel, optimizer)
    elif name == POWER_SGD:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=case.rank, start_powerSGD_iter=2)
        parallel.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    else:
        parallel.register_comm_hook(None, default_hooks.allreduce_hook)  # DDP's own reduction, where it can be counted
    return parallel, optimizer, dict


class _Layers(nn.Module):
    def __init__(self, weights: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in weights)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack([layer(x).square().mean() for layer, x in zip(self.layers, inputs, strict=True)]).sum()
