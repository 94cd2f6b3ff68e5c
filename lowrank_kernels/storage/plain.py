"""Plain: stores states uncoded, in fp32, or in fp64 for fp64 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .storage import Layout, Storage


class Plain(Storage):
    name = "plain"

    def layout(self, shapes: dict[str, tuple[int, int]], state_dtype: torch.dtype) -> Layout:
        return {name: (shape, state_dtype) for name, shape in shapes.items()}

    def load(self, stored: dict[str, Tensor], state_dtype: torch.dtype) -> dict[str, Tensor]:
        return stored

    def store_(self, values: dict[str, Tensor], stored: dict[str, Tensor], step: float | Tensor) -> None:
        pass
