"""pretrain.py, whose second process dies while the second sharded checkpoint is written."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import pretrain
from torch.distributed.checkpoint import FileSystemWriter

calls = 0
write_data = FileSystemWriter.write_data


def dies(self, *args):
    global calls
    calls += 1
    written = write_data(self, *args)
    if calls == 2 and os.environ["RANK"] == "1":
        os._exit(9)
    return written


FileSystemWriter.write_data = dies

if __name__ == "__main__":
    sys.exit(pretrain.main())
