"""python -m tests.fuzz: random cases of the step, each against the reference in fp64 within the bounds
derived in tolerances.py.

Every case is a function of its seed alone: shapes, ranks, dtypes, strides, hyperparameters, kinds of
gradient, R from memory, 8-bit moments, stochastic rounding, counts and rates on the device, skipped steps; on
the CPU path and, in Triton's interpreter or on a GPU, on the single pass and the split. A failing case prints
the one line that repeats it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import random
import sys
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "kernels")]

import buckets  # noqa: E402
import steps  # noqa: E402
from buckets import DEVICE, DTYPES, LAYOUTS  # noqa: E402
from coded import code_frames_intact, coded_states  # noqa: E402
from steps import NAMES  # noqa: E402

from benchmarks.gpu.lost import is_lost  # noqa: E402
from lowrank_kernels import backends, philox  # noqa: E402
from lowrank_kernels.backends import cpu, reference  # noqa: E402
from lowrank_kernels.backends.triton import choose, single_pass, split  # noqa: E402

PATHS = ("cpu", "single_pass", "split") if DEVICE == "cpu" else ("single_pass", "split")
GRADIENTS = ("noise", "noise", "noise", "zero", "rank one", "one row")


@dataclasses.dataclass(frozen=True)
class Case:
    """What a seed stands for. Weights, gradients and bases have dtypes and layouts of their own in the split
    and on the CPU. R comes from gradients, or, in the dtype that `projected` names, from memory.

    wide: extents, strides and addresses are multiples of 16, which the tiles of a GPU's own rows want; other
        cases run in the small tiles.
    """

    path: str
    m: int
    n: int
    rank: int
    count: int
    right: bool
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    layouts: tuple[str, str, str]
    gradient: str
    gradient_scale: float
    fresh: bool
    state_bits: int
    stochastic: bool
    on_device: bool
    found_inf: float | None
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float
    step: int
    wide: bool
    projected: torch.dtype | None


def draw(seed: int) -> Case:
    pick = random.Random(seed)

    def size(largest: int) -> int:
        return max(1, round(math.exp(pick.uniform(0, math.log(largest)))))

    path = pick.choice(PATHS)
    m, n = size(150), size(200)
    dtype = pick.choice(DTYPES)
    mixed = path != "single_pass" and pick.random() < 0.3
    dtypes = tuple(pick.choice(DTYPES) if mixed else dtype for _ in range(3))
    fresh = pick.random() < 0.2
    # In fp16 a gradient of 1e4 times noise is near infinity; R² must stay finite in fp32.
    decades = 3 if torch.float16 in dtypes else 14
    case = Case(
        path=path,
        m=m,
        n=n,
        rank=pick.choice((1, size(128), min(m, size(128)), min(m, n, 128))),
        count=pick.choice((1, 1, 2, 3)),
        right=pick.random() < 0.5,
        dtypes=dtypes,
        layouts=tuple(pick.choice(LAYOUTS) if pick.random() < 0.4 else "rows" for _ in range(3)),
        gradient=pick.choice(GRADIENTS),
        gradient_scale=10 ** pick.uniform(-decades, decades) if pick.random() < 0.3 else 1.0,
        fresh=fresh,
        state_bits=pick.choice((32, 32, 8)),
        stochastic=dtypes[0] == torch.bfloat16 and pick.random() < 0.5,
        on_device=pick.random() < 0.3,
        found_inf=pick.choice((None, None, None, 0.0, 1.0)),
        lr=pick.choice((0.0, 10 ** pick.uniform(-5, 0))),
        # M of a CPU is β1·M + … as M + (1 − β1)·(R − M), which loses digits for a β1 near 0 that nobody uses.
        beta1=pick.choice((0.0, 0.5, 0.9, 0.95, pick.uniform(0.5, 1))),
        # With no memory in V, N may pass 65504, which bases of fp16 cannot be multiplied with.
        beta2=pick.choice((0.9, 0.99, 0.999, 0.9999) if torch.float16 in dtypes else (0.0, 0.9, 0.99, 0.999, 0.9999)),
        eps=pick.choice((1e-12, 1e-8, 1e-8, 1e-3, 1.0)),
        weight_decay=pick.choice((0.0, 0.0, 0.01, 0.1, 1.0)),
        scale=pick.choice((0.25, 1.0, 10 ** pick.uniform(-2, 1))),
        step=1 if fresh else size(10**6),
        wide=pick.random() < 0.5,
        projected=pick.choice(DTYPES) if pick.random() < 0.2 else None,
    )
    return widened(case) if case.wide else case


def widened(case: Case) -> Case:
    m, n, rank = (16 * math.ceil(extent / 16) for extent in (case.m, case.n, case.rank))
    layouts = tuple("rows" if layout == "strided" else layout for layout in case.layouts)
    return dataclasses.replace(case, m=m, n=n, rank=rank, layouts=layouts)


Lists = dict[str, list[torch.Tensor]]


def make(case: Case) -> Lists:
    count, m, n, rank, right = case.count, case.m, case.n, case.rank, case.right
    of_weight, of_grad, of_basis = case.layouts
    pad = 16 if case.wide else 3
    weights = buckets.stored(count, m, n, right, case.dtypes[0], of_weight, pad=pad)
    grads = buckets.stored(count, m, n, right, case.dtypes[1], of_grad, case.gradient_scale, pad=pad)
    for grad in grads:
        if case.gradient == "zero":
            grad.zero_()
        elif case.gradient == "rank one":
            grad.copy_(grad[:1] * torch.linspace(-1, 1, grad.shape[0], device=DEVICE)[:, None].to(grad.dtype))
        elif case.gradient == "one row":
            grad[1:] *= 1e-3
    bases = buckets.matrices(count, m, rank, case.dtypes[2], of_basis, scale=m**-0.5, pad=pad)
    moments = (
        coded_states(count, rank, n, case.gradient_scale) if case.state_bits == 8 else buckets.states(count, rank, n, case.gradient_scale)
    )
    if case.fresh:
        for tensors in moments:
            for tensor in tensors:
                tensor.zero_()
    lists = dict(zip(NAMES, (weights, grads, bases, *moments), strict=False))
    if case.projected is not None:
        r = [reference.project(basis, grad, right) for basis, grad in zip(bases, lists.pop("grads"), strict=True)]
        largest = torch.finfo(case.projected).max
        lists["projected"] = [each.clamp(-largest, largest).to(case.projected).contiguous() for each in r]
    return lists


def run(case: Case, lists: Lists, seeds: torch.Tensor | None) -> None:
    options = {name: getattr(case, name) for name in ("beta1", "beta2", "eps", "weight_decay", "scale", "lr", "step")}
    options["found_inf"] = None if case.found_inf is None else torch.tensor([case.found_inf], device=DEVICE)
    if case.on_device:
        options |= {"lr": -1.0, "device_lr": torch.tensor([case.lr], device=DEVICE)}
    if case.path == "cpu":
        backends.step(*steps.bucket_of(lists, case.right, rounding_seeds=seeds, **options))
        return
    path = {"single_pass": single_pass, "split": split}[case.path]
    with mock.patch.object(choose, "single_pass", steps.a_row_for_everything):
        steps.run(path, lists, case.right, rounding_seeds=seeds, **options)


def check(seed: int) -> Case:
    """Raises AssertionError, or whatever the step raised."""
    case = draw(seed)
    torch.manual_seed(seed)
    lists = make(case)
    seeds = philox.seed_tensor([seed + index for index in range(case.count)], DEVICE) if case.stochastic else None
    before = {name: [tensor.clone() for tensor in tensors] for name, tensors in lists.items()}
    run(case, lists, seeds)
    for name, tensors in lists.items():
        inputs = name in ("grads", "bases", "projected")
        if inputs or case.found_inf:
            same = all(torch.equal(a, b) for a, b in zip(tensors, before[name], strict=True))
            assert same, f"{name} changed, " + ("an input" if inputs else "though found_inf is set")
        if name == "projected":
            continue  # in no frame
        intact = code_frames_intact if tensors[0].dtype == torch.uint8 else buckets.frames_intact
        assert intact(tensors), f"something was written around {name}"
    if not case.found_inf:
        scalars = {name: getattr(case, name) for name in steps.STEP}
        if case.on_device:
            scalars["lr"] = torch.tensor(case.lr).item()
        lr_on_device = case.on_device and case.path != "cpu"
        for index in range(case.count):
            steps.judge(
                before, lists, index, case.right, scalars, seed=None if seeds is None else seeds[index : index + 1],
                lr_on_device=lr_on_device, on_cpu_path=case.path == "cpu", native=cpu.NATIVE_BF16,
            )  # fmt: skip
    return case


NOT_RUN = "not run: an earlier case lost the GPU to this process"
_lost = False


def attempt(seed: int) -> tuple[int, str, str | None]:
    """(seed, path, what went wrong, NOT_RUN, or None)."""
    global _lost
    if _lost:
        return seed, draw(seed).path, NOT_RUN
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of overflow in the interpreter
            return seed, check(seed).path, None
    except Exception as error:
        _lost = is_lost(error)
        return seed, draw(seed).path, f"{draw(seed)}\n{traceback.format_exc(limit=-3)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(2**31), help="of the first case; the next ones count up"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() if DEVICE == "cpu" else 1)
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.cases)
    print(f"{arguments.cases} cases with seeds {seeds.start} to {seeds.stop - 1}, {', '.join(PATHS)} on {DEVICE}", flush=True)
    started, failed, not_run, counts = time.monotonic(), 0, 0, dict.fromkeys(PATHS, 0)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        arguments.workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        chunk = max(1, min(50, arguments.cases // (4 * arguments.workers)))
        for done, (seed, path, problem) in enumerate(pool.map(attempt, seeds, chunksize=chunk), 1):
            counts[path] += 1
            if problem == NOT_RUN:
                not_run += 1
            elif problem is not None:
                failed += 1
                print(f"FAILED: repeat with  python -m tests.fuzz --cases 1 --seed {seed}\n{problem}", flush=True)
            if done % 1000 == 0:
                print(f"{done} of {arguments.cases}, {failed} failed, {time.monotonic() - started:.0f} s", flush=True)
    print(
        f"{arguments.cases} cases ({', '.join(f'{path} {count}' for path, count in counts.items())}): {failed} failed"
        + (f", {not_run} {NOT_RUN}" if not_run else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
