"""python -m benchmarks.quality: how good the results of `lrk.ops.range_finder` are, against an SVD in fp64.

The results are bases and singular values. Five figures judge them:

    captured energy   ‖PᵀG‖²_F / Σ_{i≤r} σᵢ²         1 for the best basis, and for a zero gradient
    defect            ‖PᵀP − I‖₂
    σ error           max |σ̂ᵢ − σᵢ| / σᵢ over the leading half of r, where σᵢ ≥ FLOOR·σ₁
    … under the floor max |σ̂ᵢ − σᵢ| / σ₁ over the rest of that half, which G's rounding has changed anyway
    overlap           ‖PᵀU‖²_F / k with the leading k left singular vectors, k ≤ r of them above the floor

Synthetic matrices have random singular vectors. Gradients are captured from the training of the example's
tiny model. sampling.py adds what importance sampling draws, beside exact sampling's inclusion probabilities.
Each case appends a row to results/quality/<date>-<commit>.jsonl. The exit status is 1 if a bar is missed.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in examples/pretrain.py, before torch is loaded

import argparse
import dataclasses
import inspect
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import lowrank_kernels as lrk

from . import provenance, sampling

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FLOOR = 1e-6
"""The share of σ₁ that counts as rounding. Rounding a matrix to fp32 moves its singular values by up to
6e-8·‖G‖_F, which is 1e-6·σ₁ where hundreds are alike."""
SHAPES = [(64, 64), (64, 192), (192, 64), (128, 128), (128, 352), (352, 128), (256, 256), (256, 688), (688, 256)]
LARGE_SHAPES = [(512, 512), (512, 1376), (1376, 512)]
QUICK_SHAPES = [(64, 192), (352, 128)]
CAPTURED_STEPS = (0, 10, 50, 150)
RANKS: dict[str, Callable[[int], int]] = {
    **{f"m/{share}": lambda short, share=share: max(1, short // share) for share in (2, 4, 8, 16, 32)},
    "m-9": lambda short: short - 9,  # plus 8 columns, it is the widest sketch there is
}
"""Ranks as functions of the shorter side. The shorter side is called m here, whichever way the matrix
lies."""


@dataclass(frozen=True)
class Matrix:
    """A gradient to refresh on, fp32."""

    family: str
    spectrum: str
    grad: Tensor
    seed: int = 0


DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(lrk.ops.range_finder).parameters.items()}


@dataclass(frozen=True)
class Setting:
    """Arguments of the range finder. Its defaults at r = m/4 are judged. `oversample` None: as many as r."""

    rank: str = "m/4"
    oversample: int | None = DEFAULTS["oversample"]
    power_iters: int = DEFAULTS["power_iters"]


JUDGED = Setting()
OTHER_RANKS = [Setting(rank=rank) for rank in ("m/8", "m/16", "m/32")]
OTHER_ACCURACIES = [*(Setting(power_iters=count) for count in (0, 1, 2, 3, 4)), Setting(oversample=None)]
OTHER_SHAPES = ((128, 352), (352, 128), (256, 256), (512, 1376))
"""Shapes on which the other settings are measured as well, for information. Among captured gradients they are
measured on those of the last captured step."""


@dataclass(frozen=True)
class Bar:
    """What `key` must be, at least or at most, in every row of these families (None: of all families).
    `judged_only`: only at the defaults."""

    name: str
    key: str
    limit: float
    at_least: bool
    families: tuple[str, ...] | None
    judged_only: bool = True


DECAYING = ("decaying", "stepped", "rank-deficient", "scale", "gradients")
BARS = [
    Bar("captured energy, decaying spectra", "captured_energy", 0.99, True, DECAYING),
    Bar("captured energy, flat spectra", "captured_energy", 0.95, True, ("flat",)),
    Bar("‖PᵀP − I‖₂, every case", "defect", 1e-5, False, None, judged_only=False),
    Bar("σ error in the leading half, decaying spectra", "sigma_error", 0.01, False, DECAYING),
    Bar("σ error in the leading half, flat spectra", "sigma_error", 0.01, False, ("flat",)),
]


def with_spectrum(m: int, n: int, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """U·diag(σ)·Vᵀ with random orthonormal U and V, rounded from fp64 to fp32."""
    left, right = (torch.linalg.qr(torch.randn(side, len(sigma), dtype=torch.float64, generator=generator))[0] for side in (m, n))
    return ((left * sigma.double()) @ right.mT).float()


def spectra(short: int) -> Iterator[tuple[str, str, Tensor | None]]:
    """(family, name, σ) for a shorter side of `short`. σ has at most that many values, the largest is 1. None
    stands for independent normal entries."""
    rank, index = short // 4, torch.arange(1, short + 1, dtype=torch.float64)
    for exponent in (0.5, 0.75, 1, 1.5, 2):
        yield "decaying", f"i^-{exponent:g}", index**-exponent
    for digits in (2, 4, 6, 8):
        yield "decaying", f"geometric to 1e-{digits}", torch.logspace(0, -digits, short, dtype=torch.float64)
    yield "flat", "all equal", torch.ones_like(index)
    yield "flat", "linear", 1 - (index - 1) / short
    yield "flat", "i^-0.25", index**-0.25
    yield "flat", "Gaussian noise", None
    for name, count in (("r/2", rank // 2), ("r", rank), ("2r", 2 * rank)):
        for drop in (10, 1e3, 1e6):
            yield "stepped", f"{name} at 1, rest at {1 / drop:g}", torch.where(index <= count, 1, 1 / drop)
    for name, count in (("1", 1), ("r/2", rank // 2), ("r", rank), ("2r", 2 * rank)):
        yield "rank-deficient", f"rank {name}, 1/i", 1 / index[:count]


def synthetic(shapes: Iterable[tuple[int, int]], seeds: Iterable[int]) -> Iterator[Matrix]:
    for m, n in shapes:
        for seed in seeds:
            generator = torch.Generator().manual_seed(1000 * seed + m + n)
            for family, name, sigma in spectra(min(m, n)):
                noise = sigma is None
                grad = torch.randn(m, n, generator=generator) if noise else with_spectrum(m, n, sigma, generator)
                yield Matrix(family, name, grad, seed)


def extremes(shapes: Iterable[tuple[int, int]]) -> Iterator[Matrix]:
    """The conditions, ranks and scales at which orthonormality breaks first. At 1e-37 small entries are
    subnormal in fp32, at 1e-42 all entries are."""
    for m, n in shapes:
        generator, short = torch.Generator().manual_seed(m + n), min(m, n)
        for digits in range(8):
            yield Matrix("condition", f"1e{digits}", with_spectrum(m, n, torch.logspace(0, -digits, short), generator))
        for rank in (0, 1, 5, short // 2):
            yield Matrix("condition", f"rank {rank}", with_spectrum(m, n, torch.ones(rank), generator) if rank else torch.zeros(m, n))
        grad = with_spectrum(m, n, torch.logspace(0, -4, short), generator).double()
        for digits in (-30, -20, -10, 0, 10, 20, 30):
            yield Matrix("scale", f"1e{digits}", (grad * 10.0**digits).float())
        for digits in (-37, -42):
            yield Matrix("subnormal", f"1e{digits}", (grad * 10.0**digits).float())


def captured_gradients(
    steps: Sequence[int] = CAPTURED_STEPS, *, data: Path | None = None, seed: int = 0, **changes: object
) -> dict[str, dict[int, Tensor]]:
    """Weight name → step → gradient (after clipping) of every projected weight of the example's tiny model.

    The model is trained with AdamW, so that the gradients do not depend on the range finder under study.
    `data` is as in examples/pretrain.py, `changes` are fields of its Settings.
    """
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import settings as example
    import text
    import training
    from methods import METHODS

    lr = METHODS["adamw"].lr  # for every parameter, as in the runs in results/quality
    settings = dataclasses.replace(example.defaults("tiny"), seed=seed, dense_lr=lr, threads=torch.get_num_threads(), **changes).check()
    corpus = text.load(data)
    model = training.build_model(settings)
    optimizer = training.build_optimizer(model, "adamw", lr, settings)
    projected = {id(weight) for weight in lrk.param_groups(model, rank=1)[1]["params"]}
    captured: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for step in range(max(steps) + 1):
        training.train_step(model, optimizer, step, settings, corpus)
        if step in steps:
            for name, weight in model.named_parameters():
                if id(weight) in projected:
                    captured[name][step] = weight.grad.float().clone()
    return dict(captured)


@dataclass(frozen=True)
class Truth:
    """G (m, n), its left singular vectors U and its σ, all fp64."""

    grad: Tensor
    vectors: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, grad: Tensor) -> Truth:
        grad = grad.double()
        if grad.shape[0] >= grad.shape[1]:
            vectors, sigma, _ = torch.linalg.svd(grad, full_matrices=False)
        else:  # the tall form is faster
            _, sigma, transposed = torch.linalg.svd(grad.mT, full_matrices=False)
            vectors = transposed.mT
        return cls(grad, vectors, sigma)


def defect(basis: Tensor) -> float:
    basis = basis.double()
    gram = basis.mT @ basis - torch.eye(basis.shape[-1], dtype=torch.float64)
    return torch.linalg.eigvalsh(gram).abs().max().item() if gram.isfinite().all() else float("nan")


def captured_energy(basis: Tensor, truth: Truth) -> float:
    best = truth.sigma[: basis.shape[-1]].square().sum().item()
    return (basis.double().mT @ truth.grad).square().sum().item() / best if best else 1.0


def sigma_errors(found: Tensor, truth: Truth) -> tuple[float | None, float | None]:
    """(relative error above the floor, error as a share of σ₁ under it) over the leading half. None where
    there is nothing to compare."""
    half = (len(found) + 1) // 2
    exact, error = truth.sigma[:half], (found[:half].double() - truth.sigma[:half]).abs()
    above = (exact >= FLOOR * exact[0]) & (exact > 0)
    relative = (error[above] / exact[above]).max().item() if above.any() else None
    under = (error[~above] / exact[0].clamp_min(torch.finfo(torch.float64).tiny)).max().item() if not above.all() else None
    return relative, under


def overlap(basis: Tensor, truth: Truth) -> float | None:
    sigma = truth.sigma[: basis.shape[-1]]
    count = int(((sigma >= FLOOR * sigma[0]) & (sigma > 0)).sum())
    return (basis.double().mT @ truth.vectors[:, :count]).square().sum().item() / count if count else None


def measure(matrix: Matrix, setting: Setting, truth: Truth) -> dict:
    """Calls the range finder once. Returns the row of its results."""
    rank = RANKS[setting.rank](min(matrix.grad.shape))
    oversample = rank if setting.oversample is None else setting.oversample
    device = "cuda" if torch.cuda.is_available() else "cpu"
    basis, sigma = lrk.ops.range_finder(
        matrix.grad.to(device), rank, oversample=oversample, power_iters=setting.power_iters, seed=matrix.seed
    )
    of_sigma, under_floor = sigma_errors(sigma.cpu(), truth)
    values = {
        "captured_energy": captured_energy(basis.cpu(), truth),
        "defect": defect(basis.cpu()),
        "sigma_error": of_sigma,
        "sigma_error_under_floor": under_floor,
        "overlap": overlap(basis.cpu(), truth),
    }
    return {
        "family": matrix.family,
        "spectrum": matrix.spectrum,
        "rows": matrix.grad.shape[0],
        "columns": matrix.grad.shape[1],
        "rank": rank,
        "oversample": oversample,
        "power_iters": setting.power_iters,
        "seed": matrix.seed,
        "rank_share": setting.rank,
        "judged": setting == JUDGED,
        **{key: value if value is None else float(f"{value:.6g}") for key, value in values.items()},
    }


def study(matrices: Iterable[Matrix], settings: Callable[[Matrix], Sequence[Setting]]) -> Iterator[dict]:
    """A row for each matrix and setting. Each matrix takes only one SVD."""
    for matrix in matrices:
        truth = Truth.of(matrix.grad)
        for setting in settings(matrix):
            yield measure(matrix, setting, truth)


def label(row: dict) -> str:
    columns = f"r+{row['oversample']}" if row["oversample"] == DEFAULTS["oversample"] else "2r"
    return f"r = {row['rank_share']}, l = {columns}, q = {row['power_iters']}"


def settings_of(matrix: Matrix) -> list[Setting]:
    if matrix.family in ("condition", "scale", "subnormal"):
        return [JUDGED, Setting(rank="m/2"), Setting(rank="m-9")]
    if matrix.family == "gradients":
        further = matrix.spectrum.startswith(f"step {max(CAPTURED_STEPS)}:")
    else:
        further = tuple(matrix.grad.shape) in OTHER_SHAPES and matrix.seed == 0
    return list(dict.fromkeys([JUDGED, *OTHER_RANKS, *OTHER_ACCURACIES])) if further else [JUDGED]


def all_rows(quick: bool) -> Iterator[dict]:
    if quick:
        matrices = [synthetic(QUICK_SHAPES, [0]), extremes(QUICK_SHAPES[:1])]
        captured = captured_gradients((0, 10))
    else:
        matrices = [synthetic(SHAPES, [0, 1]), synthetic(LARGE_SHAPES, [0]), extremes(OTHER_SHAPES[:3])]
        captured = captured_gradients()
    for group in matrices:
        yield from study(group, settings_of)
    gradients = (Matrix("gradients", f"step {step}: {name}", grad) for name, by_step in captured.items() for step, grad in by_step.items())
    yield from study(gradients, settings_of)


def print_rows(rows: list[dict], title: str, labels: Callable[[dict], tuple[str, ...]], columns: tuple[str, ...]) -> None:
    families = list(dict.fromkeys(row["family"] for row in rows))
    groups = defaultdict(list)
    for row in sorted(rows, key=lambda row: families.index(row["family"])):
        groups[labels(row)].append(row)

    def shown(group: list[dict], key: str, statistic: Callable, form: str) -> str:
        values = [row[key] for row in group if row[key] is not None]
        return format(statistic(values), form) if values else "–"

    figures = {
        "energy min": ("captured_energy", min, ".4f"),
        "median": ("captured_energy", median, ".4f"),
        "defect max": ("defect", max, ".1e"),
        "σ error max": ("sigma_error", max, ".1e"),
        "median ": ("sigma_error", median, ".1e"),
        "under floor, of σ₁": ("sigma_error_under_floor", max, ".1e"),
        "overlap min": ("overlap", min, ".3f"),
        "median  ": ("overlap", median, ".3f"),
    }
    lines = [(*label, str(len(group)), *(shown(group, *figure) for figure in figures.values())) for label, group in groups.items()]
    provenance.print_table((*columns, "cases", *figures), lines, title)


def judge(rows: list[dict], bars: Sequence[Bar] = BARS) -> bool:
    """Prints PASS or FAIL for each bar with its worst case. Returns True if all hold. A NaN fails."""
    passed = True
    for bar in bars:
        subject = [
            row
            for row in rows
            if row[bar.key] is not None
            and (bar.families is None or row["family"] in bar.families)
            and (row["judged"] or not bar.judged_only)
        ]
        if not subject:
            continue
        missed = [row for row in subject if not (row[bar.key] >= bar.limit if bar.at_least else row[bar.key] <= bar.limit)]
        worst = max(subject, key=lambda row: (row[bar.key] != row[bar.key], -row[bar.key] if bar.at_least else row[bar.key]))
        passed = passed and not missed
        print(
            f"{'FAIL' if missed else 'PASS'}  {bar.name}: {'≥' if bar.at_least else '≤'} {bar.limit:g} in {len(subject) - len(missed)} of "
            f"{len(subject)}; worst {worst[bar.key]:.4g}: {worst['family']}, {worst['spectrum']}, {worst['rows']}×{worst['columns']}, "
            f"{label(worst)}"
        )
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two small shapes, gradients of the first steps")
    parser.add_argument("--out", type=Path, default=provenance.RESULTS / "quality", help="folder of results, or '-' to write none")
    options = parser.parse_args(arguments)
    origin = provenance.provenance(torch.cuda.is_available())
    print(json.dumps(origin, indent=1), flush=True)
    begun = time.perf_counter()
    rows = list(all_rows(options.quick))
    drawn = list(sampling.rows(options.quick))
    print(f"{sum(row['judged'] for row in rows)} matrices, {len(rows)} cases, {len(drawn)} of draws, {time.perf_counter() - begun:.0f} s")
    if str(options.out) != "-":
        provenance.append(path := provenance.results_file(options.out, origin), [origin | row for row in (*rows, *drawn)])
        print(f"appended {len(rows) + len(drawn)} rows to {path}")
    print_rows(rows, "by family", lambda row: (row["family"], label(row)), ("family", "setting"))
    judged = [row for row in rows if row["judged"]]
    print_rows(
        judged,
        label(judged[0]),
        lambda row: (row["family"], row["spectrum"].partition(":")[0]),
        ("family", "spectrum, or step of training"),
    )
    sampling.print_rows(drawn)
    verdicts = judge(rows), sampling.judge(drawn)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
