"""What a step holds and needs: bytes of the optimizer's state against the formula, and the peak of one step
beyond what was live.

Every contender gets weights and gradients of its own. "AdamW, float32 states" has fp32 weights, as
torch.optim.AdamW's states take the weights' dtype; all others have weights of the case's dtype.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from .. import contenders, roofline, shapes
from ..cases import Context, Selection, not_measured, require_room
from ..checks import WrongResult
from ..memory import peak_bytes, tensor_bytes
from ..records import OURS, Row


@dataclass(frozen=True)
class MemoryCase:
    model: str
    rank: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"memory {self.model} r={self.rank} {shapes.dtype_name(self.dtype)}"

    def contenders(self) -> dict[str, tuple[contenders.Build, torch.dtype]]:
        """(build, dtype of the weights) by name."""
        low_rank = ("lowrank_kernels", "lowrank_kernels, 8-bit states", "galore-torch", "apollo-torch")
        found = {name: (contenders.STEP[name], self.dtype) for name in low_rank}
        for dtype in (self.dtype, torch.float32):
            found[f"AdamW, {shapes.dtype_name(dtype)} states"] = (contenders.adamw_fused, dtype)
        return found | {"bitsandbytes AdamW8bit": (contenders.adamw_8bit, self.dtype)}

    def theory_bytes(self) -> dict[str, int]:
        """State bytes by formula. Exact for this package; without counters and code books for AdamW."""
        weights = shapes.model_shapes(self.model)
        found = {
            name: sum(roofline.state_bytes(shape, self.rank, self.dtype, keys.get("state_bits", 32)) for shape in weights)
            for name, keys in contenders.OURS.items()
        }
        for dtype in (self.dtype, torch.float32):
            found[f"AdamW, {shapes.dtype_name(dtype)} states"] = 2 * shapes.elements(self.model) * dtype.itemsize
        return found


def cases(selection: Selection, on_gpu: bool) -> list[MemoryCase]:
    half, single = torch.bfloat16, torch.float32
    if selection.explicit:
        return [MemoryCase(*each) for each in selection.combinations(("60m",), (128,), (half,))]
    if on_gpu:
        return [MemoryCase(model, 128, half) for model in (("60m",) if selection.quick else ("60m", "350m", "1b", "7b"))]
    return [MemoryCase("28x512", 128, half)] if selection.quick else [MemoryCase("28x512", 128, half), MemoryCase("60m", 128, single)]


def run(case: MemoryCase, context: Context) -> list[Row]:
    weights = shapes.model_shapes(case.model)
    theory = case.theory_bytes()
    rows: list[Row] = []
    rest: list[Row] = []
    for name, (build, dtype) in case.contenders().items():
        copies = 4 if name.startswith("AdamW") else 3  # of the model: weights, gradients, full-rank states or some of lower rank
        params = built = None
        try:
            require_room(copies * shapes.elements(case.model) * dtype.itemsize, context.on_gpu)
            with context.setting_up("memory", name):
                params = contenders.make_params(weights, dtype, context.device)
                built = build(params, case.rank)
                built.step()
                _, peak = peak_bytes(built.step, context.on_gpu)
                held = tensor_bytes(list(built.state.values()))
            if name in contenders.OURS and held != theory[name]:
                raise WrongResult(f"it holds {held} bytes of state, the formula says {theory[name]}")
        except Exception as why:
            rest.append(not_measured(case.label, name, why))
            continue
        finally:
            del params, built
            gc.collect()
            if context.on_gpu:
                torch.cuda.empty_cache()
        row: Row = {"case": case.label, "suite": "memory", "model": case.model, "rank": case.rank, "dtype": shapes.dtype_name(case.dtype)}
        row |= {"contender": name, "weights_dtype": shapes.dtype_name(dtype), "state_mb": held / 1e6, "step_peak_mb": peak / 1e6}
        row |= {"theory_mb": theory[name] / 1e6} if name in theory else {}
        rows.append(row)
    base = next((row["state_mb"] for row in rows if row["contender"] == OURS), None)
    return [row | ({"ratio_to_ours": row["state_mb"] / base} if base else {}) for row in rows] + rest
