"""Forward, backward and step of one linear layer and of one LLaMA block: RSO against training nn.Linear, in
time and in bytes.

Between draws of P and refreshes of bases. What this package's contenders save and hold is asserted to be what
the formulas say. On a GPU also the largest batch of a whole model's blocks that each contender has room for:
there saved bytes add up, and checkpointing pays.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from statistics import median

import torch

from .. import iterations, roofline, shapes, timing
from ..cases import Context, Selection, not_measured, require_room
from ..checks import WrongResult, check_iteration
from ..iterations import CHECKPOINTED, DENSE, GALORE, UNSHARED, Build, Training
from ..memory import largest, peak_bytes, saved_bytes, tensor_bytes
from ..records import OURS, Row, timed_rows
from ..roofline import Work

CHECKED_POSITIONS = 256
"""Of one sequence, that a block is checked on: the exact one runs in fp64."""
COUNTER_BYTES = 4
"""An optimizer's count of steps, for each parameter."""
RSO = (OURS, UNSHARED)
"""Contenders that are; all others train nn.Linear."""


@dataclass(frozen=True)
class IterationCase:
    """`model`: that of a block, or (in, out) of a layer."""

    model: str | tuple[int, int]
    batch: int
    sequence: int
    rank: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        what = f"{self.model} block" if self.is_block else f"linear {self.model[0]}→{self.model[1]}"
        extent = f"{self.batch}x{self.sequence}" if self.is_block else self.tokens
        return f"rso {what} at {extent} tokens r={self.rank} {shapes.dtype_name(self.dtype)}"

    @property
    def is_block(self) -> bool:
        return isinstance(self.model, str)

    @property
    def depth(self) -> int:
        return 1

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def inputs(self) -> list[tuple[int, list[int]]]:
        """(in, [out of each layer that reads it]) for each tensor that linear layers read."""
        if not self.is_block:
            return [(self.model[0], [self.model[1]])]
        hidden, intermediate, _ = shapes.LLAMA[self.model]
        return [(hidden, [hidden] * 3), (hidden, [hidden]), (hidden, [intermediate] * 2), (intermediate, [hidden])]

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(in, out)."""
        return [(read, outputs) for read, readers in self.inputs for outputs in readers]

    @property
    def others(self) -> int:
        """Elements of what is trained beside the layers' matrices: two norms."""
        return 2 * shapes.LLAMA[self.model][0] if self.is_block else 0

    def contenders(self) -> dict[str, Build]:
        return iterations.BLOCK if self.is_block else iterations.LAYER

    # What it takes by the formulas.

    def saved_bytes(self) -> dict[str, int]:
        """What linear layers save of their inputs: x itself, or Z = x·P; all that there is to save of a layer
        alone."""
        dense = self.tokens * sum(read for read, _ in self.inputs)
        found = dict.fromkeys((GALORE, "galore-torch", DENSE), dense)
        found |= {OURS: self.tokens * self.rank * len(self.inputs), UNSHARED: self.tokens * self.rank * len(self.layers)}
        return {name: elements * self.dtype.itemsize for name, elements in found.items()}

    def gradient_bytes(self) -> dict[str, int]:
        """Of all parameters that are trained."""
        full = sum(read * outputs for read, outputs in self.layers)
        found = dict.fromkeys((GALORE, "galore-torch", DENSE, CHECKPOINTED), full)
        found |= dict.fromkeys(RSO, self.rank * sum(outputs for _, outputs in self.layers))
        return {name: (elements + self.others) * self.dtype.itemsize for name, elements in found.items()}

    def state_bytes(self) -> dict[str, int]:
        """Of moments, counters and bases; of RSO also P and the coordinates, which are zero but there."""
        size, rank = self.dtype.itemsize, self.rank
        others = 2 * self.others * size + (2 * COUNTER_BYTES if self.is_block else 0)
        full = sum(2 * size * read * outputs + COUNTER_BYTES for read, outputs in self.layers)
        low_rank = sum(roofline.state_bytes(shape, rank, self.dtype) for shape in self.layers)
        moments = sum(roofline.moments_bytes(outputs, rank) + COUNTER_BYTES for _, outputs in self.layers)
        coordinates = rank * size * sum(outputs for _, outputs in self.layers)
        bases = {OURS: sum(read for read, _ in self.inputs), UNSHARED: sum(read for read, _ in self.layers)}
        found = {DENSE: full, CHECKPOINTED: full, GALORE: low_rank}
        found |= {name: moments + coordinates + rank * size * inputs for name, inputs in bases.items()}
        return {name: count + others for name, count in found.items()}

    def works(self) -> dict[str, Work]:
        """The linear layers, their step and a block's attention; elementwise work between them counts as
        free."""
        tokens, rank, dtype = self.tokens, self.rank, self.dtype
        attention: Work = ()
        if self.is_block:
            attention = roofline.causal_attention(tokens, self.sequence, shapes.LLAMA[self.model][0], dtype)
        common, dense, full, low_rank, coordinates = attention, (), (), (), ()
        for read, outputs in self.layers:
            m, n = sorted((read, outputs))
            common += roofline.forward_and_dx(tokens, read, outputs, dtype)
            dense += roofline.weight_gradient(tokens, read, outputs, dtype)
            full += roofline.adamw(m, n, dtype, dtype.itemsize)
            low_rank += roofline.single_pass(m, n, min(rank, m), dtype)
            coordinates += roofline.coordinates_gradient(tokens, outputs, rank, dtype)
            coordinates += roofline.subspace_step(read, outputs, rank, dtype)
        again: Work = attention[:1]
        for read, outputs in self.layers:
            again += roofline.product(tokens, read, outputs, dtype)

        def projections(widths: list[int]) -> Work:
            return tuple(cost for width in widths for cost in roofline.product(tokens, width, rank, dtype))

        return {
            OURS: common + coordinates + projections([read for read, _ in self.inputs]),
            UNSHARED: common + coordinates + projections([read for read, _ in self.layers]),
            GALORE: common + dense + low_rank,
            DENSE: common + dense + full,
            CHECKPOINTED: common + dense + full + again,
        }

    def bytes_needed(self) -> int:
        """Every contender's weights, gradients and states; one iteration at a time; and the exact one."""
        weights = sum(read * outputs for read, outputs in self.layers)
        widths = sum(read + len(readers) * max(readers) for read, readers in self.inputs)
        held = len(self.contenders()) * (4 * weights + 2 * self.tokens * max(max(each) for each in self.layers))
        return held * self.dtype.itemsize + 4 * self.tokens * widths * 4 + 24 * weights


