"""The build's decisions (setup.py) and the loader's (extension.py): each reason for having no extension is
found, said and harmless."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from lowrank_kernels import environment, extension
from lowrank_kernels.ops import dispatch
from lowrank_kernels.source_digest import digest

pytest.importorskip("setuptools.command.bdist_wheel")
ROOT = Path(__file__).parent.parent
RUNNING = "2.13.0+cpu"


@pytest.fixture
def build(setup_module):
    return setup_module


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit whose nvcc answers what setup.py asks: release 13.0, no architecture newer than
    sm_90."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda_runtime.h").touch()
    script(
        tmp_path / "bin/nvcc",
        'case "$1" in --version) echo "Cuda compilation tools, release 13.0, V13.0.48";; *) printf "compute_80\\ncompute_90\\n";; esac',
    )
    return tmp_path


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_mode(build):
    assert [build.build_mode({"LOWRANK_KERNELS_BUILD": mode}) for mode in ("", "0", "1", "cuda")] == ["", "0", "1", "cuda"]
    assert build.build_mode({}) == ""
    with pytest.raises(build.SetupError, match="LOWRANK_KERNELS_BUILD must be unset, 0, 1 or cuda, got 'yes'"):
        build.build_mode({"LOWRANK_KERNELS_BUILD": "yes"})


def test_sources_leave_out_what_only_tests_compile(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for name in ("a.cpp", "b.h", "cuda/k.cu", "cuda/k.cuh", "cuda/binding.cpp", "cuda/emulate.cpp"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert build.sources(cuda=False) == ["csrc/a.cpp"]
    assert build.sources(cuda=True) == ["csrc/a.cpp", "csrc/cuda/k.cu", "csrc/cuda/binding.cpp", "csrc/cuda/cusolver.cpp"]
    assert build.headers() == ["csrc/b.h", "csrc/cuda/k.cuh"]


def test_no_torch(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(build.NotBuilt, match="pip's build isolation hides torch, or torch is not installed"):
        build.import_torch()


@pytest.mark.skipif(os.name == "nt", reason="setuptools finds MSVC by itself")
def test_compiler(build, tmp_path):
    with pytest.raises(build.NotBuilt, match=r"no C\+\+ compiler was found \(c\+\+, g\+\+ or clang\+\+\); install one or set CXX"):
        build.find_compiler({"PATH": str(tmp_path)})
    script(tmp_path / "g++", "echo g++ 12")
    assert build.find_compiler({"PATH": str(tmp_path)}) == "g++"
    assert build.find_compiler({"PATH": str(tmp_path), "CXX": "g++ -m64"}) == "g++ -m64"
    with pytest.raises(build.NotBuilt, match="icpx"):
        build.find_compiler({"PATH": str(tmp_path), "CXX": "icpx"})


def test_architectures(build):
    known = "compute_80\ncompute_89\ncompute_90\ncompute_100\ncompute_120\n"
    names, flags = build.arch_flags({}, known)
    assert names == ["sm_80", "sm_90", "sm_100+PTX"]
    assert flags[-2:] == ["-gencode=arch=compute_100,code=sm_100", "-gencode=arch=compute_100,code=compute_100"]
    assert build.arch_flags({}, "compute_80\ncompute_90\ncompute_90a\n")[0] == ["sm_80", "sm_90+PTX"]
    assert build.arch_flags({"TORCH_CUDA_ARCH_LIST": "8.6;9.0a 10.0+PTX;Ada"}, known) == (["sm_86", "sm_90a", "sm_100+PTX", "Ada"], [])
    with pytest.raises(build.NotBuilt, match="set TORCH_CUDA_ARCH_LIST"):
        build.arch_flags({}, "compute_50\n")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvcc is a shell script")
def test_cuda(build, toolkit):
    assert build.find_cuda(None, {"CUDA_HOME": str(toolkit)}) is None
    cuda = build.find_cuda("13.2", {"CUDA_HOME": str(toolkit)})
    assert (cuda.home, cuda.version, cuda.archs) == (str(toolkit), "13.0", ["sm_80", "sm_90+PTX"])
    assert build.find_cuda("13.0", {"PATH": str(toolkit / "bin")}) == cuda
    with pytest.raises(build.NotBuilt, match="is of CUDA 13.0 and torch of CUDA 12.6; set CUDA_HOME"):
        build.find_cuda("12.6", {"CUDA_HOME": str(toolkit)})
    with pytest.raises(build.NoToolkit, match="no nvcc was found; install a CUDA toolkit or set CUDA_HOME"):
        build.find_cuda("13.0", {"CUDA_HOME": str(toolkit / "include")})


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvcc is a shell script")
def test_nvcc_behind_a_script_names_its_own_toolkit(build, toolkit, tmp_path):
    wrapper = script(tmp_path / "elsewhere/bin/nvcc", f'case "$*" in *dryrun*) echo "#$ TOP={toolkit}/bin/.." >&2;; esac')
    assert build.find_nvcc({"PATH": str(wrapper.parent)}) == (str(wrapper), str(toolkit))


@pytest.mark.parametrize(
    ("cuda", "facts", "loads"),
    [
        ("13.0", {"cusolver": "12.0.4"}, True),
        ("13.0", {"cusolver": None}, False),
        ("13.0", {}, False),
        ("13.0", None, True),
        (None, None, False),
    ],
)
def test_torchs_linear_algebra_is_loaded_before_the_extension(tmp_path, monkeypatch, cuda, facts, loads):
    """The extension links to it where it was built with cuSOLVER, and it lies where the loader does not look.
    Another extension does not pay for it."""
    if facts is not None:
        (tmp_path / "_build.json").write_text(json.dumps(facts))
    loaded = []
    torch = types.SimpleNamespace(__file__=str(tmp_path / "__init__.py"), version=types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(extension, "torch", torch)
    monkeypatch.setattr(extension.ctypes, "CDLL", loaded.append)
    extension._load_what_the_cuda_part_links(tmp_path / "_C.so")
    assert not loaded, "torch for Windows has it in its other libraries"
    library = tmp_path / "lib/libtorch_cuda_linalg.so"
    library.parent.mkdir()
    library.touch()
    extension._load_what_the_cuda_part_links(tmp_path / "_C.so")
    assert loaded == ([str(library)] if loads else [])


def headers_of_cusolver(folder, *version):
    folder.mkdir(parents=True, exist_ok=True)
    lines = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
    (folder / "cusolver_common.h").write_text("".join(f"  #define CUSOLVER_VER_{part} {number}\n" for part, number in lines))


def test_headers_of_cusolver(build, tmp_path, monkeypatch):
    """Those of the toolkit, else those beside torch. What is older than cusolverDnXsyevBatched counts as
    none."""
    torch = types.SimpleNamespace(__file__=str(tmp_path / "site-packages/torch/__init__.py"))
    monkeypatch.setattr(build, "import_torch", lambda: torch)
    home, beside = tmp_path / "cuda", tmp_path / "site-packages/nvidia"
    assert build.find_solver(str(home), "12.6") is None
    for package in ("cusolver", "cublas"):
        (beside / package / "include").mkdir(parents=True)
    headers_of_cusolver(beside / "cusolver/include", 11, 7, 1)
    folders = [str(beside / package / "include") for package in ("cusolver", "cublas")]
    assert build.find_solver(str(home), "12.6") == build.Solver("11.7.1", folders)
    headers_of_cusolver(beside / "cu13/include", 12, 0, 4)
    assert build.find_solver(str(home), "13.0") == build.Solver("12.0.4", [str(beside / "cu13/include"), *folders])
    headers_of_cusolver(home / "include", 12, 1, 0)
    assert build.find_solver(str(home), "13.0") == build.Solver("12.1.0", [])
    headers_of_cusolver(home / "include", 11, 6, 4)
    assert build.find_solver(str(home), "12.6") is None


@pytest.mark.skipif(os.name == "nt", reason="torch for Windows has one library")
def test_what_the_call_of_cusolver_is_linked_to(build, tmp_path):
    assert build.solver_libraries(tmp_path) == []
    (tmp_path / "libtorch_cuda_linalg.so").touch()
    assert build.solver_libraries(tmp_path) == ["torch_cuda_linalg"]


def torch_of(cuda):
    return types.SimpleNamespace(__version__="2.13.0", version=types.SimpleNamespace(cuda=cuda))


@pytest.mark.parametrize(
    ("mode", "torch_cuda", "fault", "outcome"),
    [
        ("", None, None, "C++"),
        ("1", None, None, "C++"),
        ("cuda", None, None, "this torch has no CUDA"),
        ("", "13.0", None, "CUDA"),
        ("cuda", "13.0", None, "CUDA"),
        ("", "13.0", "NoToolkit", "C++"),
        ("1", "13.0", "NoToolkit", "C++"),
        ("cuda", "13.0", "NoToolkit", "fault"),
        ("", "13.0", "NotBuilt", "C++"),
        ("1", "13.0", "NotBuilt", "fault"),
        ("0", "13.0", None, "skipped by LOWRANK_KERNELS_BUILD=0"),
    ],
)
def test_what_is_built(build, monkeypatch, mode, torch_cuda, fault, outcome):
    from setuptools.dist import Distribution

    compiled = []

    def find_cuda(torch_cuda, environ):
        if fault:
            raise getattr(build, fault)("fault")
        return build.Cuda("/cuda", "13.0", ["sm_90+PTX"], []) if torch_cuda else None

    monkeypatch.setattr(build, "sources", lambda cuda: ["csrc/a.cpp"])
    monkeypatch.setattr(build, "find_compiler", lambda environ: "c++")
    monkeypatch.setattr(build, "find_cuda", find_cuda)
    monkeypatch.setattr(build, "import_torch", lambda: torch_of(torch_cuda))
    monkeypatch.setattr(build.BuildOrExplain, "compile", lambda self, cuda: compiled.append(cuda))
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    command = build.BuildOrExplain(Distribution())
    if outcome not in ("C++", "CUDA"):
        with pytest.raises(build.NotBuilt, match=outcome):
            command.build(mode)
        assert not compiled
        return
    facts = command.build(mode)
    assert len(compiled) == 1
    assert (facts.cuda, facts.archs) == (("13.0", ["sm_90+PTX"]) if outcome == "CUDA" else (None, []))
    assert facts.cuda_reason == ("fault" if fault else None)
    assert (compiled[0] is not None) == (outcome == "CUDA")


@pytest.fixture
def project(tmp_path):
    """A folder with this setup.py and one source that needs no header of torch, so that compiling it takes no
    time."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "lowrank_kernels").mkdir()
    shutil.copy(ROOT / "lowrank_kernels/source_digest.py", tmp_path / "lowrank_kernels")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "standin"\nversion = "0"\n[tool.setuptools]\npackages = ["lowrank_kernels"]\n'
    )
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/kernel.cu").write_text("__global__ void kernel() {}\n")  # where torch has CUDA and there is an nvcc
    for name in ("binding", "cusolver"):
        (tmp_path / f"csrc/cuda/{name}.cpp").touch()
    (tmp_path / "csrc/standin.cpp").write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n')
    return tmp_path


