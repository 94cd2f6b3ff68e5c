"""Whether 8-bit moments follow gradients whose size changes.

    python -m benchmarks.drift    # the figures of benchmarks/NOTES.md, appended to results/drift/

It takes 200 blocks of 64 elements over 8000 steps. Gradients are normal, and all of the same size, or each
element of a size of its own, log-uniform over `decades`. At step 1000 the gradients of every second element
change by a factor. M and V live in 8 bits, in the code of lowrank_kernels/storage/eight_bit.py, and beside it
in fp32. It prints the 5th, 50th and 95th percentile and the mean of V in 8 bits over V in fp32, of the
elements that change.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor

from lowrank_kernels.storage import eight_bit

from . import provenance

BLOCKS, STEPS, CHANGE_AT = 200, 8000, 1000
PERCENTILES = (0.05, 0.5, 0.95)


def nearest_(m: Tensor, v: Tensor, *tensors: Tensor) -> None:
    """encode_ with the nearest code for V, which is what lost."""
    eight_bit.encode_(m, v, *tensors, 0)
    share = v / eight_bit._spread(tensors[3], v)
    tensors[1].copy_((255 * share.sqrt().sqrt() + 0.5).floor().clamp_min(1).where(v > 0, 0))


def ratios(
    factor: float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    decades: float = 0.0,
    nearest: bool = False,
    blocks: int = BLOCKS,
    steps: int = STEPS,
    change_at: int = CHANGE_AT,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """V in 8 bits over V in fp32 of the elements whose gradients change by `factor`, and ‖M in 8 bits − M‖ /
    ‖M‖. Both are of the last step and of nine before it, spread over the time since 4 / (1 − β2) steps after
    the change."""
    generator = torch.Generator().manual_seed(seed)
    shape = blocks, 64
    size = 10.0 ** (-decades * torch.rand(shape, generator=generator))
    changes = torch.arange(64) % 2 == 0
    m, v = torch.zeros(shape), torch.zeros(shape)
    tensors = [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)] + [torch.zeros(eight_bit.scales_shape(shape)) for _ in range(2)]
    settled = min(change_at + round(4 / (1 - beta2)), steps - 1)
    looks = set(torch.linspace(settled, steps, 10).round().int().tolist())
    found, of_m = [], []
    for t in range(1, steps + 1):
        if t == change_at:
            size = torch.where(changes, factor * size, size)
        r = size * torch.randn(shape, generator=generator)
        coded_m, coded_v = eight_bit.decode(*tensors)
        for moment in (m, coded_m):
            moment.mul_(beta1).add_(r, alpha=1 - beta1)
        for moment in (v, coded_v):
            moment.mul_(beta2).addcmul_(r, r, value=1 - beta2)
        if nearest:
            nearest_(coded_m, coded_v, *tensors)
        else:
            eight_bit.encode_(coded_m, coded_v, *tensors, t)
        if t in looks:
            found_m, found_v = eight_bit.decode(*tensors)
            found.append((found_v / v)[:, changes])
            of_m.append((found_m - m).norm() / m.norm())
    return torch.cat(found).flatten(), torch.stack(of_m)


def percentiles(values: Tensor) -> list[float]:
    return torch.quantile(values, torch.tensor(PERCENTILES)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description="Whether 8-bit moments follow gradients that change.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 2, 1 / 2, 4, 1 / 4, 10, 1 / 10])
    parser.add_argument("--out", type=Path, default=provenance.RESULTS / "drift", help="folder of results, or '-' to write none")
    options = parser.parse_args()
    origin = provenance.provenance(on_gpu=False)
    for beta2, decades in ((0.999, 0.0), (0.999, 1.0), (0.99, 0.0)):
        for nearest, factor in itertools.product((True, False), options.factors):
            of_v, of_m = ratios(factor, beta2=beta2, decades=decades, nearest=nearest, steps=options.steps)
            low, middle, high = percentiles(of_v)
            row = {
                "beta2": beta2, "decades": decades, "codes": "nearest" if nearest else "between", "factor": factor, "steps": options.steps,
                "v_ratio_p5": low, "v_ratio_p50": middle, "v_ratio_p95": high, "v_ratio_mean": of_v.mean().item(),
                "m_error": of_m.mean().item(),
            }  # fmt: skip
            print(
                f"β2 = {beta2}, {decades:g} decades, {row['codes']}, gradients × {factor:g}: {low:.2f}, {middle:.2f}, {high:.2f}, "
                f"mean {row['v_ratio_mean']:.3f}; M off by {row['m_error']:.1%}",
                flush=True,
            )
            if str(options.out) != "-":
                provenance.append(provenance.results_file(options.out, origin), [origin | row])


if __name__ == "__main__":
    main()