@dataclass(frozen=True)
class LargestCase:
    """How many sequences fit, of all blocks of a model."""

    model: str
    sequence: int
    rank: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"rso {self.model}: largest batch of {self.sequence} tokens r={self.rank} {shapes.dtype_name(self.dtype)}"

    @property
    def depth(self) -> int:
        return shapes.LLAMA[self.model][2]


Case = IterationCase | LargestCase


def cases(selection: Selection, on_gpu: bool) -> list[Case]:
    half, single = torch.bfloat16, torch.float32
    if selection.explicit:
        return _asked_for(selection, on_gpu)
    if on_gpu:
        if selection.quick:
            return [IterationCase("350m", 32, 256, 128, half)]
        extents = {"350m": ((32, 256), (128, 256), (4, 2048), (16, 2048)), "1b": ((32, 256), (64, 256), (4, 2048), (8, 2048))}
        blocks = [IterationCase(model, *extent, 256, half) for model, found in extents.items() for extent in found]
        layers = [IterationCase((2048, 5461), 1, 16384, 256, half), IterationCase((5461, 2048), 1, 16384, 256, half)]
        wholes = [LargestCase(model, sequence, 256, half) for model, sequence in (("350m", 2048), ("1b", 256), ("1b", 2048))]
        return [*layers, *blocks, *wholes]
    first = [IterationCase((1024, 2736), 1, 2048, 128, dtype) for dtype in (single, half)]
    if selection.quick:
        return [*first, IterationCase("60m", 8, 256, 128, single)]
    layers = [*first, *(IterationCase((2736, 1024), 1, 2048, 128, dtype) for dtype in (single, half))]
    blocks = [IterationCase("60m", *extent, 128, dtype) for extent in ((8, 256), (2, 1024)) for dtype in (single, half)]
    return [*layers, *blocks, IterationCase("60m", 8, 256, 256, single)]


def _asked_for(selection: Selection, on_gpu: bool) -> list[Case]:
    """The layers between a model's two widths, and its block; of square matrices one layer."""
    found: list[Case] = []
    for model, rank, dtype in selection.combinations(("60m",), (128,), (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16)):
        batch, sequence = (32, 256) if on_gpu else (8, 256)
        widths = shapes.LLAMA[model][:2] if model in shapes.LLAMA else shapes.model_shapes(model)[0]
        layers = dict.fromkeys((widths, widths[::-1]))
        found += [IterationCase(layer, 1, batch * sequence, rank, dtype) for layer in layers]
        if model in shapes.LLAMA:
            found.append(IterationCase(model, batch, sequence, rank, dtype))
    return list(dict.fromkeys(found))


def run(case: Case, context: Context) -> list[Row]:
    return _largest_batches(case, context) if isinstance(case, LargestCase) else _iterations(case, context)


