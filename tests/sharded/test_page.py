"""What docs/distributed.md and the tutorial on FSDP2 show runs under torchrun."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE, TUTORIAL = DOCS / "distributed.md", DOCS / "tutorials" / "pretrain-fsdp2.md"


def torchrun(processes, script):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script.name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fsdp2_in_fifteen_lines(tmp_path):
    (source,) = re.findall(r"^```python\n(# train.py.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    body = source[source.index("torch.distributed.init") :]
    assert len(body.splitlines()) <= 15
    check = "kind = type(optimizer.state[model[0].weight]['exp_avg']).__name__\n"
    check += "import os; os.write(1, f'moved {optimizer.param_groups[1][\"calls\"]} {kind} '.encode())\n"  # in one piece
    (tmp_path / "train.py").write_text(source + check)
    assert torchrun(2, tmp_path / "train.py").count("moved 10 DTensor") == 2


@pytest.mark.slow
def test_the_tutorial_trains_and_goes_on_with_as_many_processes_or_fewer(tmp_path):
    (source,) = re.findall(r"^```python\n(# pretrain.py.*?)^```$", TUTORIAL.read_text(), flags=re.MULTILINE | re.DOTALL)
    script = tmp_path / "pretrain.py"
    script.write_text(source)

    def losses(printed):
        return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", printed)}

    whole = losses(torchrun(2, script))
    assert sorted(whole) == [10, 20, 30, 40] and whole[40] < whole[10]
    shutil.rmtree(tmp_path / "checkpoints" / "40")
    assert losses(torchrun(2, script)) == {step: whole[step] for step in (30, 40)}
    shutil.rmtree(tmp_path / "checkpoints" / "40")
    assert sorted(losses(torchrun(1, script))) == [30, 40]
