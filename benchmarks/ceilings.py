"""The ceilings of this machine: copy bandwidth and matmul rates, measured at the start of every run. Results
are shares of these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .shapes import dtype_name
from .timing import interleave, time_once_ms


def measure(on_gpu: bool, seconds: float = 1.0) -> dict[str, float]:
    """copy_gb_per_s (bytes read plus written) and matmul_tflop_per_s_<dtype> for fp32 and bf16. The fastest
    product available counts.

    Sizes are far above any cache, and square matrices fill the machine. Each measurement takes `seconds`.
    """
    device = "cuda" if on_gpu else "cpu"
    found = {"copy_gb_per_s": _copy_gb_per_s(2**28 if on_gpu else 2**26, device, seconds)}
    for dtype in (torch.float32, torch.bfloat16):
        width = 8192 if on_gpu else _affordable_width(dtype, seconds)
        a, b = _factors(width, dtype, device)
        timings = interleave(_products(a, b), on_gpu, seconds, least_rounds=3, device_only=on_gpu)
        found[f"matmul_tflop_per_s_{dtype_name(dtype)}"] = 2 * width**3 / min(timing.p50 for timing in timings.values()) / 1e9
    return found


def rereads_gb_per_s(seconds: float = 1.0) -> float:
    """What the L2 cache of the current GPU gives where all programs read one small matrix, as they read P."""
    from . import rereads  # imports Triton

    return rereads.gb_per_s(seconds)


def _factors(width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(width, width, device=device).to(dtype) for _ in range(2)]


def _affordable_width(dtype: torch.dtype, seconds: float) -> int:
    """1536 on a CPU, or less if a product would take over a third of the time. Some CPUs multiply bf16 at a
    thousandth of their fp32 rate."""
    a, b = _factors(384, dtype, "cpu")
    trial_ms = [time_once_ms(lambda: a @ b, on_gpu=False) for _ in range(2)][1]
    return next((width for width in (1536, 768) if trial_ms * (width / 384) ** 3 <= seconds * 1e3 / 3), 384)


def _copy_gb_per_s(elements: int, device: str, seconds: float) -> float:
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    on_gpu = device == "cuda"
    copy = interleave({"copy": lambda: target.copy_(source)}, on_gpu, seconds, device_only=on_gpu)["copy"]
    return 2 * source.nbytes / copy.p50 / 1e6


def _products(a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """torch's own product, and on a CPU also oneDNN's. On some CPUs oneDNN beats the BLAS that torch calls in
    fp32."""
    runs = {"torch.mm": lambda: a @ b}
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    if onednn is not None and a.device.type == "cpu" and a.dtype == torch.float32:
        runs["oneDNN"] = lambda: onednn(a, b, None, "none", [], "")
    return runs
