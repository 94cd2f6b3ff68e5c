"""One optimizer step over a whole model's projected weights, between refreshes: what the host waits for,
launches included."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from .. import contenders, roofline, shapes, timing
from ..cases import Context, Selection, not_measured, require_room
from ..checks import check_step
from ..records import OURS, Row, timed_rows


@dataclass(frozen=True)
class StepCase:
    model: str
    rank: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"step {self.model} r={self.rank} {shapes.dtype_name(self.dtype)}"

    def work(self, state_bits: int = 32) -> roofline.Work:
        """The least that a low-rank step moves."""
        return roofline.over_model(self.model, self.rank, lambda m, n, r: roofline.single_pass(m, n, r, self.dtype, state_bits))

    def works(self) -> dict[str, roofline.Work]:
        """Of the contenders whose work is known: this package's, and full-rank AdamW."""
        known = {name: self.work(keys.get("state_bits", 32)) for name, keys in contenders.OURS.items()}
        full = {"AdamW(fused=True), full rank": self.dtype.itemsize, "bitsandbytes AdamW8bit, full rank": 1 + 4 / 256}
        for name, size in full.items():
            known[name] = roofline.over_model(self.model, self.rank, lambda m, n, r, size=size: roofline.adamw(m, n, self.dtype, size))
        return known

    def bytes_needed(self, with_baselines: bool) -> int:
        """Weights, gradients, states of ours; with the baselines theirs, of which full-rank AdamW's
        dominate."""
        low_rank = sum(roofline.state_bytes(shape, self.rank, self.dtype) for shape in shapes.model_shapes(self.model))
        full = 2 * shapes.elements(self.model) * self.dtype.itemsize
        return full + low_rank + with_baselines * (2 * full + 5 * low_rank)


def cases(selection: Selection, on_gpu: bool) -> list[StepCase]:
    half, single = torch.bfloat16, torch.float32
    if selection.explicit:
        return [StepCase(*each) for each in selection.combinations(("60m",), (128,), (half,) if on_gpu else (single, half))]
    if not on_gpu:
        models = ("28x512",) if selection.quick else ("28x512", "60m", "130m")
        return [StepCase(model, 128, dtype) for model in models for dtype in (single, half)]
    if selection.quick:
        return [StepCase(model, 128, half) for model in ("60m", "350m")]
    others = [StepCase("7b", rank, half) for rank in shapes.RANKS if rank != 128]
    return [*(StepCase(model, 128, half) for model in shapes.LLAMA), *others, StepCase("350m", 256, single)]


def run(case: StepCase, context: Context) -> list[Row]:
    require_room(case.bytes_needed(with_baselines=not context.on_gpu), context.on_gpu)
    weights = shapes.model_shapes(case.model)
    params = contenders.make_params(weights, case.dtype, context.device)
    built: dict[str, contenders.Built] = {}
    errors: dict[str, float] = {}
    rest: list[Row] = []
    for name, build in contenders.STEP.items():
        if not contenders.applies(name, case.dtype):
            continue
        try:
            contenders.require(name, context.device)
            with context.setting_up("step", name):
                if name in contenders.OURS:
                    errors[name] = check_step(weights, case.rank, case.dtype, context.device, contenders.OURS[name])
                built[name] = build(params, case.rank)
        except Exception as why:
            rest.append(not_measured(case.label, name, why))
        if context.on_gpu:
            gc.collect()  # of one that ran out of memory, so that the next one finds what is free
            torch.cuda.empty_cache()
    for name in list(built):  # beside the states of all the others
        try:
            built[name].step()
        except Exception as why:
            rest.append(not_measured(case.label, name, why))
            del built[name]
    if OURS not in built:
        return rest
    timings = timing.interleave({name: each.step for name, each in built.items()}, context.on_gpu, context.measuring_s())
    fields = {"suite": "step", "model": case.model, "rank": case.rank, "shapes": shapes.buckets(case.model)}
    rows = timed_rows(case.label, case.dtype, timings, case.works(), context.machine, **fields)
    for row in rows:
        if row["contender"] in errors:
            row["update_error"] = errors[row["contender"]]
    return rows + rest