def run_setup(project: Path, **environ: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key not in ("CXX", "LOWRANK_KERNELS_BUILD")}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=project, env=inherited | environ, capture_output=True, text=True)


def facts_of(project: Path) -> dict:
    return json.loads((project / "lowrank_kernels/_build.json").read_text())


@pytest.mark.skipif(os.name == "nt" or not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_build_rebuild_skip(project):
    library = project / "lowrank_kernels/_C.so"
    done = run_setup(project, LOWRANK_KERNELS_BUILD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert library.is_file()
    assert facts_of(project)["torch"] == torch.__version__
    assert facts_of(project)["sources"] == digest(project / "csrc")
    assert facts_of(project)["reason"] is None

    (compiled,) = project.glob("build/objects-*/csrc/standin.o")
    before = compiled.stat().st_mtime_ns
    done = run_setup(project, LOWRANK_KERNELS_BUILD="1")
    assert done.returncode == 0, done.stderr
    if shutil.which("ninja") or Path(sys.executable).with_name("ninja").exists():
        assert compiled.stat().st_mtime_ns == before

    done = run_setup(project, LOWRANK_KERNELS_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert not library.exists()
    assert facts_of(project)["reason"] == "skipped by LOWRANK_KERNELS_BUILD=0"


@pytest.mark.skipif(os.name == "nt", reason="setuptools finds MSVC by itself")
def test_build_without_a_compiler(project):
    library = project / "lowrank_kernels/_C.so"
    library.touch()  # of an earlier build
    done = run_setup(project, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING: lowrank_kernels: the extension is not built: no C++ compiler was found (/nonexistent/c++)") == 1
    assert "pip install --no-build-isolation" in done.stderr
    assert not library.exists()
    assert facts_of(project)["reason"].startswith("no C++ compiler was found")

    done = run_setup(project, CXX="/nonexistent/c++", LOWRANK_KERNELS_BUILD="1")
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stderr


@pytest.fixture
def package(tmp_path):
    """A folder as setup.py leaves it, for the loader to judge."""
    folder = tmp_path / "lowrank_kernels"
    folder.mkdir()
    (folder / "_C.so").touch()
    return folder


def write_facts(package: Path, **facts) -> None:
    usual = {"torch": RUNNING, "cuda": None, "archs": [], "compiler": "c++ 12", "reason": None, "cuda_reason": None}
    (package / "_build.json").write_text(json.dumps(usual | facts))


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({}, "built for torch 2.13.0+cpu (C++), loaded from "),
        ({"torch": "2.13.1"}, "built for torch 2.13.1 (C++), loaded from "),
        (
            {"torch": "2.13.0+cu130", "cuda": "13.0", "archs": ["sm_80", "sm_90+PTX"], "cusolver": "12.0.4"},
            "built for torch 2.13.0+cu130 (C++ and CUDA 13.0 with cuSOLVER 12.0.4 for sm_80, sm_90+PTX), loaded from ",
        ),
        (
            {"torch": "2.13.0+cu130", "cuda": "13.0", "archs": ["sm_80"], "cusolver": None},
            "built for torch 2.13.0+cu130 (C++ and CUDA 13.0 without cuSOLVER for sm_80), loaded from ",
        ),
        ({"cuda_reason": "no nvcc"}, "built for torch 2.13.0+cpu (C++ without the CUDA part: no nvcc), loaded from "),
    ],
)
def test_status_of_a_library(package, facts, sentence):
    write_facts(package, **facts)
    found = extension.find(package, RUNNING, {})
    assert found.library == package / "_C.so"
    assert found.sentence == f"{sentence}{package / '_C.so'}"
    assert not found.unexpected


def test_status_without_a_library(package):
    (package / "_C.so").unlink()
    found = extension.find(package, RUNNING, {})
    assert found.sentence.startswith(
        "not built: nothing was compiled in this folder; the subspace refresh runs in PyTorch (slower). Reinstall"
    )
    write_facts(package, reason="no compiler")
    found = extension.find(package, RUNNING, {})
    assert found.sentence.startswith("not built: no compiler; the subspace refresh runs in PyTorch (slower). Reinstall with: pip install")
    assert found.library is None and not found.unexpected
    write_facts(package)
    found = extension.find(package, RUNNING, {})
    assert "but the library is gone" in found.sentence
    assert found.library is None and found.unexpected


def test_a_recorded_reason_outweighs_a_library_left_behind(package):
    write_facts(package, reason="skipped by LOWRANK_KERNELS_BUILD=0")
    assert extension.find(package, RUNNING, {}).library is None


@pytest.mark.parametrize("built_for", ["2.12.1", "2.14.0+cu130", "3.13.0", "2.13.0a0+gitabc", "2.13.0.dev20260101"])
def test_a_library_for_another_torch_is_refused(package, built_for):
    write_facts(package, torch=built_for)
    found = extension.find(package, RUNNING, {})
    assert found.library is None and found.unexpected
    assert found.sentence.startswith(f"built for torch {built_for} but torch {RUNNING} is running: it is not loaded")
    assert extension.find(package, built_for, {}).library is not None


def test_a_library_of_other_sources_is_refused(package):
    source = package.parent / "csrc/cuda/a.cuh"
    source.parent.mkdir(parents=True)
    source.write_text("int a;")
    (package.parent / "setup.py").touch()
    write_facts(package, sources=digest(package.parent / "csrc"))
    os.utime(package / "_C.so", (0, 0))  # a copied tree has newer times than its library
    assert extension.find(package, RUNNING, {}).library is not None
    source.write_text("int b;")
    found = extension.find(package, RUNNING, {})
    assert found.library is None and found.unexpected
    assert "csrc/ has changed since" in found.sentence and f"pip install --no-build-isolation -e {package.parent}" in found.sentence
    (package.parent / "setup.py").unlink()
    assert extension.find(package, RUNNING, {}).library is not None  # no source tree: a csrc/ that means something else


def test_the_digest_is_of_names_and_contents_of_sources(tmp_path):
    for folder, files in {"a": {"x.cpp": "1", "cuda/y.cu": "2"}, "b": {"cuda/y.cu": "2", "x.cpp": "1", "NOTES.md": "3"}}.items():
        for name, text in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    same = digest(tmp_path / "a")
    assert digest(tmp_path / "b") == same
    (tmp_path / "b/x.cpp").rename(tmp_path / "b/z.cpp")
    assert digest(tmp_path / "b") != same
    (tmp_path / "b/z.cpp").write_text("1\0y.cu")
    (tmp_path / "b/cuda/y.cu").unlink()
    assert digest(tmp_path / "b") != same


def test_the_library_named_by_the_environment(package, tmp_path):
    other = tmp_path / "other.so"
    with pytest.raises(FileNotFoundError, match="LOWRANK_KERNELS_LIBRARY=.*other.so: there is no such file"):
        extension.find(package, RUNNING, {"LOWRANK_KERNELS_LIBRARY": str(other)})
    other.touch()
    found = extension.find(package, RUNNING, {"LOWRANK_KERNELS_LIBRARY": str(other)})
    assert (found.library, found.sentence) == (other, f"loaded from {other} (LOWRANK_KERNELS_LIBRARY)")
    write_facts(package, torch="2.11.0+cu130", cuda="13.0", archs=["sm_90"], cusolver="12.0.4")
    library = package / "_C.so"
    found = extension.find(package, RUNNING, {"LOWRANK_KERNELS_LIBRARY": str(library)})
    built = "built for torch 2.11.0+cu130 (C++ and CUDA 13.0 with cuSOLVER 12.0.4 for sm_90)"
    assert found.sentence == f"loaded from {library} (LOWRANK_KERNELS_LIBRARY), {built}"


def test_a_library_that_does_not_load_is_said_once_and_reported(package, monkeypatch):
    write_facts(package, torch=torch.__version__)
    monkeypatch.setattr(extension, "_PACKAGE", package)
    monkeypatch.setattr(extension, "_finding", extension._finding)
    monkeypatch.delenv("LOWRANK_KERNELS_LIBRARY", raising=False)
    with pytest.warns(RuntimeWarning, match="does not load .*the subspace refresh runs in PyTorch") as caught:
        extension.load(reference_forced=False)
    assert len(caught) == 1
    assert not extension.loaded()
    assert environment.environment()["extension"] == extension.status()
    assert "too short" in extension.status() or "invalid" in extension.status()  # the loader's own words about an empty file

    monkeypatch.setenv("LOWRANK_KERNELS_LIBRARY", str(package / "_C.so"))
    with pytest.raises(OSError):
        extension.load(reference_forced=False)


def test_the_reference_loads_nothing(tmp_path):
    """Not even a library asked for by name: the file named here does not exist."""
    environ = os.environ | {"LOWRANK_KERNELS_REFERENCE": "1", "LOWRANK_KERNELS_LIBRARY": str(tmp_path / "none.so")}
    code = "from lowrank_kernels import extension; assert not extension.loaded(); print(extension.status())"
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "not loaded: LOWRANK_KERNELS_REFERENCE is set", done.stderr


@pytest.mark.skipif(
    os.environ.get("LOWRANK_KERNELS_BUILD") not in ("1", "cuda"), reason="LOWRANK_KERNELS_BUILD does not ask for the extension"
)
def test_the_extension_is_there_where_it_was_asked_for():
    assert dispatch.REFERENCE_FORCED or extension.loaded(), extension.status()
