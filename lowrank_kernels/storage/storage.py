"""What a storage is."""

from __future__ import annotations

import torch
from torch import Tensor

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name → shape and dtype."""


class Storage:
    """Stored tensors ↔ the values that a rule computes with."""

    name: str

    def layout(self, shapes: dict[str, tuple[int, int]], state_dtype: torch.dtype) -> Layout:
        """What is stored for values of these names and shapes. state_dtype: fp32, fp64 for fp64 weights."""
        raise NotImplementedError

    def load(self, stored: dict[str, Tensor], state_dtype: torch.dtype) -> dict[str, Tensor]:
        """The values, in `state_dtype`; they may be the stored tensors themselves."""
        raise NotImplementedError

    def store_(self, values: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
        """Writes back what `load` gave and a rule changed."""
        raise NotImplementedError
