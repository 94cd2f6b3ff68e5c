"""What nvcc makes of the CUDA kernels for GPUs that are not here: no warning, no spill, no block that does
not fit.

Everything is compiled with the flags that setup.py and PyTorch's CUDAExtension give, which take the
conversions of 16-bit types away.
"""

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc" / "cuda"
ARCHITECTURES = ["80", "90a", "100a"]
REGISTERS_PER_BLOCK = 65536
REGISTER_GRANULE = 8  # registers of a thread are allocated in eights
STATIC_SHARED_LIMIT = 48 * 1024
# The constant that bounds a kernel's threads a block, and how many of its kernels there are: one for each
# element type.
KERNELS = {
    "cholesky_inverse": ("cholesky_inverse_kernel", "cholesky_inverse.cuh", "CHOLESKY_THREADS", 2),
    "jacobi": ("jacobi_round_kernel", "jacobi.cuh", "JACOBI_MAX_THREADS", 2),
    "sketch": ("fill_kernel", "sketch.cu", "THREADS", 6),
}


class Usage(NamedTuple):
    kernel: str
    arch: str
    registers: int
    spilled: int
    stack: int
    shared: int


class Reached(BaseException):
    """Ends a build where compiling would begin. No Exception, for setup.py explains those away."""


@pytest.fixture(scope="module")
def build_flags(setup_module):
    """What setup.py and torch.utils.cpp_extension would give nvcc, read off a build that stops before its
    first command, but for the architectures."""
    found = setup_module.find_nvcc(os.environ)
    if found is None:
        pytest.skip("no nvcc")
    from setuptools.dist import Distribution
    from torch.utils import cpp_extension

    written = {}

    def stop(**arguments):
        written.update(arguments)
        raise Reached

    version = re.search(r"release (\d+\.\d+)", setup_module.output_of(found[0], "--version")).group(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOME", found[1])
        patch.setenv("CXX", setup_module.find_compiler(os.environ))
        patch.setattr(cpp_extension, "CUDA_HOME", found[1])
        patch.setattr(torch.version, "cuda", version)  # a torch without CUDA has the same flags
        patch.setattr(cpp_extension, "_write_ninja_file_and_compile_objects", stop)
        patch.chdir(ROOT)
        command = setup_module.BuildOrExplain(Distribution({"name": setup_module.PACKAGE}))
        with pytest.raises(Reached):
            command.compile(setup_module.find_cuda(version, os.environ))

    flags = shlex.split(" ".join([*written["cuda_cflags"], *written["cuda_post_cflags"]]))
    return [flag for flag in flags if "-gencode" not in flag]


def test_the_flags_are_those_of_a_real_build(build_flags):
    from torch.utils import cpp_extension

    assert set(cpp_extension.COMMON_NVCC_FLAGS) < set(build_flags)
    assert "-D__CUDA_NO_BFLOAT16_CONVERSIONS__" in build_flags
    assert "-O3" in build_flags and any(flag.startswith("-std=c++") for flag in build_flags)


@pytest.fixture(scope="module")
def usages(build_flags, tmp_path_factory):
    nvcc = shutil.which("nvcc")
    folder = tmp_path_factory.mktemp("nvcc")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]

    def compile_one(name):
        flags = [*build_flags, "-Xptxas", "-v", "-Werror", "all-warnings", *targets]
        done = subprocess.run([nvcc, *flags, str(CSRC / f"{name}.cu"), "-o", str(folder / f"{name}.o")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return parse(done.stdout + done.stderr)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(KERNELS, pool.map(compile_one, KERNELS), strict=True))


def parse(log):
    found = []
    for part in log.split("Compiling entry function")[1:]:
        kernel, arch = re.search(r"'(\w+)' for 'sm_(\w+)'", part).groups()
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(Usage(kernel, arch, registers, stores + loads, stack, int(shared.group(1)) if shared else 0))
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_every_architecture(usages, name):
    kernel, _, _, count = KERNELS[name]
    assert all(kernel in usage.kernel for usage in usages[name])
    for arch in ARCHITECTURES:
        assert sum(usage.arch == arch for usage in usages[name]) == count


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_spills(usages, name):
    assert [usage for usage in usages[name] if usage.spilled] == []


def test_register_arrays_stay_in_registers(usages):
    assert [usage for name in ("cholesky_inverse", "jacobi") for usage in usages[name] if usage.stack] == []


@pytest.mark.parametrize("name", KERNELS)
def test_a_block_fits(usages, name):
    _, source, constant, _ = KERNELS[name]
    threads = int(re.search(rf"constexpr int {constant} = (\d+);", (CSRC / source).read_text()).group(1))
    for usage in usages[name]:
        registers = -(-usage.registers // REGISTER_GRANULE) * REGISTER_GRANULE
        assert registers * threads <= REGISTERS_PER_BLOCK, usage
        assert usage.shared <= STATIC_SHARED_LIMIT, usage


def test_the_packed_triangle_may_take_all_shared_memory(usages):
    """The limits on l in cholesky_inverse.h, which test_emulation.py checks, leave nothing for static shared
    memory."""
    assert [usage for usage in usages["cholesky_inverse"] if usage.shared] == []


def test_four_elements_are_stored_by_one_instruction(build_flags, tmp_path):
    output = tmp_path / "sketch.ptx"
    flags = [flag for flag in build_flags if flag != "-c"]
    subprocess.run(["nvcc", *flags, "-ptx", "-arch=compute_80", str(CSRC / "sketch.cu"), "-o", str(output)], check=True)
    stores = re.findall(r"st\.global\.wb\.(v\d\.u32)", output.read_text())
    # bf16 and fp16: 8 bytes each; fp32 normals and Gumbels: 16; fp64 and int64: twice 16.
    assert sorted(stores) == ["v2.u32"] * 2 + ["v4.u32"] * 6


def test_headers_need_no_more_than_the_runtime_api(tmp_path):
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    if nvcc is None or compiler is None:
        pytest.skip("no nvcc, or no g++")
    log = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "-"], input="", capture_output=True, text=True).stderr
    include = re.search(r'INCLUDES="-I([^"]+)"', log).group(1).strip()
    headers = [f"{name}.h" for name in KERNELS]
    for header in headers:
        assert re.findall(r"#include <(cuda.*)>", (CSRC / header).read_text()) == ["cuda_runtime_api.h"]
    source = tmp_path / "binding.cpp"
    source.write_text("".join(f'#include "{header}"\n' for header in headers))
    subprocess.run(
        [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{CSRC}", f"-I{include}", str(source)], check=True
    )
