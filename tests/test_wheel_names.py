"""What a wheel says of the torch that it fits, and what is in one."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import torch
from check_wheel import has_library

pytest.importorskip("setuptools.command.bdist_wheel")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "version, cuda, expected",
    [
        ("2.13.0+cpu", None, ("2.13", "cpu")),
        ("2.11.1+cu130", "13.0", ("2.11", "cu130")),
        ("2.9.1", "12.8", ("2.9", "cu128")),  # PyPI's for Linux
        ("2.9.1", None, ("2.9", "cpu")),
    ],
)
def test_the_torch_that_a_wheel_names(setup_module, monkeypatch, version, cuda, expected):
    monkeypatch.setattr(setup_module, "import_torch", lambda: types.SimpleNamespace(version=types.SimpleNamespace(cuda=cuda)))
    assert setup_module.fits(version) == expected


@pytest.mark.parametrize("named", [False, True])
def test_the_metadata_name_the_torch_only_of_a_wheel_for_others(tmp_path, named):
    """As pip asks for them, in a copy of what a build needs."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("version.py", "source_digest.py", "__init__.py"):
        (tmp_path / "lowrank_kernels").mkdir(exist_ok=True)
        shutil.copy(ROOT / "lowrank_kernels" / name, tmp_path / "lowrank_kernels")
    code = "from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel('found')"
    (tmp_path / "found").mkdir()
    environment = os.environ | {"LOWRANK_KERNELS_WHEEL": str(int(named))}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    (path,) = tmp_path.glob("found/*.dist-info/METADATA")
    text = path.read_text()
    required = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("Requires-Dist: torch")]
    version = re.search(r"^Version: (.*)$", text, re.MULTILINE).group(1)
    release = ".".join(torch.__version__.split(".")[:2])
    assert required == ([f"torch=={release}.*"] if named else ["torch>=2.9"])
    assert version.partition("+")[2].startswith(f"torch{release}.") if named else "+" not in version


@pytest.mark.parametrize("version", ["2.13.0+mine", "2.13.0a0+git1234"])
def test_a_wheel_for_others_is_of_no_torch_of_ones_own(setup_module, version):
    with pytest.raises(setup_module.SetupError, match="needs a released torch"):
        setup_module.fits(version)


def test_a_wheel_for_others_needs_a_released_torch(setup_module):
    with pytest.raises(setup_module.SetupError, match="needs a released torch, got 2.14.0.dev20261101"):
        setup_module.fits("2.14.0.dev20261101+cpu")


def test_which_files_bring_a_library():
    assert has_library(Path("lowrank_kernels-0.1.0+torch2.13.cpu-py3-none-linux_x86_64.whl"))
    assert not has_library(Path("lowrank_kernels-0.1.0-py3-none-any.whl"))
    assert not has_library(Path("lowrank_kernels-0.1.0.tar.gz"))


@pytest.mark.slow
def test_the_pure_wheel_and_the_sdist(tmp_path):
    """Built as pip does it, in a copy, so that nothing is left in the source folder."""
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "source"], check=True)
    code = "from setuptools import build_meta as b; b.build_sdist('..'); print(b.build_wheel('..'))"
    environment = {"LOWRANK_KERNELS_BUILD": "0", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "source", env=environment, check=True, capture_output=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lowrank_kernels", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    assert {"lowrank_kernels/py.typed", "lowrank_kernels/integrations/transformers.py", "lowrank_kernels/_build.json"} <= set(names)
    assert not any(name.endswith((".so", ".pyd")) for name in names)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "csrc/operators.cpp", "csrc/cuda/binding.cpp", "LICENSE", "README.md"} <= held
    assert not any(name.startswith(("tests/", "benchmarks/results")) for name in held)
