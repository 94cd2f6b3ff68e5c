"""The peak of a fresh process that takes training steps on the CPU, and what estimate_memory says about it.

    python -m benchmarks.process_memory --model 350m --method galore --rank 128 --in-backward deferred

Prints one JSON line. Needs Linux, which keeps the resident high-water mark of a process. glibc is told to
give large blocks memory of their own (MALLOC_MMAP_THRESHOLD_): otherwise a high-water mark counts holes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import llama  # noqa: E402
from memory import return_freed_memory  # noqa: E402

import lowrank_kernels as lrk  # noqa: E402
from lowrank_kernels.estimate import METHODS  # noqa: E402
from lowrank_kernels.optim.in_backward import UPDATES  # noqa: E402


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.process_memory", description=__doc__.partition("\n")[0])
    result.add_argument("--model", default="350m", help=f"{', '.join(llama.SIZES)}, or HIDDENxINTERMEDIATExLAYERS")
    result.add_argument("--method", choices=METHODS, default="galore")
    result.add_argument("--rank", type=int, default=128)
    result.add_argument("--state-bits", type=int, choices=(32, 8), default=32)
    result.add_argument("--in-backward", choices=UPDATES)
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    result.add_argument("--tokens", type=int, default=32, help="of one sequence, the batch")
    result.add_argument("--steps", type=int, default=2)
    return result


def size_of(name: str) -> llama.Size:
    if name in llama.SIZES:
        return llama.SIZES[name]
    hidden, intermediate, layers = map(int, name.split("x"))
    return llama.Size(hidden, intermediate, layers, max(1, hidden // 64))


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Trains in this process, which has done nothing else before."""
    size, dtype = size_of(args.model), getattr(torch, args.dtype)
    options = {} if args.method in ("adamw", "rso") else {"state_bits": args.state_bits}
    low_rank = args.method != "adamw"
    with torch.device("meta"):
        shapes = llama.Llama(size, 256, False, False)
    tokens = torch.zeros(1, args.tokens + 1, dtype=torch.int64)
    estimate = lrk.estimate_memory(
        shapes,
        args.method,
        args.rank if low_rank else None,
        dtype=dtype,
        in_backward=args.in_backward,
        loss=lambda model: llama.loss(model, tokens.to("meta")),
        device="cpu",
        **options,
    )
    _train(_built(dtype, dataclasses.replace(size, layers=1)), args, options, tokens, steps=1)  # loads what a first step loads
    return_freed_memory()
    before = resident("VmRSS")
    _train(_built(dtype, size), args, options, tokens, args.steps)
    return {
        "model": args.model,
        "method": args.method,
        "rank": args.rank if low_rank else None,
        "in_backward": args.in_backward,
        "state_bits": args.state_bits,
        "dtype": args.dtype,
        "measured": resident("VmHWM") - before,
        "estimated": estimate.peak,
        "parts": vars(estimate),
    }


def _built(dtype: torch.dtype, size: llama.Size) -> torch.nn.Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights never exist in another one
    try:
        return llama.Llama(size, 256, False, False)
    finally:
        torch.set_default_dtype(default)


def _train(model: torch.nn.Module, args: argparse.Namespace, options: dict[str, int], tokens: torch.Tensor, steps: int) -> None:
    kind = METHODS[args.method]
    if args.method == "adamw":
        optimizer = kind(model.parameters(), lr=1e-4, fused=True)
    elif args.method == "rso":
        lrk.to_subspace(model, rank=args.rank)
        optimizer = kind(model.parameters(), lr=1e-4)
    else:
        optimizer = kind(lrk.param_groups(model, rank=args.rank, **options), lr=1e-4)
    if args.in_backward:
        lrk.in_backward(model, optimizer, update=args.in_backward)
    for _ in range(steps):
        llama.loss(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at the highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def in_fresh_process(*arguments: str, seconds: float = 600) -> dict[str, object]:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.process_memory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(parser().parse_args())))
