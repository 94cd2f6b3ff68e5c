"""What torch allows fp32 products to be computed in, asked and set in a way that fits its old and its new settings.

Since torch 2.9 each backend has `fp32_precision`, and `torch.get_float32_matmul_precision()` raises once that was used.
"""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, whatever is allowed outside."""
    if backends := _backends():
        allowed = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, value in zip(backends, allowed, strict=True):
                backend.fp32_precision = value
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
