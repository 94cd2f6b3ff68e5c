"""A few processes that talk over gloo: each runs a function and leaves what it returns."""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def results(function, folder, ranks=2, seconds=150):
    """What `function(rank)`, importable by name, returned in each process: tensors, numbers and nests of
    them."""
    started = torch.multiprocessing.start_processes(
        _process, (function, str(folder), ranks), nprocs=ranks, join=False, start_method="spawn"
    )
    try:
        deadline = time.monotonic() + seconds
        while not started.join(timeout=10):  # true once all have ended
            assert time.monotonic() < deadline
    finally:
        for each in started.processes:
            each.kill()
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(ranks)]


def shared(tmp_path_factory, function, ranks=2):
    """As `results`, but once for all workers of a test run. The others wait."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    called = getattr(function, "func", function)
    folder = root / f"{called.__module__}.{called.__name__}.{ranks}"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not (folder / "all.pt").exists():
            assert time.monotonic() < deadline and not (folder / "failed").exists()
            time.sleep(0.2)
        return torch.load(folder / "all.pt", weights_only=True)
    try:
        found = results(function, folder, ranks)
        torch.save(found, folder / "all.partial")
        os.rename(folder / "all.partial", folder / "all.pt")
    except BaseException:
        (folder / "failed").touch()
        raise
    return found


def _process(rank, function, folder, ranks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    torch.save(function(rank), f"{folder}/{rank}.pt")
    while not all(os.path.exists(f"{folder}/{other}.pt") for other in range(ranks)):
        time.sleep(0.05)
    os._exit(0)  # destroying the group may deadlock: gloo's thread waits for the GIL, and the GIL's owner to join it
