"""Peers from a folder of wheels, without a network."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_wheel(folder, name, version, files, tag="py3-none-any"):
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: torch>=99\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in (files | {f"{info}/RECORD": record}).items():
            wheel.writestr(file, text)


def test_a_contender_comes_from_a_wheel_and_nothing_stays(tmp_path):
    """It is timed, its version recorded; what is installed comes first, and a wheel for another Python keeps
    no other out."""
    peer = "import torch\n\n\nclass APOLLOAdamW(torch.optim.SGD):\n    def __init__(self, groups, lr):\n"
    peer += '        super().__init__([{"params": groups[0]["params"]}], lr=lr)\n'
    make_wheel(tmp_path, "apollo_torch", "7.5", {"apollo_torch/__init__.py": peer})
    make_wheel(tmp_path, "aaa", "1", {"aaa.py": ""}, tag="cp27-cp27m-win32")
    make_wheel(tmp_path, "json", "1", {"json.py": "raise RuntimeError"})
    program = f"""
import sys, pathlib
from benchmarks import wheels, contenders, provenance, shapes
import torch
wheels.install(pathlib.Path({str(tmp_path)!r}))
built = contenders.apollo_torch(contenders.make_params([(8, 8)], torch.float32, "cpu"), 2)
built.step()
print(provenance.provenance(False)["versions"]["apollo-torch"], sys.path[-1])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, folder = done.stdout.splitlines()[-1].split()
    assert version == "7.5" and not Path(folder).exists()
    assert "aaa-1-cp27-cp27m-win32.whl is not installed: ERROR: aaa-1-cp27-cp27m-win32.whl is not a supported wheel" in done.stdout
