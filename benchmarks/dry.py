"""Triton launches on a machine without a GPU. They do all that a launch on a GPU does, except run the kernel.

Arguments are bound and specialised, and the kernel is compiled for a GPU that need not be here. Its resources
are checked against that GPU's limits. Only two things are replaced: the driver, by one that names a target,
and the call that would start the kernel. So the launchers themselves choose the configuration, the arguments
and their specialisation. The memory that a launch would have written is unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from lowrank_kernels import backends
from lowrank_kernels.backends.triton import choose

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that a block may use, by architecture."""
REGISTERS, REGISTER_GRANULE = 65536, 8
"""Registers of a block on every architecture since sm_70. A thread's registers are allocated in eights."""
GRID_LIMIT = (2**31 - 1, 65535, 65535)

OnLaunch = Callable[[object, tuple[int, ...], dict], None]
"""A function of the compiled kernel, the grid, and the keyword arguments of the launch."""


class WouldNotRun(Exception):
    """A launch compiles, but a GPU would refuse it."""


class Target:
    """Stands in for Triton's active driver. It names an architecture, 90 for sm_90 or AMD's "gfx942", and has
    no device."""

    def __init__(self, arch: int | str):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32) if isinstance(self.arch, int) else GPUTarget("hip", self.arch, 64)

    def get_current_device(self) -> int | str:
        return self.arch  # so that each architecture has a cache of compiled kernels of its own

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def launches(arch: int | str, on_launch: OnLaunch | None = None) -> Iterator[None]:
    """Within this context a launch ends after compilation for an architecture. The kernels must not have been
    imported for Triton's interpreter."""
    run, architecture = triton.JITFunction.run, choose.architecture

    def compile_only(self, *arguments, grid, warmup, **keywords):
        kernel = run(self, *arguments, grid=grid, warmup=True, **keywords)
        if on_launch is not None:
            on_launch(kernel, grid, keywords)
        return kernel

    triton.runtime.driver.set_active(Target(arch))
    triton.JITFunction.run, choose.architecture = compile_only, lambda device: arch
    try:
        yield
    finally:
        triton.JITFunction.run, choose.architecture = run, architecture


def check(kernel: object, grid: tuple[int, ...], arch: int) -> None:
    """Raises WouldNotRun if a launch needs more than sm_<arch> has: blocks along the grid, shared memory,
    registers."""
    name, threads = kernel.metadata.name, 32 * kernel.metadata.num_warps
    if any(not 1 <= blocks <= most for blocks, most in zip(grid, GRID_LIMIT, strict=False)):
        raise WouldNotRun(f"{name}: a grid of {grid} is outside of 1 to {GRID_LIMIT}")
    if kernel.metadata.shared > SHARED_LIMIT[arch]:
        raise WouldNotRun(f"{name}: {kernel.metadata.shared} bytes of shared memory and sm_{arch} has {SHARED_LIMIT[arch]} for a block")
    registers = -(-resources(kernel.asm["cubin"])["REG"] // REGISTER_GRANULE) * REGISTER_GRANULE
    if registers * threads > REGISTERS:
        raise WouldNotRun(f"{name}: {registers} registers in each of {threads} threads and a block has {REGISTERS}")


@functools.cache  # many tests repeat a launch, and its cubin is the same object
def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL and more of a kernel, as cuobjdump reads them."""
    return resource_usage(cuobjdump(cubin, "--dump-resource-usage"))


def resource_usage(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def cuobjdump(cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tool("cuobjdump", *options, file.name)


def tool(name: str, *arguments: str) -> str:
    """The output of one of the tools in Triton's wheel."""
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def backend_of_a_gpu() -> None:
    """From now on a step on CPU tensors runs the kernels' launchers, as on GPU tensors."""
    backends.BACKENDS["cpu"] = backends.BACKENDS["cuda"]


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter, which compiles nothing."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
