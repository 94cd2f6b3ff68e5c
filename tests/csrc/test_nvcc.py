"""What nvcc makes of the CUDA kernels for GPUs that are not here: no warning, no spill, no block that does not fit."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = ["80", "90a", "100a"]
REGISTERS_PER_BLOCK = 65536
REGISTER_GRANULE = 8  # registers of a thread are allocated in eights
STATIC_SHARED_LIMIT = 48 * 1024
# The constant that bounds a kernel's threads a block, and how many of its kernels there are: one for each element type.
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


@pytest.fixture(scope="module")
def usages(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("nvcc")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]

    def compile_one(name):
        flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", "-c", *targets]
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
    """The limits on l in cholesky_inverse.h, which test_emulation.py checks, leave nothing for static shared memory."""
    assert [usage for usage in usages["cholesky_inverse"] if usage.shared] == []


def test_four_elements_are_stored_by_one_instruction(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    output = tmp_path / "sketch.ptx"
    subprocess.run(["nvcc", "-std=c++17", "-O3", "-ptx", "-arch=compute_80", str(CSRC / "sketch.cu"), "-o", str(output)], check=True)
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
