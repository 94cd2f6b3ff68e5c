"""Builds lowrank_kernels/_C, the compiled operators of csrc/. All metadata stands in pyproject.toml.

LOWRANK_KERNELS_BUILD
    unset   build what can be built here; if nothing can be, install without it and say why
    0       build nothing, and remove from the source folder what an earlier build left there
    1       fail if a part cannot be built; a torch with CUDA but no nvcc at all still gets the C++ part
    cuda    as 1, and the CUDA part must be built too
CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean for every PyTorch extension.

LOWRANK_KERNELS_WHEEL=1 makes a wheel that is given to others: its version and its requirements name the torch
that the library fits, as 0.1.0+torch2.13.cpu and torch==2.13.*. Without a library a wheel is pure.

The library does not link to Python: lowrank_kernels/extension.py loads it with torch.ops.load_library, so one
file serves every version of Python. _build.json beside it says what was built, and why other parts were not.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
PACKAGE = "lowrank_kernels"
LIBRARY = "_C" + (".pyd" if os.name == "nt" else ".so")
FACTS = "_build.json"
MODES = ("", "0", "1", "cuda")
ARCHS = (80, 90, 100)  # A100, H100, B200; newer GPUs compile the PTX of the last one when they first run it
digest = runpy.run_path(str(ROOT / PACKAGE / "source_digest.py"))["digest"]  # the loader compares with the same function
REINSTALL = "Then reinstall, in the source folder: pip install --no-build-isolation -e ."


class NotBuilt(Exception):
    """The extension, or its CUDA part, cannot be built here. The message says why and what to do, as half a
    sentence for the user."""


class NoToolkit(NotBuilt):
    """torch has CUDA, but there is no nvcc. Most machines that only run models are like that."""


@dataclass
class Facts:
    """_build.json. `sources`: source_digest of csrc/; `reason`: why there is no library; `cuda_reason`: why
    it has no CUDA part although torch has CUDA; `cusolver`: the version that the CUDA part calls, if it does.
    """

    torch: str | None = None
    sources: str | None = None
    cuda: str | None = None
    archs: list[str] = field(default_factory=list)
    cusolver: str | None = None
    compiler: str | None = None
    reason: str | None = None
    cuda_reason: str | None = None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FACTS).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


@dataclass
class Cuda:
    home: str
    version: str
    archs: list[str]  # as _build.json names them
    flags: list[str]  # for nvcc; empty if TORCH_CUDA_ARCH_LIST makes torch write them
    solver: Solver | None = None


@dataclass
class Solver:
    """cuSOLVER's headers. `version`: "12.0.4"; `folders`: what else must be searched to find them, as
    cuSOLVER may come from a package of Python and not from the toolkit."""

    version: str
    folders: list[str]


def build_mode(environ: Mapping[str, str]) -> str:
    mode = environ.get("LOWRANK_KERNELS_BUILD", "")
    if mode not in MODES:
        raise SetupError(f"LOWRANK_KERNELS_BUILD must be unset, 0, 1 or cuda, got {mode!r}")
    return mode


def sources(cuda: bool) -> list[str]:
    """Source files relative to ROOT, as setuptools wants them. The .cu files hold kernels without torch.
    binding.cpp connects them with torch, and cusolver.cpp calls cuSOLVER."""
    found = sorted(ROOT.glob("csrc/*.cpp"))
    if cuda:
        found += [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "csrc/cuda/binding.cpp", ROOT / "csrc/cuda/cusolver.cpp"]
    return [path.relative_to(ROOT).as_posix() for path in found]


def headers() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cuh"))


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise NotBuilt(f"pip's build isolation hides torch, or torch is not installed ({error}); install it first") from error
    return torch


def find_compiler(environ: Mapping[str, str]) -> str:
    """CXX, or the first usual name that is on PATH. On Windows setuptools finds MSVC by itself."""
    if os.name == "nt":
        return "cl"
    for candidate in [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0], path=environ.get("PATH")):
            return candidate
    raise NotBuilt(f"no C++ compiler was found ({environ.get('CXX') or 'c++, g++ or clang++'}); install one or set CXX")


def output_of(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode == 0 else ""


def compiler_version(compiler: str) -> str:
    return (output_of(*shlex.split(compiler), "--version").splitlines() or [compiler])[0] if os.name != "nt" else "MSVC"


def find_nvcc(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """(nvcc, CUDA_HOME), or None. The nvcc on PATH may be a script that only calls the real one, so ask nvcc
    itself where its toolkit is."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else environ.get("PATH"))
    if not nvcc and not home:
        nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        return None
    home = home or str(Path(nvcc).parent.parent)
    if not Path(home, "include/cuda_runtime.h").exists():
        top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
        home = os.path.normpath(top.group(1).strip()) if top else home
    return nvcc, home


