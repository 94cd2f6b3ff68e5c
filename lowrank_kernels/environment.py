"""Reports what this installation can do on this machine: versions, devices, kernels and the extension. For
anything that is missing it gives the reason."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys

import torch

from . import extension
from .backends import cpu, cuda
from .ops import dispatch
from .precision import tf32_allowed
from .version import __version__


def environment() -> dict[str, str]:
    """Name → finding, in the order in which `report` prints them. This works without Triton, a compiler or a
    GPU."""
    return {
        "lowrank_kernels": f"{__version__} in {os.path.dirname(os.path.abspath(__file__))}",
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, built for {_torch_build()}",
        "Triton": _triton(),
        "extension": extension.status(),
        "C++ compiler": shutil.which(os.environ.get("CXX", "c++")) or "none found",
        "nvcc": shutil.which("nvcc") or "none found",
        "CPU": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, bf16 products {_cpu_bf16()}",
        "GPU": _gpus(),
        "step runs on": _step(),
        "tile shapes": tile_shapes(),
        "refresh runs on": _refresh(),
        "fp32 products": "tf32 allowed on a GPU" if tf32_allowed() else "in fp32",
    }


def report() -> str:
    """The findings of `environment` as text, one line each."""
    findings = environment()
    width = max(map(len, findings))
    return "\n".join(f"{name:<{width}}  {finding}" for name, finding in findings.items())


def _torch_build() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU only"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return f"not installed{'' if sys.platform == 'linux' else ' (it has no wheels for this platform)'}"
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # installed under another name: pytorch-triton, triton-windows, ...
        return importlib.import_module("triton").__version__


def _cpu_bf16() -> str:
    return "native" if cpu.NATIVE_BF16 else "in fp32 (no instructions for them)"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB")
    return "; ".join(found)


def _step() -> str:
    if dispatch.REFERENCE_FORCED:
        return "the reference in plain PyTorch everywhere (LOWRANK_KERNELS_REFERENCE is set)"
    on_gpu = "the reference in plain PyTorch on a GPU (Triton is missing)" if cuda.triton_missing() else "Triton kernels on a CUDA GPU"
    return f"{on_gpu}, batched PyTorch on a CPU, the reference elsewhere"


def tile_shapes() -> str:
    """Which table of tile shapes serves each GPU."""
    if not torch.cuda.is_available():
        return "chosen on a GPU"
    if importlib.util.find_spec("triton") is None:
        return "none (Triton is missing)"
    tuned = importlib.import_module(".backends.triton.tuned", __package__)
    names = dict.fromkeys(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return "; ".join(f"{name}: {tuned.describe(name)}" for name in names)


def _refresh() -> str:
    if dispatch.REFERENCE_FORCED:
        return "PyTorch everywhere (LOWRANK_KERNELS_REFERENCE is set)"
    on_cpu = "PyTorch (slower) on a CPU" if extension.missing("CPU") else "C++ on a CPU"
    on_gpu = "PyTorch (slower) on a CUDA GPU" if extension.missing("CUDA") else "CUDA C++ on a CUDA GPU"
    return f"{on_gpu}, {on_cpu}, PyTorch elsewhere"
