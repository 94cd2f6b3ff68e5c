"""What only a torch with CUDA can build is at least checked by the compiler here, with the one header that a
CPU build of torch lacks."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="module")
def includes(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if shutil.which("g++") is None or nvcc is None:
        pytest.skip("needs g++, and nvcc for CUDA's headers")
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    toolkit = Path(re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE).group(1).strip()) / "include"
    folder = tmp_path_factory.mktemp("generated")
    missing = folder / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    missing.parent.mkdir(parents=True)
    missing.write_text("#pragma once\n")
    return [str(folder), *cpp_extension.include_paths(), str(toolkit), str(CSRC)]


# The sources in which LOWRANK_KERNELS_CUDA changes something.
SOURCES = sorted(path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*.cpp") if "LOWRANK_KERNELS_CUDA" in path.read_text())


def check(includes, source):
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-DLOWRANK_KERNELS_CUDA", *(f"-isystem{folder}" for folder in includes)]
    done = subprocess.run(["g++", *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


def test_all_sources_compile_for_a_torch_with_cuda(includes, tmp_path):
    """In one translation unit, which reads torch's headers once."""
    unit = tmp_path / "unit.cpp"
    unit.write_text("".join(f'#include "{CSRC / source}"\n' for source in ["cuda/binding.cpp", *SOURCES]))
    check(includes, unit)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["cuda/binding.cpp", *SOURCES])
def test_each_source_compiles_by_itself(includes, source):
    check(includes, CSRC / source)
