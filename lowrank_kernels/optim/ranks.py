"""Checks that the processes of a data-parallel run draw the same subspaces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist


def check_equal(parameters: Iterable[object], settings: Iterable[object], device: torch.device) -> bool:
    """Raises RuntimeError, in all processes, where two of them have the same parameters but different
    settings. This takes one small all-gather.

    parameters, settings: numbers, strings and tuples of them. Processes with different parameters are not
    compared, such as the stages of a pipeline or the processes of ZeroRedundancyOptimizer. Returns whether
    all processes have the same ones.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return True
    if device.type != "cuda" and "nccl" in dist.get_backend() and "gloo" not in dist.get_backend():
        device = torch.device("cuda")
    mine = torch.tensor([_digest(parameters), _digest(settings)], device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    first: dict[int, tuple[int, int]] = {}
    for rank, (held, chosen) in enumerate(torch.stack(gathered).tolist()):
        other, theirs = first.setdefault(held, (rank, chosen))
        if theirs != chosen:
            raise RuntimeError(
                f"processes {other} and {rank} have the same parameters, but their seeds or other settings of subspaces differ, by which "
                "their weights would drift apart; give every process the same ones"
            )
    return len(first) == 1


def _digest(values: Iterable[object]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        digest.update(repr(value).encode() + b"\n")
    return int.from_bytes(digest.digest(), "little", signed=True)
