"""One run: a model, an optimizer, a schedule. It writes metrics and checkpoints on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import llama
import text
import torch
from checkpoints import Metrics
from memory import PeakMemory, saved_activation_bytes
from methods import METHODS
from processes import ALONE, Processes, local, whole
from settings import Settings
from torch import Tensor, nn

FINAL_LR = 0.1  # of the peak, at the end of the cosine


class Stopped(Exception):
    """The run was asked to stop. A checkpoint of `step` has been written."""

    def __init__(self, step: int):
        self.step = step


class Diverged(RuntimeError):
    """A loss or a gradient is no longer finite."""


@dataclass(frozen=True)
class Files:
    """Where a run of one optimizer keeps its two files, and the directories of sharded checkpoints."""

    metrics: Path
    checkpoint: Path
    sharded: Path

    @classmethod
    def of(cls, directory: Path, method: str) -> Files:
        return cls(directory / f"{method}.jsonl", directory / f"{method}.pt", directory / f"{method}.dcp")

    def finished(self) -> bool:
        return checkpoints.finished(self.metrics)

    def check(self) -> None:
        """Raises checkpoints.Damaged if the run cannot go on, or be reported on, with these files."""
        if self.finished():
            checkpoints.read_metrics(self.metrics)
        elif saved := checkpoints.load(self.checkpoint):
            checkpoints.read_metrics(self.metrics, saved["metrics_position"])


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear from peak / warmup to peak over `warmup` steps, then a cosine that ends at FINAL_LR · peak.
    `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress)))


def build_model(settings: Settings) -> nn.Module:
    model = llama.Llama(llama.SIZES[settings.model], text.VOCAB_SIZE, settings.tie_head, settings.lean).initialize(settings.seed)
    model.to(device=settings.device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype])
    if settings.compile:
        model.compile()
    return model


def build_optimizer(
    model: nn.Module, method: str, lr: float, settings: Settings, prepare: Callable[[nn.Module], None] = lambda model: None
) -> torch.optim.Optimizer:
    """Two groups, [embedding, head and norms, the matrices within the decoder]. Each keeps its peak rate in
    "initial_lr", which is torch's name for it. prepare: see methods.Builder."""
    optimizer = METHODS[method].build(model, lr, settings, prepare)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def distribute(model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, processes: Processes) -> tuple[nn.Module, Any]:
    """What to call for a loss, and what takes the place of DDP's exchange of gradients, or None."""
    projects = any("update_proj_gap" in group for group in optimizer.param_groups)
    if settings.in_backward != "off" and projects:
        import lowrank_kernels as lrk

        group = torch.distributed.group.WORLD if processes.count > 1 and settings.parallel == "ddp" else None
        options = dict(accumulate=settings.accumulate, update=settings.in_backward, process_group=group)
        return model, lrk.in_backward(model, optimizer, **options)
    if settings.parallel == "fsdp2":
        return model, None
    parallel = processes.replicate(model)
    if settings.compress_gradients and projects:
        import lowrank_kernels as lrk

        return parallel, lrk.distributed.compress_gradients(parallel, optimizer)
    return parallel, None


def accumulate_gradients(model: nn.Module, tokens: Tensor, pieces: int, at_once: bool = False) -> float:
    """Adds the gradient of the mean loss over `tokens` to .grad, in `pieces` equal micro-batches. Returns
    that loss in nats. Processes exchange gradients in the last one; those of FSDP2 in each, with at_once."""
    losses = []
    for number, piece in enumerate(tokens.chunk(pieces), 1):
        if hasattr(model, "set_requires_gradient_sync"):  # of FSDP2
            model.set_requires_gradient_sync(at_once or number == pieces)
        quiet = model.no_sync() if number < pieces and hasattr(model, "no_sync") else contextlib.nullcontext()
        with quiet:
            loss = llama.loss(model, piece) / pieces
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum().item()


def gradient_bytes(optimizer: torch.optim.Optimizer, exchange: Any) -> int:
    """Of all gradients, and of R where in_backward has projected them."""
    grads = {id(param): param.grad for group in optimizer.param_groups for param in group["params"]}
    projected = getattr(exchange, "projected", {})
    return sum(local(tensor).nbytes for tensor in (*grads.values(), *projected.values()) if tensor is not None)


def first_tokens(settings: Settings, corpus: text.Corpus, processes: Processes) -> Tensor:
    """The first micro-batch."""
    tokens = text.batch(corpus.train, seed=settings.seed, step=0, batch_size=settings.batch_size, seq_len=settings.seq_len)
    return processes.share(tokens).chunk(settings.accumulate)[0]


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, batch_size: int, processes: Processes = ALONE) -> float:
    """Mean loss of a held-out byte, nats. Each process evaluates its part of the windows. All of them make
    equally many forward passes, for which those of FSDP2 need each other."""
    mine = processes.share(windows)
    passes = math.ceil(math.ceil(len(windows) / processes.count) / batch_size)
    total = 0.0
    for start in range(0, passes * batch_size, batch_size):
        piece = mine[start : start + batch_size]
        loss = llama.loss(model, piece if len(piece) else windows[:1])
        total += loss.double().item() * len(piece)
    return processes.total(total)[0] / len(windows)


