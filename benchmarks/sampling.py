"""Whether importance sampling draws as the paper says: part of `python -m benchmarks.quality`.

    top               E‖Pᵀu₁‖²              how often the first direction is in the basis
    mass of first 2r  E‖PᵀU₂ᵣ‖²_F / r       the share of the basis among the first 2r
    null space        the share of the basis outside the range of G, beyond what r > rank(G) makes unavoidable

Each figure stands beside the same figure of exact sampling: successive draws without replacement with
probability ∝ σ, the law of torch.multinomial. Both are also drawn with equal Gumbel noise, and the difference
of those means is judged, because most of the randomness cancels in it.

Directions of equal σ cannot be told apart, nor can those whose σ is less than rounding G to fp32 may change.
So top and mass are means over all directions that could be called first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

import lowrank_kernels as lrk
from lowrank_kernels import extension, philox, range_finder, subspaces

from . import provenance

SHAPES = [(64, 160), (512, 1280)]
SHARES = (16, 4)
REFRESHES = 500
OF_LARGE_BATCHES = 100
"""Number of refreshes in the way of a GPU on the larger shape. On a CPU each takes a second."""
EXACT_DRAWS = 20_000
LIMIT, NULL_LIMIT = 0.03, 0.01
OVERSAMPLE, POWER_ITERS = 8, 1
TIED = 1e-5
"""Neighbours whose σ differ by less than this, relatively, count as equal."""
ROUNDING = 1e-6
"""The share of σ₁ by which rounding to fp32 may change σ, as in quality.py. Which directions have values
under it is chance, so they count as tied."""


@dataclass(frozen=True)
class Case:
    """G (m, n) fp32, with its rank if that is below min(m, n)."""

    spectrum: str
    grad: Tensor
    rank: int | None = None


def cases(m: int, n: int) -> Iterator[Case]:
    """The seven spectra of the bounds, with random singular vectors."""
    short, generator = min(m, n), torch.Generator().manual_seed(m + n)
    index, low = torch.arange(1, short + 1, dtype=torch.float64), 10 * short // 64
    spectra = {
        "1/i": 1 / index,
        "i^-1.5": index**-1.5,
        "i^-0.5": index**-0.5,
        "exp(-i/6)": torch.exp(-index / 6),
        "flat": torch.ones_like(index),
        f"rank {low} of {short}": torch.ones(low, dtype=torch.float64),
    }
    for name, sigma in spectra.items():
        left, right = (torch.linalg.qr(torch.randn(side, len(sigma), dtype=torch.float64, generator=generator))[0] for side in (m, n))
        yield Case(name, ((left * sigma) @ right.mT).float(), len(sigma) if len(sigma) < short else None)
    yield Case("Gaussian noise", torch.randn(m, n, generator=generator))


class Law:
    """The inclusions (k,) of the singular directions of G under exact sampling of r of them, and the figures
    that follow from them."""

    def __init__(self, case: Case, rank: int):
        self.vectors, sigma, _ = torch.linalg.svd(case.grad.double(), full_matrices=False)
        self.real = case.rank or len(sigma)
        self.sigma = sigma * (torch.arange(len(sigma)) < self.real)
        self.rank = rank
        generator = torch.Generator().manual_seed(0)
        self.exact = torch.zeros_like(sigma)
        for _ in range(EXACT_DRAWS // 1000):
            weights = self.sigma.clamp_min(torch.finfo(torch.float64).tiny).expand(1000, -1)
            drawn = torch.multinomial(weights, rank, replacement=False, generator=generator)
            self.exact += torch.zeros_like(sigma).index_add_(0, drawn.flatten(), torch.ones(drawn.numel(), dtype=torch.float64))
        self.exact /= EXACT_DRAWS // 1000 * 1000

    def with_noise(self, seed: int) -> Tensor:
        """Inclusions of one exact draw, with the same Gumbel noise as a refresh of this seed."""
        chosen = lrk.ops.sample_importance(self.sigma, self.rank, seed=[seed])
        return torch.zeros_like(self.sigma).index_fill_(0, chosen, 1)

    def of_basis(self, basis: Tensor) -> Tensor:
        return (self.vectors.mT @ basis.double().cpu()).square().sum(-1)

    def _among_first(self, inclusions: Tensor, count: int) -> float:
        """Σ over the first `count` directions. Directions tied with the last of them count with their
        mean."""
        edge, rounding = self.sigma[count - 1], ROUNDING * self.sigma.max()
        tied = (self.sigma - edge).abs() <= TIED * edge
        if edge <= rounding:
            tied = self.sigma <= rounding
        before = int(tied.double().argmax())
        return (inclusions[:before].sum() + inclusions[tied].mean() * (count - before)).item()

    def top(self, inclusions: Tensor) -> float:
        return self._among_first(inclusions, 1)

    def mass(self, inclusions: Tensor) -> float:
        return self._among_first(inclusions, min(2 * self.rank, len(self.sigma))) / self.rank

    def null(self, inclusions: Tensor) -> float:
        return max(0.0, min(self.rank, self.real) - inclusions[: self.real].sum().item()) / self.rank


def measure(law: Law, bases: Iterator[tuple[int, Tensor]]) -> dict:
    """Compares the (seed, basis) of many refreshes with the law."""
    found, noise, count = torch.zeros_like(law.sigma), torch.zeros_like(law.sigma), 0
    for seed, basis in bases:
        found += law.of_basis(basis)
        noise += law.with_noise(seed)
        count += 1
    found, noise = found / count, noise / count
    judged = found - noise + law.exact
    values = {
        "top": law.top(judged),
        "top_exact": law.top(law.exact),
        "top_raw": law.top(found),
        "mass": law.mass(judged),
        "mass_exact": law.mass(law.exact),
        "mass_raw": law.mass(found),
        "null": law.null(found),
    }
    return {"refreshes": count} | {key: float(f"{value:.6g}") for key, value in values.items()}


def refreshes(grad: Tensor, rank: int, count: int, choose: Callable[..., list[Tensor]], together: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Refreshes number 0 … count − 1 of the first parameter, as an optimizer of seed 0 does them. `together`
    of them run at once, with one sketch."""
    for first in range(0, count, together):
        sketch = philox.signed64(philox.derive_seed(0, first))
        own = [philox.signed64(philox.derive_seed(0, number, 0, 0)) for number in range(first, min(first + together, count))]
        settings = (rank, False, "importance", "randomized", OVERSAMPLE, POWER_ITERS, sketch, own, torch.float32, None)
        yield from zip(own, choose([grad] * len(own), [], *settings), strict=True)


