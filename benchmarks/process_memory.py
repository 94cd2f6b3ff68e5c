"""The peak of a fresh process that takes training steps on the CPU, and what estimate_memory says about it.

    python -m benchmarks.process_memory --model 350m --method galore --rank 128 --in-backward deferred

Prints one JSON line. Needs Linux, which keeps the resident high-water mark of a process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import llama  # noqa: E402

import lowrank_kernels as lrk  # noqa: E402
from lowrank_kernels.estimate import IN_BACKWARD, METHODS  # noqa: E402


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.process_memory", description=__doc__.partition("\n")[0])
    result.add_argument("--model", default="350m", help=f"{', '.join(llama.SIZES)}, or HIDDENxINTERMEDIATExLAYERS")
    result.add_argument("--method", choices=METHODS, default="galore")
    result.add_argument("--rank", type=int, default=128)
    result.add_argument("--state-bits", type=int, choices=(32, 8), default=32)
    result.add_argument("--in-backward", choices=IN_BACKWARD)
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
    small = llama.Llama(llama.Size(64, 128, 1, 1), 256, False, False).to(dtype)
    _train(small, args.method, 8, None, options, tokens, steps=1)  # loads what a first step loads
    before = resident("VmRSS")
    model = llama.Llama(size, 256, False, False).to(dtype) if dtype == torch.float32 else _in(dtype, size)
    _train(model, args.method, args.rank, args.in_backward, options, tokens, args.steps)
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


def _in(dtype: torch.dtype, size: llama.Size) -> torch.nn.Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return llama.Llama(size, 256, False, False)
    finally:
        torch.set_default_dtype(default)


def _train(
    model: torch.nn.Module,
    method: str,
    rank: int,
    in_backward: str | None,
    options: dict[str, int],
    tokens: torch.Tensor,
    steps: int,
) -> None:
    kind = METHODS[method]
    if method == "adamw":
        optimizer = kind(model.parameters(), lr=1e-4, fused=True)
    elif method == "rso":
        lrk.to_subspace(model, rank=rank)
        optimizer = kind(model.parameters(), lr=1e-4)
    else:
        optimizer = kind(lrk.param_groups(model, rank=rank, **options), lr=1e-4)
    if in_backward:
        lrk.in_backward(model, optimizer, update=in_backward)
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
        [sys.executable, "-m", "benchmarks.process_memory", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(parser().parse_args())))