def bases(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Tensor]:
    """Copies of the orthonormal bases in use, on the CPU. On the device the copies would count towards the
    optimizer's peak memory."""
    orthonormal = (group["params"] for group in optimizer.param_groups if group.get("selection") != "gaussian")
    held = (param for params in orthonormal for param in params if "basis" in optimizer.state.get(param, ()))
    return {param: whole(optimizer.state[param]["basis"]).to("cpu", copy=True) for param in held}


def mean_overlap(before: dict[nn.Parameter, Tensor], after: dict[nn.Parameter, Tensor]) -> float | None:
    """Mean over the projected parameters of ‖PᵀQ‖²_F / r between a basis and its successor. None if there is
    no earlier basis, and none that is orthonormal."""
    if not before:
        return None
    import lowrank_kernels as lrk

    return sum(lrk.subspace_overlap(before[p], after[p]).mean().item() for p in before) / len(before)


def mean_diagnostics(optimizer: torch.optim.Optimizer, refreshed_at: int) -> dict[str, float]:
    """Means over the matrices whose bases were chosen at that count of steps: the part of the gradient's
    energy that the new bases capture, and the effective rank of the gradient. Figures that a method does not
    have are left out."""
    rows = [row for row in optimizer.diagnostics() if row["refreshed_at"] == refreshed_at]
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("captured_energy", "effective_rank") if rows}
    return {key: value for key, value in means.items() if math.isfinite(value)}


def state_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    """Of the states, and of RSO's projections, which its layers hold. What several share counts once."""
    held = [local(value) for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    layers = [module for module in model.modules() if hasattr(module, "subspace")]
    held += [layer.subspace.matrix(layer.weight.device, layer.weight.dtype) for layer in layers]
    return sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in held}.values())


