"""How much memory a training run takes, by estimate, as a table in GiB (2³⁰ bytes).

python -m lowrank_kernels.estimate --model llama-7b --method galore --rank 1024
python -m lowrank_kernels.estimate --model llama-7b --rank 1024 --compare adamw galore rso --sequence 256
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..optim.in_backward import UPDATES
from ..tables import table
from . import llama, models
from .memory import METHODS, Memory, estimate_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANKS = {"apollo-mini": 1}
"""The ranks of methods that prescribe one."""
WITHOUT_PROJECTION = ("adamw", "rso")
"""Methods whose gradients are not projected: options of low-rank groups are not for them."""
PARTS = tuple(field.name for field in dataclasses.fields(Memory))
TOTALS = {"held": "between steps", "peak": "peak"}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m lowrank_kernels.estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--model", required=True, help=f"{', '.join(models.SIZES)}, or the path of a config.json ({', '.join(models.KINDS)})")
    which = result.add_mutually_exclusive_group()
    which.add_argument("--method", choices=METHODS, default="galore", help="one of %(choices)s (default: %(default)s)", metavar="METHOD")
    which.add_argument("--compare", choices=METHODS, nargs="+", help="several of them, side by side", metavar="METHOD")
    add("--rank", type=_positive, help="r; not for adamw, and 1 for apollo-mini")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of weights and gradients (default: %(default)s)")
    add("--state-bits", type=int, choices=(32, 8), default=32, help="of the moments in the subspace (default: %(default)s)")
    add("--in-backward", choices=UPDATES, help="where gradients are projected while the backward pass runs")
    add("--accumulator", choices=("float32", "bfloat16"), default="float32", help="dtype of R with --in-backward deferred")
    add("--proj-type", choices=("std", "reverse_std", "left", "right", "unsharded"), help="the side that is projected")
    add("--sequence", type=_positive, help="tokens of a sequence; without it activations are not counted")
    add("--batch", type=_positive, default=1, help="sequences of a micro-batch (default: %(default)s)")
    add("--checkpointing", action="store_true", help="keep a layer's input alone, and run the layer again in the backward pass")
    add("--shards", type=_positive, default=1, help="processes over which FSDP2 shards the model; prints the bytes of the first one")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="whose temporaries are meant (default: %(default)s)")
    add("--json", action="store_true", help="bytes, as a JSON object by method")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parse = parser()
    args = parse.parse_args(arguments)
    methods = list(dict.fromkeys(args.compare or [args.method]))
    try:
        refuse_idle(args, methods)
        size = models.size_of(args.model)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = {method: estimate(size, method, args) for method in methods}
    except (ValueError, TypeError) as error:
        parse.error(str(error))
    for message in dict.fromkeys(str(each.message) for each in warned):
        print(f"warning: {message}", file=sys.stderr)
    if args.json:
        print(json.dumps({method: as_dict(memory) for method, memory in found.items()}, indent=1))
    else:
        print(as_text(found, args))


def refuse_idle(args: argparse.Namespace, methods: Sequence[str]) -> None:
    """Raises ValueError for an option that would change nothing for any of the methods."""
    named = ", ".join(methods)
    if args.rank is not None and all(method == "adamw" or RANKS.get(method, args.rank) != args.rank for method in methods):
        raise ValueError(f"--rank {args.rank} is not for {named}; leave it out")
    given = {"--state-bits 8": args.state_bits == 8, "--in-backward": args.in_backward, "--proj-type": args.proj_type}
    for option in (option for option, is_given in given.items() if is_given):
        if all(method in WITHOUT_PROJECTION for method in methods):
            raise ValueError(f"{option} is for methods that project gradients, not for {named}; leave it out")
    if args.accumulator != "float32" and args.in_backward != "deferred":
        raise ValueError("--accumulator is the dtype of R, which stays with --in-backward deferred alone")
    if args.checkpointing and args.sequence is None:
        raise ValueError("--checkpointing changes activations, which are counted with --sequence alone; give both")
    if args.batch != 1 and args.sequence is None:
        raise ValueError("--batch changes activations, which are counted with --sequence alone; give both")


def estimate(size: models.Size, method: str, args: argparse.Namespace) -> Memory:
    """The memory of one method, with those of the options that it has. Raises ValueError where it cannot work
    with them."""
    options: dict[str, Any] = {}
    if method not in WITHOUT_PROJECTION:
        options = {"state_bits": args.state_bits, "in_backward": args.in_backward}
        options |= {"proj_type": args.proj_type} if args.proj_type is not None else {}
    rank = None if method == "adamw" else RANKS.get(method, args.rank)
    if rank is None and method != "adamw":
        raise ValueError(f"--rank is needed for {method}")
    return estimate_memory(
        llama.on_meta(size, DTYPES[args.dtype], args.checkpointing),
        method,
        rank,
        accumulator_dtype=DTYPES[args.accumulator],
        loss=None if args.sequence is None else lambda model: llama.loss(model, args.batch, args.sequence),
        device=args.device,
        shards=args.shards,
        **options,
    )


def as_dict(memory: Memory) -> dict[str, int]:
    return {name: getattr(memory, name) for name in (*PARTS, *TOTALS)}


def as_text(found: dict[str, Memory], args: argparse.Namespace) -> str:
    names = [name for name in PARTS if any(getattr(memory, name) for memory in found.values())]
    if args.sequence is not None and "activations" not in names:
        names.append("activations")
    labels = {name: name.replace("_", " ") for name in names} | TOTALS
    lines = [[label, *(f"{getattr(memory, name) / 2**30:.3f}" for memory in found.values())] for name, label in labels.items()]
    text = [args.model, args.dtype, *([f"rank {args.rank}"] if args.rank else []), *([f"1 of {args.shards} processes"] * (args.shards > 1))]
    if args.sequence is not None:
        text.append(f"{args.batch} × {args.sequence} tokens" + ", checkpointing" * args.checkpointing)
    notes = ["" if args.sequence else "Activations are not counted: --sequence counts them."]
    notes.append("What FSDP2 gathers for a layer for a moment is not in it." if args.shards > 1 else "")
    notes.append("CUDA's context and the allocator's fragments come on top." if args.device == "cuda" else "")
    return "\n".join([", ".join(text), table(["GiB", *found], lines), *filter(None, notes)])


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive int, got {text!r}")
    return value