def _as_on_a_gpu(*arguments: object) -> list[Tensor]:
    with mock.patch.object(range_finder, "may_look", lambda tensor: False):
        return subspaces.choose_bases(*arguments)


def ways() -> dict[str, Callable[..., list[Tensor]]]:
    """The way of a refresh here and, on a CPU, also the way of a batch on a GPU."""
    batch = {"as on a GPU": _as_on_a_gpu} if extension.loaded() and not torch.cuda.is_available() else {}
    return {"operator": subspaces.choose_bases} | batch


def rows(quick: bool) -> Iterator[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for m, n in SHAPES[:1] if quick else SHAPES:
        for case in cases(m, n):
            for share in SHARES:
                law = Law(case, min(m, n) // share)
                for way, choose in ways().items():
                    count = OF_LARGE_BATCHES if way == "as on a GPU" and min(m, n) > 64 else REFRESHES
                    count = count // 10 if quick else count
                    found = measure(law, refreshes(case.grad.to(device), law.rank, count, choose))
                    place = {"family": "sampling", "spectrum": case.spectrum, "rows": m, "columns": n, "rank": law.rank}
                    yield place | {"rank_share": f"m/{share}", "way": way} | found


def holds(row: dict) -> bool:
    """Whether the row is within the bounds. A NaN is not."""
    return abs(row["top"] - row["top_exact"]) <= LIMIT and abs(row["mass"] - row["mass_exact"]) <= LIMIT and row["null"] <= NULL_LIMIT


def print_rows(found: list[dict]) -> None:
    columns = ("shape", "r", "spectrum", "way", "top", "exact", "mass of first 2r", "exact ", "null space")
    lines = [
        (f"{row['rows']}×{row['columns']}", row["rank_share"], row["spectrum"], row["way"])
        + tuple(f"{row[key]:.3f}" for key in ("top", "top_exact", "mass", "mass_exact"))
        + (f"{100 * row['null']:.2f} %",)
        for row in found
    ]
    provenance.print_table(columns, lines, "what importance sampling draws")


def judge(found: list[dict]) -> bool:
    """Prints PASS or FAIL with the worst differences. Returns True if all are within the bounds."""
    if not found:
        return True
    missed = [row for row in found if not holds(row)]
    worst = [max(abs(row[key] - row[f"{key}_exact"]) for row in found) for key in ("top", "mass")]
    print(
        f"{'FAIL' if missed else 'PASS'}  importance sampling: within {LIMIT:g} of exact sampling, ≤ {NULL_LIMIT:g} in the null space, in "
        f"{len(found) - len(missed)} of {len(found)}; worst: top {worst[0]:.3f}, mass {worst[1]:.3f}, "
        f"null space {max(row['null'] for row in found):.4f}"
    )
    for row in missed:
        print(f"      missed: {row['spectrum']}, {row['rows']}×{row['columns']}, r = {row['rank_share']}, {row['way']}")
    return not missed