def train(
    settings: Settings,
    method: str,
    lr: float,
    corpus: text.Corpus,
    files: Files,
    *,
    checkpoint_every: int,
    resume: bool = False,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Trains to the end and returns the rows of the metrics file. `lr` is the peak rate of the matrices,
    settings.dense_lr that of the rest.

    Rows are of three kinds. A "step" has the loss in nats a byte, lr and dense_lr of that step, grad_norm
    (None where gradients were used up in the backward pass) and optimizer_ms; at a refresh of bases also the
    overlap with the previous ones, and with settings.diagnostics captured_energy and effective_rank; with
    --parallel ddp also sent_bytes, what this process gave to all-reduces.
    An "eval" has val_loss. The last row is "end", with weight_bytes, gradient_bytes, state_bytes,
    activation_bytes, peak_bytes and wall_s. `step` counts finished steps. The loss of a row is that of the
    weights before its step.

    Raises Stopped once `should_stop()` holds and the current step is saved. Raises Diverged on a loss that is
    not finite. All of several processes call this; the first one writes the files, and memory and times are
    its own.
    """
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    _warm_up(settings)
    peak = PeakMemory(device)
    model = build_model(settings)
    activation_bytes = 0

    def prepare(model: nn.Module) -> None:
        nonlocal activation_bytes
        activation_bytes = saved_activation_bytes(model, first_tokens(settings, corpus, processes).to(device))
        if settings.parallel == "fsdp2":
            processes.shard(model)

    optimizer = build_optimizer(model, method, lr, settings, prepare)
    windows = text.windows(corpus.val, count=settings.eval_sequences, seq_len=settings.seq_len).to(device)

    done, wall_s, earlier_peak_bytes, position = 0, 0.0, 0, 0
    if resume and (saved := checkpoints.load(files.checkpoint)):
        if settings.parallel == "fsdp2":
            checkpoints.load_sharded(files.sharded / str(saved["step"]), model, optimizer)
        else:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        done, wall_s, earlier_peak_bytes, position = saved["step"], saved["wall_s"], saved["peak_bytes"], saved["metrics_position"]
        del saved
    metrics = Metrics(files.metrics, position) if processes.is_first else None
    parallel, exchange = distribute(model, optimizer, settings, processes)
    held_bytes = 0
    started_s = time.perf_counter() - wall_s

    def log(row: dict[str, Any]) -> None:
        if not all(math.isfinite(row.get(key) or 0.0) for key in ("loss", "grad_norm", "val_loss")):
            raise Diverged(f"{METHODS[method].title} diverged at step {row['step']} (lr {lr:g})")
        if metrics is not None:
            metrics.append(row)
            on_row(row)

    def highest_bytes() -> int | None:
        now = peak.bytes()
        return None if now is None or earlier_peak_bytes is None else max(now, earlier_peak_bytes)

    def save(step: int) -> None:
        held: dict[str, Any] = {}
        if settings.parallel == "fsdp2":
            checkpoints.save_sharded(files.sharded / str(step), model, optimizer, processes.is_first)
        if not processes.is_first:
            return
        if settings.parallel == "ddp":
            held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        held |= {"step": step, "metrics_position": metrics.position()}
        held |= {"wall_s": time.perf_counter() - started_s, "peak_bytes": highest_bytes()}
        checkpoints.save(files.checkpoint, held)
        if settings.parallel == "fsdp2":
            checkpoints.remove_older(files.sharded / str(step))

    try:
        for step in range(done, settings.steps):
            row, held_bytes = train_step(parallel, optimizer, step, settings, corpus, processes, exchange)
            log(row)
            last = step + 1 == settings.steps
            if last or (step + 1) % settings.eval_every == 0:
                log({"event": "eval", "step": step + 1, "val_loss": evaluate(model, windows, settings.batch_size, processes)})
            stop = any(processes.total(should_stop())) and not last
            if last or stop or (step + 1) % checkpoint_every == 0:
                save(step + 1)
            if stop:
                raise Stopped(step + 1)
        log(
            {
                "event": "end",
                "step": settings.steps,
                "weight_bytes": sum(local(parameter).nbytes for parameter in model.parameters()),
                "gradient_bytes": held_bytes,
                "state_bytes": state_bytes(optimizer, model),
                "activation_bytes": activation_bytes,
                "peak_bytes": highest_bytes(),
                "wall_s": time.perf_counter() - started_s,
            }
        )
    finally:
        if metrics is not None:
            metrics.close()
    return checkpoints.read_metrics(files.metrics) if processes.is_first else []


@functools.cache
def _warm_up(settings: Settings) -> None:
    """Loads, once in a process, the libraries and thread pools that the first step of any run loads. Their
    memory and time then do not count for one optimizer."""
    small = dataclasses.replace(settings, model="tiny", compile=False)
    model = build_model(small)
    tokens = torch.zeros(settings.batch_size // settings.accumulate, settings.seq_len + 1, dtype=torch.int64, device=settings.device)
    accumulate_gradients(model, tokens, 1)
    METHODS["adamw"].build(model, 1e-3, small).step()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    settings: Settings,
    corpus: text.Corpus,
    processes: Processes = ALONE,
    exchange: Any = None,
) -> tuple[dict[str, Any], int]:
    """Runs step number `step` (from 0) of an optimizer of `build_optimizer`. Returns the step's metrics row,
    and the bytes of the gradients. model, exchange: see `distribute`."""
    tokens = text.batch(corpus.train, seed=settings.seed, step=step, batch_size=settings.batch_size, seq_len=settings.seq_len)
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:  # before the backward pass, in which in_backward may move weights
        group["lr"] = learning_rate(step, group["initial_lr"], settings.warmup, settings.steps)
    dense, matrices = optimizer.param_groups
    sent_before = getattr(exchange, "sent_bytes", 0)
    before = bases(optimizer) if step % settings.update_proj_gap == 0 else {}
    mine, at_once = processes.share(tokens).to(settings.device), settings.in_backward != "off"
    loss = accumulate_gradients(model, mine, settings.accumulate, at_once)
    loss = processes.total(loss)[0] / processes.count
    held_bytes = gradient_bytes(optimizer, exchange)
    grad_norm = clip(model, optimizer, settings, exchange)

    outer_step = matrices.get("outer_step")
    _synchronize(settings.device)
    start_s = time.perf_counter()
    optimizer.step()
    _synchronize(settings.device)
    row = {
        "event": "step",
        "step": step + 1,
        "loss": loss,
        "lr": matrices["lr"],
        "dense_lr": dense["lr"],
        "grad_norm": grad_norm,
        "optimizer_ms": (time.perf_counter() - start_s) * 1e3,
    }
    if step % settings.update_proj_gap == 0 and "rank" in matrices:
        row |= {"refresh": True, "overlap": mean_overlap(before, bases(optimizer))}
        if settings.diagnostics:
            row |= mean_diagnostics(optimizer, refreshed_at=matrices["calls"] - 1)
    if matrices.get("outer_step") != outer_step:
        row["refresh"] = True
    if processes.count > 1 and settings.parallel == "ddp":  # DDP's own reduction sends every gradient
        row["sent_bytes"] = held_bytes if exchange is None else exchange.sent_bytes - sent_before
    return row, held_bytes


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, exchange: Any) -> float | None:
    """Clips the gradient and returns its norm before that; None where none is left. Where in_backward has
    projected gradients, the norm is that of what is left of them."""
    limit = settings.clip or math.inf
    if not hasattr(exchange, "projected"):
        return whole(nn.utils.clip_grad_norm_(model.parameters(), limit)).item()
    return None if settings.in_backward == "immediately" else optimizer.clip_grad_norm_(limit).item()


def _synchronize(device: str) -> None:
    """Waits for the device. Without it the clock would time the launch of CUDA kernels, not their run."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
