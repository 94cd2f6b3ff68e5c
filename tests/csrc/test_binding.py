"""What only a torch with CUDA can build is at least checked by the compiler here, with the one header that a
CPU build of torch lacks, and with declarations in the place of cuSOLVER's headers where there are none."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

CSRC = Path(__file__).parents[2] / "csrc"
# What csrc/cuda/cusolver.cpp and the headers of torch that it reads need of these libraries.
STAND_INS = {
    "cublas_v2.h": """
        typedef struct cublasContext* cublasHandle_t;
        typedef enum { CUBLAS_FILL_MODE_LOWER = 0 } cublasFillMode_t;
    """,
    "cublasLt.h": "typedef struct cublasLtContext* cublasLtHandle_t;",
    "cusparse.h": "typedef struct cusparseContext* cusparseHandle_t;",
    "cusolverDn.h": """
        #include <cublas_v2.h>
        #include <library_types.h>
        #include <cstddef>
        #include <cstdint>
        #define CUSOLVER_VERSION 11701
        typedef struct cusolverDnContext* cusolverDnHandle_t;
        typedef struct cusolverDnParams* cusolverDnParams_t;
        typedef enum { CUSOLVER_STATUS_SUCCESS = 0 } cusolverStatus_t;
        typedef enum { CUSOLVER_EIG_MODE_VECTOR = 1 } cusolverEigMode_t;
        extern "C" {
        cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t*);
        cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t);
        cusolverStatus_t cusolverDnXsyevBatched_bufferSize(
            cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cublasFillMode_t, int64_t, cudaDataType, const void*, int64_t,
            cudaDataType, const void*, cudaDataType, size_t*, size_t*, int64_t);
        cusolverStatus_t cusolverDnXsyevBatched(
            cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cublasFillMode_t, int64_t, cudaDataType, void*, int64_t,
            cudaDataType, void*, cudaDataType, void*, size_t, void*, size_t, int*, int64_t);
        }
    """,
}


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
    if not (toolkit / "cusolverDn.h").is_file():
        for name, declarations in STAND_INS.items():
            (folder / name).write_text(f"#pragma once\n{declarations}\n")
    return [str(folder), *cpp_extension.include_paths(), str(toolkit), str(CSRC)]


# The sources in which LOWRANK_KERNELS_CUDA changes something.
SOURCES = sorted(path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*.cpp") if "LOWRANK_KERNELS_CUDA" in path.read_text())
OF_CUDA = ["cuda/binding.cpp", "cuda/cusolver.cpp"]


def check(includes, source, macros=("LOWRANK_KERNELS_CUDA", "LOWRANK_KERNELS_CUSOLVER")):
    macros = [f"-D{macro}" for macro in macros]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", *macros, *(f"-isystem{folder}" for folder in includes)]
    done = subprocess.run(["g++", *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


def test_all_sources_compile_for_a_torch_with_cuda(includes, tmp_path):
    """In one translation unit, which reads torch's headers once."""
    unit = tmp_path / "unit.cpp"
    unit.write_text("".join(f'#include "{CSRC / source}"\n' for source in [*OF_CUDA, *SOURCES]))
    check(includes, unit)


@pytest.mark.slow
@pytest.mark.parametrize("source", [*OF_CUDA, *SOURCES])
def test_each_source_compiles_by_itself(includes, source):
    check(includes, CSRC / source)


@pytest.mark.slow
def test_the_call_of_cusolver_is_left_out_without_its_headers(includes):
    check(includes, CSRC / "cuda" / "cusolver.cpp", macros=("LOWRANK_KERNELS_CUDA",))
