"""Storage: the base class of storages."""

from __future__ import annotations

import torch
from torch import Tensor

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name → shape and dtype."""


class Storage:
    """Converts between stored tensors and the values that a rule computes with."""

    name: str

    def layout(self, shapes: dict[str, tuple[int, int]], state_dtype: torch.dtype) -> Layout:
        """Names, shapes and dtypes of the tensors that store values of these names and shapes. state_dtype:
        fp32, or fp64 for fp64 weights."""
        raise NotImplementedError

    def load(self, stored: dict[str, Tensor], state_dtype: torch.dtype) -> dict[str, Tensor]:
        """The values in `state_dtype`. They may be the stored tensors themselves."""
        raise NotImplementedError

    def store_(self, values: dict[str, Tensor], stored: dict[str, Tensor], step: float | Tensor) -> None:
        """Writes the values that `load` returned, and that a rule has changed, back into `stored`. step: the
        number of the update that changed them."""
        raise NotImplementedError
