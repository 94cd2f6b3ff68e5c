"""What forward and backward passes hold at a time, counted on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def most_of_passes(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    projected: Mapping[Tensor, int],
    in_backward: str | None,
    accumulator_dtype: torch.dtype,
    passes: int,
) -> int:
    """The most bytes that forward and backward passes hold at a time, gradients among them."""
    live = _Live((*model.parameters(), *model.buffers()))
    kept: dict[Tensor, Tensor] = {}

    def free(param: Tensor) -> None:
        if in_backward == "deferred" and param not in kept:
            dtype = torch.float64 if param.dtype == torch.float64 else accumulator_dtype
            kept[param] = torch.empty(projected[param], dtype=dtype, device="meta")
        param.grad = None

    hooks = [param.register_post_accumulate_grad_hook(free) for param in projected] if in_backward else []
    try:
        with live:
            for _ in range(passes):
                loss(model).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return live.most


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, while they live."""

    def __init__(self, known: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._keep = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += count
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, count)

    def _gone(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count
