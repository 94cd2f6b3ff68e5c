"""What torch allows fp32 products to be computed in, asked and set in a way that fits its old and its new settings.

Since torch 2.9 each backend has `fp32_precision`, and `torch.get_float32_matmul_precision()` raises once that was used.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch


def _backends() -> list[object]:
    """The matmul settings of CUDA and oneDNN that have `fp32_precision`; none before torch 2.9."""
    return [b for b in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)) if hasattr(b, "fp32_precision")]


def tf32_allowed() -> bool:
    """Whether fp32 products on a GPU may run in tf32."""
    if backends := _backends():
        return backends[0].fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


_lock = threading.Lock()
_users = 0
_restore: list[tuple[object, str]] = []


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, whatever is allowed outside.

    The settings are the whole process's: the first of several threads in here changes them, the last one puts them back.
    """
    global _users, _restore
    with _lock:
        if _users == 0:
            _restore = _set_full()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _put_back(_restore)


def _set_full() -> list[tuple[object, str]]:
    """(backend, its setting) for each; one pair without a backend before torch 2.9."""
    if not (backends := _backends()):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return [(None, before)]
    allowed = [(backend, backend.fp32_precision) for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    return allowed


def _put_back(allowed: list[tuple[object, str]]) -> None:
    for backend, value in allowed:
        if backend is None:
            torch.set_float32_matmul_precision(value)
        else:
            backend.fp32_precision = value
