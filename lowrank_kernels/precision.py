"""Reads and sets the precision in which torch may compute products of fp32 and bf16 matrices, with its old
and its new settings.

Since torch 2.9 each backend has `fp32_precision`. Once that has been used,
`torch.get_float32_matmul_precision()` raises.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

Settings = list[tuple[object, object]]
"""Pairs of (backend, its setting before)."""


def _backends() -> list[object]:
    """The matmul settings of CUDA and oneDNN that have `fp32_precision`. There are none before torch 2.9."""
    return [b for b in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)) if hasattr(b, "fp32_precision")]


def tf32_allowed() -> bool:
    """Whether fp32 products on a GPU may run in tf32."""
    if backends := _backends():
        return backends[0].fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


class _Full:
    """A context in which torch's settings demand full precision.

    The settings belong to the whole process. The first of several threads to enter changes them, and the last
    one to leave puts them back.

    fill: changes the settings and returns those from before. put_back: restores them.
    """

    def __init__(self, fill: Callable[[], Settings], put_back: Callable[[Settings], None]) -> None:
        self._fill, self._put_back = fill, put_back
        self._lock, self._users, self._before = threading.Lock(), 0, []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._before = self._fill()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._put_back(self._before)


def _set_full() -> Settings:
    """Sets every backend to fp32. Returns (backend, its setting before) for each; before torch 2.9 this is
    one pair with None as the backend."""
    if not (backends := _backends()):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return [(None, before)]
    allowed = [(backend, backend.fp32_precision) for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    return allowed


def _put_back(allowed: Settings) -> None:
    for backend, value in allowed:
        if backend is None:
            torch.set_float32_matmul_precision(value)
        else:
            backend.fp32_precision = value


def _sum_in_fp32() -> Settings:
    """Makes cuBLAS add up products of bf16 matrices in fp32. Where it does so already, the setting stays as
    it is, because it also says whether split sums are allowed."""
    matmul = torch.backends.cuda.matmul
    if not matmul.allow_bf16_reduced_precision_reduction:
        return []
    matmul.allow_bf16_reduced_precision_reduction = False
    return [(matmul, True)]


def _sum_as_before(allowed: Settings) -> None:
    for matmul, value in allowed:
        matmul.allow_bf16_reduced_precision_reduction = value


full_precision = _Full(_set_full, _put_back)
"""`with full_precision():` computes fp32 products in fp32, whatever is allowed outside."""
full_accumulation = _Full(_sum_in_fp32, _sum_as_before)
"""`with full_accumulation():` adds up products of bf16 matrices in fp32. Outside of it cuBLAS may add up
parts of a sum in bf16."""
