"""Small results that are on their way from a GPU to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Arriving:
    """A copy to the host, begun at construction. On a CPU it is there at once."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not values.is_cuda:
            self._values = values
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(values.device))

    def has_arrived(self) -> bool:
        return self._event is None or self._event.query()

    def values(self) -> Tensor:
        """Waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
