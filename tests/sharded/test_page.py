"""What docs/distributed.md shows runs under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_fsdp2_in_fifteen_lines(tmp_path):
    (source,) = re.findall(r"^```python\n(# train.py.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    body = source[source.index("torch.distributed.init") :]
    assert len(body.splitlines()) <= 15
    check = "kind = type(optimizer.state[model[0].weight]['exp_avg']).__name__\n"
    check += "import os; os.write(1, f'moved {optimizer.param_groups[1][\"calls\"]} {kind} '.encode())\n"  # in one piece
    (tmp_path / "train.py").write_text(source + check)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGE.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("moved 10 DTensor") == 2
