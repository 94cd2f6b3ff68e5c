"""A whole iteration of training (forward, backward and step) of a linear layer or LLaMA blocks, by the
methods that a user could train them with.

A contender is `build(case, batch, device) -> Training`. All contenders start from the same weights and get
the same input and the same gradient of their output. They free their gradients at the end of an iteration, as
zero_grad() does. Bases and random subspaces do not change.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lrk

from . import contenders, shapes
from .contenders import LR, NEVER
from .records import OURS

EXAMPLES = Path(__file__).parents[1] / "examples"
PARTS = ("forward", "backward", "step")
UNSHARED, GALORE = f"{OURS}, share=None", f"{OURS}, GaLoreAdamW"
DENSE = "AdamW(fused=True)"
CHECKPOINTED = f"{DENSE}, checkpointed"


class Trained(Protocol):
    """What is trained: `depth` blocks of a model of shapes.LLAMA, or a single layer, whose `model` is (in,
    out)."""

    @property
    def model(self) -> str | tuple[int, int]: ...
    @property
    def depth(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...


class Blocks(nn.Module):
    """Layers of the example's LLaMA on positions 0 … sequence − 1. `checkpointed`: each layer saves only its
    input and is computed again in the backward pass."""

    def __init__(self, model: str, depth: int, sequence: int, checkpointed: bool) -> None:
        super().__init__()
        if str(EXAMPLES) not in sys.path:
            sys.path.append(str(EXAMPLES))
        import llama

        hidden, intermediate, _ = shapes.LLAMA[model]
        head_dim = min(hidden // 2, 64 if hidden <= 2048 else 128)  # as in those models
        size = llama.Size(hidden, intermediate, depth, hidden // head_dim)
        self.layers, self.checkpointed = nn.ModuleList(llama.Layer(size) for _ in range(depth)), checkpointed
        cos, sin = llama.rotary_angles(torch.arange(sequence), head_dim)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False) if self.checkpointed else layer(x, self.cos, self.sin)
        return x


def make_module(case: Trained, device: str, checkpointed: bool = False) -> nn.Module:
    """Matrices from N(0, 0.02²), the same ones at every call."""
    if isinstance(case.model, str):
        with torch.device(device):
            module = Blocks(case.model, case.depth, case.sequence, checkpointed)
        module.layers.to(case.dtype)  # the angles stay in fp32
    else:
        module = nn.Linear(*case.model, bias=False, device=device, dtype=case.dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            if param.dim() > 1:
                param.copy_(torch.randn(param.shape, generator=generator, device=device).mul_(0.02))
    return module


class Training:
    """A module in training. A call runs one iteration. The code that builds it adds the optimizers."""

    def __init__(self, module: nn.Module, case: Trained, batch: int, device: str) -> None:
        width = shapes.LLAMA[case.model][0] if isinstance(case.model, str) else case.model[0]
        outputs = width if isinstance(case.model, str) else case.model[1]
        generator = torch.Generator(device).manual_seed(1)

        def noise(size: int) -> Tensor:
            return torch.randn(batch, case.sequence, size, generator=generator, device=device).to(case.dtype)

        self.module, self.on_gpu = module, device != "cpu"
        self.x, self.dy = noise(width).requires_grad_(), noise(outputs)
        self.optimizers: list[Optimizer | contenders.Built] = []
        self.marks: list[list[Any]] = []

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [param for param in self.module.parameters() if param.requires_grad]

    def gradients(self) -> None:
        """Computes the gradients of x and of all parameters."""
        self.module(self.x).backward(self.dy)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def free_gradients(self) -> None:
        for tensor in (self.x, *self.module.parameters()):
            tensor.grad = None

    def produced(self) -> Tensor:
        """x as an earlier layer would hand it over. It stays alive only while something saves it."""
        return self.x.clone()

    def __call__(self, produce: bool = False) -> None:
        marks = [self._now()]
        y = self.module(self.produced() if produce else self.x)
        marks.append(self._now())
        y.backward(self.dy)
        del y
        marks.append(self._now())
        self.step()
        marks.append(self._now())
        self.free_gradients()
        self.marks.append(marks)

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def parts_ms(self, rounds: int) -> dict[str, float]:
        """Median milliseconds of each part, over the last `rounds` iterations."""
        if self.on_gpu:
            torch.cuda.synchronize()
        passed = [
            [start.elapsed_time(end) if self.on_gpu else (end - start) * 1e3 for start, end in zip(marks, marks[1:], strict=False)]
            for marks in self.marks[-rounds:]
        ]
        return dict(zip(PARTS, torch.tensor(passed, dtype=torch.float64).median(0).values.tolist(), strict=True))


Build = Callable[[Trained, int, str], Training]


def rso(share: str | None) -> Build:
    def build(case: Trained, batch: int, device: str) -> Training:
        module = lrk.to_subspace(make_module(case, device), case.rank, share=share)
        training = Training(module, case, batch, device)
        training.optimizers = [lrk.RSOAdamW(module.parameters(), lr=LR, inner_steps=NEVER)]
        return training

    return build


def by_steps_of(build_step: contenders.Build, checkpointed: bool = False, matrices_only: bool = True) -> Build:
    """nn.Linear, trained by a contender of the step suite. With `matrices_only`, AdamW trains all parameters
    that are not matrices."""

    def build(case: Trained, batch: int, device: str) -> Training:
        training = Training(make_module(case, device, checkpointed), case, batch, device)
        training.gradients()  # the bases are chosen from these gradients
        matrices = [param for param in training.trainable if param.dim() > 1 or not matrices_only]
        others = [param for param in training.trainable if param.dim() == 1 and matrices_only]
        training.optimizers = [build_step(matrices, case.rank), *([contenders.adamw_fused(others, case.rank)] if others else [])]
        training.free_gradients()
        return training

    return build


LAYER: dict[str, Build] = {
    OURS: rso("auto"),
    GALORE: by_steps_of(contenders.STEP[OURS]),
    "galore-torch": by_steps_of(contenders.galore_torch),
    DENSE: by_steps_of(contenders.adamw_fused, matrices_only=False),
}
BLOCK = LAYER | {
    UNSHARED: rso(None),
    CHECKPOINTED: by_steps_of(contenders.adamw_fused, checkpointed=True, matrices_only=False),
}


def subspaces(module: nn.Module) -> list[lrk.nn.Subspace]:
    """Every subspace of the module, once."""
    return list({id(layer.subspace): layer.subspace for layer in layers(module).values()}.values())


def layers(module: nn.Module) -> dict[str, lrk.SubspaceLinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, lrk.SubspaceLinear)}


def kept_beside_weights(module: nn.Module, device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    """P and B of converted layers. They stay between iterations though no optimizer holds them."""
    bases = [subspace.matrix(torch.device(device), dtype) for subspace in subspaces(module)]
    return [*bases, *(layer.coordinates for layer in layers(module).values())]