def arch_flags(environ: Mapping[str, str], known: str) -> tuple[list[str], list[str]]:
    """(names for the report, flags for nvcc). `known`: the output of nvcc --list-gpu-arch."""
    if listed := environ.get("TORCH_CUDA_ARCH_LIST"):
        names = [re.sub(r"^(\d+)\.(\d+\w?)", r"sm_\1\2", arch) for arch in re.split("[; ]+", listed) if arch]
        return names, []
    archs = [arch for arch in ARCHS if not known or re.search(rf"\bcompute_{arch}\b", known)]
    if not archs:
        raise NotBuilt(f"nvcc compiles for none of {', '.join(f'sm_{arch}' for arch in ARCHS)}; set TORCH_CUDA_ARCH_LIST")
    newest = archs[-1]
    names = [f"sm_{arch}" for arch in archs[:-1]] + [f"sm_{newest}+PTX"]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return names, [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def find_cuda(torch_cuda: str | None, environ: Mapping[str, str]) -> Cuda | None:
    """The toolkit for a torch of CUDA version `torch_cuda`; None where torch has no CUDA."""
    if not torch_cuda:
        return None
    found = find_nvcc(environ)
    if found is None:
        raise NoToolkit("no nvcc was found; install a CUDA toolkit or set CUDA_HOME")
    nvcc, home = found
    release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    if not release:
        raise NotBuilt(f"{nvcc} does not tell its version")
    version = release.group(1)
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        raise NotBuilt(f"{nvcc} is of CUDA {version} and torch of CUDA {torch_cuda}; set CUDA_HOME to a toolkit of torch's major version")
    return Cuda(home, version, *arch_flags(environ, output_of(nvcc, "--list-gpu-arch")), solver=find_solver(home, version))


def find_solver(home: str, cuda: str) -> Solver | None:
    """cuSOLVER's headers, of the toolkit or of the packages that torch's wheels for Linux bring. None where
    there are none that have cusolverDnXsyevBatched; csrc/cuda/cusolver.cpp then leaves the call out."""
    beside = Path(import_torch().__file__).parent.parent / "nvidia"
    packages = [beside / name / "include" for name in (f"cu{cuda.split('.')[0]}", "cusolver", "cublas", "cusparse")]
    for folder in [Path(home, "include"), *packages]:
        header = folder / "cusolver_common.h"
        if header.is_file():
            text = header.read_text(encoding="utf-8", errors="replace")
            parts = [re.search(rf"#define CUSOLVER_VER_{part} +(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
            version = [int(part.group(1)) for part in parts if part]
            found = [str(each) for each in packages if each.is_dir()] if folder in packages else []
            return Solver(".".join(map(str, version)), found) if version >= [11, 7, 1] else None
    return None


def solver_libraries(torch_libraries: Path) -> list[str]:
    """What the call of cuSOLVER is linked to. torch's handles are in a library of their own in wheels for
    Linux, and that or torch's CUDA library brings cuSOLVER with it."""
    if os.name == "nt":
        return ["cusolver"]
    return ["torch_cuda_linalg"] if (torch_libraries / "libtorch_cuda_linalg.so").is_file() else []


def compile_flags(sanitize: bool) -> tuple[list[str], list[str]]:
    """(flags for the C++ compiler, flags for the linker). BuildExtension chooses the C++ standard, because
    each torch knows what its headers need."""
    if os.name == "nt":
        return ["/O2", "/openmp"], []
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # at::parallel_for is a template, so its loop is compiled here
    if sanitize:
        # vptr needs the type information of torch's classes, which torch does not export.
        checks = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
        return ["-O1", "-g", "-fno-omit-frame-pointer", "-fvisibility=hidden", *checks, *openmp], [*checks, *openmp]
    return ["-O3", "-g0", "-fvisibility=hidden", *openmp], openmp


class BuildOrExplain(build_ext):
    """build_ext that leaves either a library or the reason why there is none."""

    user_options = [*build_ext.user_options, ("sanitize", None, "the C++ part with AddressSanitizer and UBSan (see make sanitize)")]
    boolean_options = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self):
        super().initialize_options()
        self.sanitize = False

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def folders(self) -> list[Path]:
        """The folders for the library and its facts: the wheel's tree and, for an editable install or
        --inplace, the source folder."""
        return [Path(self.build_lib, PACKAGE)] + ([ROOT / PACKAGE] if self.inplace else [])

    def run(self):
        mode = build_mode(os.environ)
        try:
            facts = self.build(mode)
        except NotBuilt as why:
            if mode in ("1", "cuda"):
                raise SetupError(f"{PACKAGE}: {why} (an error because of LOWRANK_KERNELS_BUILD={mode}). {REINSTALL}") from why
            facts = Facts(reason=str(why))
            self.extensions = []
            for folder in self.folders():
                (folder / LIBRARY).unlink(missing_ok=True)
        for folder in self.folders():
            facts.write(folder)
        if mode != "0" and (why := facts.reason or facts.cuda_reason):
            part, where = ("extension", "") if facts.reason else ("CUDA part of the extension", " on a GPU")
            slower = f"the subspace refresh will run in PyTorch{where}, which is slower"
            print(f"\nWARNING: {PACKAGE}: the {part} is not built: {why}. As it is, {slower}. {REINSTALL}\n", file=sys.stderr, flush=True)
        if facts.cuda and not facts.cusolver:
            missing = "cuSOLVER's headers, of CUDA 12.6.2 or newer, were not found in the toolkit or beside torch"
            instead = "on a GPU every eigenproblem of the subspace refresh goes to a Jacobi kernel"
            print(f"\nWARNING: {PACKAGE}: {missing}. As it is, {instead}. {REINSTALL}\n", file=sys.stderr, flush=True)

    def build(self, mode: str) -> Facts:
        if mode == "0":
            raise NotBuilt("skipped by LOWRANK_KERNELS_BUILD=0")
        if not sources(cuda=False):
            raise NotBuilt("csrc/ holds no sources")
        compiler = find_compiler(os.environ)
        torch = import_torch()
        facts = Facts(torch=torch.__version__, sources=digest(ROOT / "csrc"), compiler=compiler_version(compiler))
        os.environ["CXX"] = compiler
        if shutil.which("ninja") is None:  # pip does not put the scripts of its Python on PATH
            os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
        cuda = None
        try:
            cuda = None if self.sanitize else find_cuda(torch.version.cuda, os.environ)
            if cuda is not None:
                self.compile(cuda)
        except NotBuilt as why:
            if mode == "cuda" or (mode == "1" and not isinstance(why, NoToolkit)):
                raise
            cuda, facts.cuda_reason = None, str(why)
        if cuda is not None:
            facts.cuda, facts.archs, facts.cusolver = cuda.version, cuda.archs, cuda.solver and cuda.solver.version
        elif mode == "cuda":
            raise NotBuilt("this torch has no CUDA")
        else:
            self.compile(None)
        return facts

    def compile(self, cuda: Cuda | None) -> None:
        """Compiles with torch's BuildExtension, into a folder that outlives pip's call. The next build then
        compiles only what changed."""
        if cuda is not None:
            os.environ["CUDA_HOME"] = cuda.home
        import torch
        from torch.utils import cpp_extension

        cxx, link = compile_flags(self.sanitize)
        arguments = {
            "sources": sources(cuda is not None),
            "include_dirs": [str(ROOT / "csrc")],
            "depends": headers(),
            "extra_compile_args": {"cxx": cxx},
            "extra_link_args": link,
            "py_limited_api": True,  # so it is not linked to libtorch_python
        }
        if cuda is not None:
            hidden = [] if os.name == "nt" else ["-Xcompiler", "-fvisibility=hidden"]
            arguments["extra_compile_args"]["nvcc"] = ["-O3", *hidden, *cuda.flags]
            arguments["define_macros"] = [("LOWRANK_KERNELS_CUDA", None)]
            if cuda.solver is not None:
                arguments["define_macros"].append(("LOWRANK_KERNELS_CUSOLVER", None))
                # Searched last, and for C++ alone: nvcc has the toolkit's headers.
                arguments["extra_compile_args"]["cxx"] = [*cxx, *(f"-idirafter{folder}" for folder in cuda.solver.folders)]
                arguments["libraries"] = solver_libraries(Path(torch.__file__).parent / "lib")
        try:
            declare = cpp_extension.CppExtension if cuda is None else cpp_extension.CUDAExtension
            extension = declare(f"{PACKAGE}._C", **arguments)
            extension._full_name, extension._links_to_dynamic, extension._needs_stub = extension.name, False, False
            command = cpp_extension.BuildExtension(self.distribution, no_python_abi_suffix=True)
            command.build_lib, command.inplace = self.build_lib, self.inplace
            command.build_temp = str(ROOT / "build" / ("objects-sanitize" if self.sanitize else f"objects-{torch.__version__}"))
            command.ensure_finalized()
            command.extensions = [extension]
            command.run()
        except Exception as error:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise NotBuilt(f"compiling failed ({last}); the build's output, with pip under -v, has the compiler's messages") from error

    def get_outputs(self):
        return [*super().get_outputs(), str(Path(self.build_lib, PACKAGE, FACTS))]

    def get_output_mapping(self):
        facts = {str(Path(self.build_lib, PACKAGE, FACTS)): str(Path(PACKAGE, FACTS))} if self.inplace else {}
        return {**super().get_output_mapping(), **facts}


class NamedForTorch(Distribution):
    """The distribution of pyproject.toml. With LOWRANK_KERNELS_WHEEL=1 its version and requirements name
    torch. They do not otherwise, because pip refuses an sdist that gives another version than its name."""

    def parse_config_files(self, *arguments, **options):
        super().parse_config_files(*arguments, **options)
        if os.environ.get("LOWRANK_KERNELS_WHEEL", "0") != "0":
            release, build = fits(import_torch().__version__)
            self.metadata.version = f"{self.metadata.version}+torch{release}.{build}"
            others = [each for each in self.install_requires if not re.match(r"torch\b", each)]
            self.install_requires = self.metadata.install_requires = [f"torch=={release}.*", *others]


def fits(torch: str) -> tuple[str, str]:
    """("2.13", "cpu") of torch 2.13.0+cpu. Releases of one minor version share an ABI. PyPI's build of torch
    for Linux has CUDA and no local version; torch itself names that CUDA. Raises SetupError for a torch that
    is no release, whose ABI no requirement can name."""
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+(cpu|cu\d+|cxx11.*|rocm.*|xpu))?", torch)  # as extension.py has it
    if release is None:
        raise SetupError(f"LOWRANK_KERNELS_WHEEL=1 needs a released torch, got {torch}; leave it unset for a wheel of your own")
    cuda = import_torch().version.cuda
    return release.group(1), torch.partition("+")[2] or (f"cu{cuda.replace('.', '')}" if cuda else "cpu")


class PlatformWheel(bdist_wheel):
    """A wheel tagged py3-none-PLATFORM where it has a library: that is bound to a platform and a torch, not
    to a version of Python. Without one it is pure, py3-none-any."""

    def run(self):
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not Path(self.get_finalized_command("build").build_lib, PACKAGE, LIBRARY).is_file()
        if self.root_is_pure:  # else the files would be installed as those of a platform
            self.distribution.ext_modules = []
        super().run()

    def get_tag(self):
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"{PACKAGE}._C", sources(cuda=False), depends=headers())],
        cmdclass={"build_ext": BuildOrExplain, "bdist_wheel": PlatformWheel},
        distclass=NamedForTorch,
    )
