"""python -m benchmarks.lean: what autograd saves of one block of examples/llama.py, eager and lean.

Of a LLaMA 60M block at 8 × 256 tokens: with nn.Linear, and with SubspaceLinear at r = 128. The block's input
counts where it is saved. Rows go to results/lean/<date>-<commit>.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

import lowrank_kernels as lrk

from . import provenance
from .memory import saved_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import llama  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def block_bytes(size: llama.Size, batch: int, positions: int, rank: int | None, *, lean: bool, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that one block saves for its backward pass. rank: of SubspaceLinear; None leaves nn.Linear."""
    model = llama.Llama(size, 256, lean=lean).initialize(0).to(dtype)
    if rank is not None:
        lrk.to_subspace(model.layers, rank=rank, target_modules=".*proj")
    cos, sin = llama.rotary_angles(torch.arange(positions), model.head_dim)
    x = torch.randn(batch, positions, size.hidden, dtype=dtype, requires_grad=True)
    return saved_bytes(lambda: model.layers[0](x, cos, sin), [*model.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lean", description="Bytes that a block saves, eager and lean.")
    parser.add_argument("--out", type=Path, default=provenance.RESULTS / "lean", help="folder of results, or '-' to write none")
    options = parser.parse_args()
    origin = provenance.provenance(on_gpu=False)
    for dtype, rank, lean in itertools.product(DTYPES, (None, 128), (False, True)):
        held = block_bytes(llama.SIZES["60m"], 8, 256, rank, lean=lean, dtype=DTYPES[dtype])
        row = {"block": "60m", "batch": 8, "positions": 256, "dtype": dtype, "rank": rank, "lean": lean, "saved_bytes": held}
        print(f"{dtype} {'nn.Linear' if rank is None else f'RSO r={rank}'} {'lean' if lean else 'eager'}: {held / 1e6:.1f} MB", flush=True)
        if str(options.out) != "-":
            provenance.append(provenance.results_file(options.out, origin), [origin | row])


if __name__ == "__main__":
    main()
