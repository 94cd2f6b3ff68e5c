"""What a candidate is run on: a bucket of random matrices on the GPU, the check against fp64, and times."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowrank_kernels.backends import Bucket, Hyper, reference
from lowrank_kernels.backends.triton import single_pass, split, table
from lowrank_kernels.backends.triton.configs import SinglePassConfig
from lowrank_kernels.backends.triton.dots import INTERPRETED
from lowrank_kernels.backends.triton.tuned import Key
from lowrank_kernels.storage import eight_bit

from .. import formulas, roofline, timing
from ..cases import Unavailable, require_room
from ..checks import WrongResult
from .candidates import DTYPES, Choice, Shape, label

_TESTS = Path(__file__).parents[2] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "kernels")]  # the bounds are those of the tests

from coded import assert_codes  # noqa: E402
from tolerances import (  # noqa: E402
    BIAS_CORRECTION_ERROR,
    UNIT,
    back_project_error,
    decoded_error,
    moments_error,
    normalised_error,
    project_error,
    store_unit,
)

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 2}
UPDATE = {"lr": 1.0, "scale": 0.25, "weight_decay": 0.01}
"""Of the check. The rate is so large that the update is not lost in the weights' rounding."""
TIMED_LR = 1e-6
REPETITIONS = 7


def bucket_of(key: Key, shape: Shape, device: str) -> tuple[Bucket, Hyper]:
    """Random matrices of the sizes that a training has. Bases are row-major, as a GPU's are, and their
    columns have length 1; a step does not need more of them."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(rows: int, columns: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn((rows, columns), generator=generator, device=device).mul_(scale).to(dtype)

    dtype, each = DTYPES[key.kind], range(shape.count)
    m, n, right = shape.m, shape.n, key.side == "right"
    stored = (n, m) if right else (m, n)
    lists = [[noise(*stored, scale, dtype) for _ in each] for scale in (0.02, 0.01)]
    lists.append([noise(m, key.rank, m**-0.5, dtype) for _ in each])
    moments = [(noise(key.rank, n, 2e-3), noise(key.rank, n, 1e-2).square_()) for _ in each]
    scales = {}
    if key.moments == "8-bit":
        coded = [_coded(*pair) for pair in moments]
        moments = [each[:2] for each in coded]
        scales = {"exp_avg_scales": [each[2] for each in coded], "exp_avg_sq_scales": [each[3] for each in coded]}
    return formulas.bucket_of(*lists, *map(list, zip(*moments, strict=True)), **ADAM, **UPDATE, right=right, **scales)


def _coded(m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    codes = [torch.empty_like(m, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.empty(eight_bit.scales_shape(m.shape), device=m.device) for _ in range(2)]
    eight_bit.encode_(m, v, *codes, *scales, ADAM["step"] - 1)
    return *codes, *scales


class Truth:
    """One matrix of a bucket before a step, and after it in fp64 with the bounds of tests/tolerances.py: an
    error of R grows into one of N and that into one of W. Computed once for all candidates."""

    def __init__(self, bucket: Bucket, key: Key, index: int) -> None:
        self.weight = bucket.weights[index]
        self.states = {name: tensors[index] for name, tensors in bucket.states.items()}
        self._before = [tensor.clone() for tensor in self._tensors()]
        right, basis, grad = bucket.right, bucket.bases[index].double(), bucket.grads[index].double()
        of_states = (0.0, 0.0)
        if key.moments == "8-bit":
            m, v = eight_bit.decode(*self.states.values(), torch.float64)
            of_states = decoded_error(m, v)
        else:
            m, v = (state.double() for state in self.states.values())
        adam = {name: ADAM[name] for name in ("beta1", "beta2", "eps", "step")}
        dtype = bucket.bases[index].dtype
        tf32 = UNIT["tf32"] if key.kind == "tf32" and not INTERPRETED else 0.0
        projected = reference.project(basis, grad, right)
        of_projected = project_error(basis, reference.orient(grad, right), tf32)
        self.errors = moments_error(m, v, projected, ADAM["beta1"], ADAM["beta2"], projected_error=of_projected, state_errors=of_states)
        normalised = formulas.update_moments_(m, v, projected, **adam)
        self.moments = m, v
        bound = back_project_error(
            reference.orient(self.weight.double(), right).to(dtype), basis, normalised, **UPDATE, store=store_unit(dtype, INTERPRETED),
            operand_unit=(0.0 if dtype == torch.float32 else 2 * UNIT[dtype]) + tf32, basis_unit=tf32,
            normalised_error=normalised_error(m, v, self.errors, **adam, correction=BIAS_CORRECTION_ERROR),
        )  # fmt: skip
        self.expected = formulas.updated_weight(self.weight.double(), basis, normalised, **UPDATE, right=right)
        self.bound = reference.orient(bound, right)

    def restore(self) -> None:
        for tensor, before in zip(self._tensors(), self._before, strict=True):
            tensor.copy_(before)

    def check(self) -> None:
        """Raises WrongResult."""
        if len(self.states) == 4:
            try:
                assert_codes(tuple(self.states.values()), *self.moments, self.errors, ADAM["step"])
            except AssertionError as error:
                raise WrongResult(str(error)) from None
        else:
            for name, state, exact, bound in zip("MV", self.states.values(), self.moments, self.errors, strict=True):
                _require_within(name, state, exact, bound)
        _require_within("W", self.weight, self.expected, self.bound)

    def _tensors(self) -> list[Tensor]:
        return [self.weight, *self.states.values()]


def _require_within(what: str, found: Tensor, exact: Tensor, bound: Tensor) -> None:
    wrong = ~((found.double() - exact).abs() <= bound)
    if count := int(wrong.sum()):
        raise WrongResult(f"{what}: {count} of {wrong.numel()} elements out of bounds, first at {wrong.nonzero()[0].tolist()}")


class Bench:
    """A bucket for one key, whose first and last matrix are checked. From now on the products of fp32
    matrices are those of the key's kind. without: labels of choices that are not run."""

    def __init__(self, key: Key, shape: Shape, device: str = "cuda", without: Collection[str] = ()) -> None:
        self.on_gpu, self.without = device == "cuda", without
        if self.on_gpu:
            torch.cuda.empty_cache()
        m, n, dtype = shape.m, shape.n, DTYPES[key.kind]
        matrices = shape.count * (2 * m * n + m * key.rank) * dtype.itemsize
        require_room(matrices + shape.count * 10 * key.rank * n + 80 * m * n, self.on_gpu)
        torch.set_float32_matmul_precision("high" if key.kind == "tf32" else "highest")
        self.bucket, self.hyper = bucket_of(key, shape, device)
        self.rows = table.rows_of(self.bucket)
        self.truths = [Truth(self.bucket, key, index) for index in dict.fromkeys((0, shape.count - 1))]
        state_bits = 8 if key.moments == "8-bit" else 32
        self.bytes_moved = shape.count * roofline.total(roofline.single_pass(m, n, key.rank, dtype, state_bits)).bytes_moved

    def step(self, choice: Choice, hyper: Hyper) -> None:
        path = single_pass if isinstance(choice, SinglePassConfig) else split
        path.step(self.bucket, hyper, self.rows, choice)

    def check(self, choice: Choice) -> None:
        """A step from what the checked matrices were at first. Raises WrongResult, or what the launch
        raises."""
        if label(choice) in self.without:
            raise Unavailable("--without leaves it out")
        for truth in self.truths:
            truth.restore()
        self._poison()
        self.step(choice, self.hyper)
        if self.on_gpu:
            torch.cuda.synchronize()
        for truth in self.truths:
            truth.check()

    def times(self, choices: Mapping[str, Choice], seconds: float) -> dict[str, timing.Timing]:
        """The GPU's own time, with a cold L2; at least seven rounds, in which the choices take turns."""
        hyper = dataclasses.replace(self.hyper, lr=TIMED_LR)
        runs = {name: lambda choice=choice: self.step(choice, hyper) for name, choice in choices.items()}
        return timing.interleave(runs, self.on_gpu, seconds, least_rounds=REPETITIONS, device_only=True)

    def _poison(self) -> None:
        """NaN into the memory that the N of a split is given next: that of the candidate before would pass
        for its own."""
        m, n, rank = self.bucket.extents
        if self.on_gpu:
            torch.cuda.empty_cache()
        first = next(table.launchable(self.bucket, rank * n * self.bucket.bases[0].itemsize))
        torch.full((len(first), rank, n), float("nan"), dtype=self.bucket.bases[0].dtype, device=self.bucket.device)