def _iterations(case: IterationCase, context: Context) -> list[Row]:
    require_room(case.bytes_needed(), context.on_gpu)
    trainings: dict[str, Training] = {}
    held: dict[str, dict[str, float]] = {}
    rest: list[Row] = []
    for name, build in case.contenders().items():
        try:
            with context.setting_up("rso", name):
                error = _checked(case, build, context.device) if name in RSO else None
                training = build(case, case.batch, context.device)
                held[name] = weigh(case, name, training, context) | ({"update_error": error} if error is not None else {})
            trainings[name] = training
        except Exception as why:
            rest.append(not_measured(case.label, name, why))
        if context.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
    for name in RSO:
        if case.is_block and name in trainings and DENSE in held:
            try:
                _judge_block(case, name, held)
            except WrongResult as wrong:
                rest.append(not_measured(case.label, name, wrong))
                del trainings[name]
    if OURS not in trainings:
        return rest
    timings = timing.interleave(trainings, context.on_gpu, context.measuring_s())
    fields = {"suite": "rso", "rank": case.rank, "batch": case.batch, "sequence": case.sequence}
    fields |= {"model": case.model} if case.is_block else {}
    fields["shapes"] = [(1, outputs, read) for read, outputs in case.layers]
    rows = timed_rows(case.label, case.dtype, timings, case.works(), context.machine, **fields)
    for row in rows:
        name = row["contender"]
        parts = trainings[name].parts_ms(timings[name].rounds)
        row |= {f"{part}_ms": parts[part] for part in iterations.PARTS}
        row |= {"tokens_per_s": case.tokens / timings[name].p50 * 1e3} | held[name]
    return rows + rest


def _checked(case: IterationCase, build: Build, device: str) -> float:
    """The error of an iteration; of a block on the beginning of a sequence."""
    if case.is_block:
        case = IterationCase(case.model, 1, min(case.sequence, CHECKED_POSITIONS), case.rank, case.dtype)
    return check_iteration(build(case, case.batch, device), case.dtype)


def weigh(case: IterationCase, name: str, training: Training, context: Context) -> dict[str, float]:
    """MB of what is saved, of gradients, of states and of an iteration's peak, and what formulas say.
    WrongResult where ours are others."""
    training()  # states
    lasting = [*training.module.parameters(), *training.module.buffers()]
    saved = saved_bytes(lambda: training.module(training.produced()), lasting)
    training.gradients()
    gradients = tensor_bytes([param.grad for param in training.trainable])
    training.free_gradients()
    kept = iterations.kept_beside_weights(training.module, context.device, case.dtype)
    states = tensor_bytes([*(each.state for each in training.optimizers), *kept])
    _, peak = peak_bytes(lambda: training(produce=True), context.on_gpu)
    found: dict[str, float] = {"saved_mb": saved / 1e6, "gradient_mb": gradients / 1e6, "state_mb": states / 1e6, "peak_mb": peak / 1e6}
    counted = {"saved": saved, "gradient": gradients, "state": states}
    theory = {"saved": case.saved_bytes(), "gradient": case.gradient_bytes(), "state": case.state_bytes()}
    for what, count in counted.items():
        expected = theory[what].get(name)
        if expected is None or (what == "saved" and case.is_block):  # a block saves more than its linear layers do
            continue
        if name.startswith(OURS) and count != expected:
            raise WrongResult(f"it has {count} {what} bytes, the formula says {expected}")
        found[f"{what}_theory_mb"] = expected / 1e6
    return found


def _judge_block(case: IterationCase, name: str, held: dict[str, dict[str, float]]) -> None:
    """A block of RSO saves what it saves of nn.Linear, and Zs instead of inputs. WrongResult where it saves
    anything else.

    o_proj reads the attention's output: where its kernel saves that in the same memory, it stays.
    """
    formula = case.saved_bytes()
    attended = case.tokens * shapes.LLAMA[case.model][0] * case.dtype.itemsize
    expected = round(held[DENSE]["saved_mb"] * 1e6) - formula[DENSE] + formula[name]
    found = round(held[name]["saved_mb"] * 1e6)
    if found not in (expected, expected + attended):
        raise WrongResult(f"it has {found} saved bytes, the formula says {expected}")
    held[name]["saved_theory_mb"] = expected / 1e6


def _largest_batches(case: LargestCase, context: Context) -> list[Row]:
    rows: list[Row] = []
    rest: list[Row] = []
    for name, build in iterations.BLOCK.items():

        def median_ms(batch: int, name: str = name, build: Build = build) -> float:
            with context.setting_up("rso, largest batch", name):
                training = build(case, batch, context.device)
                return median([timing.time_once_ms(training, context.on_gpu) for _ in range(3)][1:])  # the first one makes states

        try:
            found = largest(median_ms)
        except Exception as why:
            rest.append(not_measured(case.label, name, why))
            continue
        if found is None:
            rest.append(not_measured(case.label, name, "one sequence does not fit"))
            continue
        batch, ms = found
        row: Row = {"case": case.label, "suite": "rso", "model": case.model, "rank": case.rank, "sequence": case.sequence}
        row |= {"dtype": shapes.dtype_name(case.dtype), "contender": name, "largest_batch": batch}
        rows.append(row | {"tokens_per_s": batch * case.sequence / ms * 1e3})
    base = next((row["largest_batch"] for row in rows if row["contender"] == OURS), None)
    return [row | ({"ratio_to_ours": row["largest_batch"] / base} if base else {}) for row in rows] + rest
