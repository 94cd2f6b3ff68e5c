"""A bucket's step by its backend: which one serves it, what is composed, and the CPU implementation against
reference.py in fp64."""

import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import tolerances
import torch

import lowrank_kernels as lrk
from benchmarks import formulas
from lowrank_kernels import backends
from lowrank_kernels.backends import cpu, cuda, reference
from lowrank_kernels.lifts.back_projection import BackProjection
from lowrank_kernels.rules import Rule
from lowrank_kernels.rules.adamw import AdamW
from lowrank_kernels.storage import EightBit, Plain, eight_bit

step_ = functools.partial(formulas.adamw_step_, run=backends.step)
HYPER = dict(lr=0.05, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, scale=0.25)


def bucket(m, n, rank, right, dtype=torch.float32, batch=1, strided=False, scale=1.0, seed=0):
    """weights, grads (as stored), bases, exp_avgs, exp_avg_sqs of a bucket with some history in its
    moments."""
    generator = torch.Generator().manual_seed(seed)

    def stored():
        matrix = torch.randn(*((n, m) if right else (m, n)), generator=generator)
        matrix = matrix.to(dtype)
        return torch.stack([matrix, matrix], dim=-1)[..., 0] if strided else matrix

    weights = [stored() for _ in range(batch)]
    grads = [stored().mul(scale) for _ in range(batch)]
    bases = [torch.linalg.qr(torch.randn(m, rank, generator=generator))[0].to(dtype) for _ in range(batch)]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    exp_avgs = [torch.randn(rank, n, generator=generator, dtype=state) * scale for _ in range(batch)]
    exp_avg_sqs = [torch.rand(rank, n, generator=generator, dtype=state) * scale**2 for _ in range(batch)]
    return weights, grads, bases, exp_avgs, exp_avg_sqs


def in_fp64(tensors):
    return [[tensor.double() for tensor in group] for group in tensors]


def assert_step_is_right(tensors, step, right, hyper=HYPER, run=None):
    """Runs `run` on the bucket and compares weights and moments with the reference in fp64, within the
    derived bounds."""
    exact = in_fp64([[t.clone() for t in group] for group in tensors])
    before = in_fp64([[t.clone() for t in group] for group in tensors])
    formulas.adamw_step_(*exact, **hyper, step=step, right=right)
    (run or step_)(*tensors, **hyper, step=step, right=right)
    dtype = tensors[0][0].dtype
    native = cpu.NATIVE_BF16 and dtype == torch.bfloat16
    unit = tolerances.UNIT.get(dtype, 2.0**-53)
    for number in range(len(tensors[0])):
        weight, grad, basis, exp_avg, exp_avg_sq = (group[number] for group in before)
        weight, grad = reference.orient(weight, right), reference.orient(grad, right)
        projected = basis.mT @ grad
        of_r = tolerances.project_error(basis, grad) + (unit * projected.abs() if native else 0)
        errors = tolerances.moments_error(exp_avg, exp_avg_sq, projected, hyper["beta1"], hyper["beta2"], of_r)
        tolerances.assert_within(tensors[3][number], exact[3][number], errors[0], "exp_avg")
        tolerances.assert_within(tensors[4][number], exact[4][number], errors[1], "exp_avg_sq")
        adam = {key: hyper[key] for key in ("beta1", "beta2", "eps")}
        of_n = tolerances.normalised_error(exact[3][number], exact[4][number], errors, **adam, step=step)
        normalised = formulas.update_moments_(exp_avg.clone(), exp_avg_sq.clone(), projected, **adam, step=step)
        bound = tolerances.back_project_error(
            weight.to(dtype),
            basis,
            normalised,
            lr=hyper["lr"],
            scale=hyper["scale"],
            weight_decay=hyper["weight_decay"],
            store=unit,
            operand_unit=unit if native else 0.0,
            normalised_error=of_n,
        )
        actual, expected = (reference.orient(group[0][number], right) for group in (tensors, exact))
        tolerances.assert_within(actual, expected, bound, "weight")


SHAPES = [(1, 1, 1), (1, 9, 1), (9, 1, 1), (7, 33, 5), (33, 7, 7), (64, 64, 64), (300, 301, 80), (96, 520, 33)]


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, n, rank", SHAPES)
def test_cpu_step_against_fp64(m, n, rank, dtype, right):
    for case in (dict(), dict(batch=3), dict(strided=True), dict(scale=1e-2)):
        assert_step_is_right(bucket(m, n, rank, right, dtype, **case), step=3, right=right)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-15, 1e15])
def test_cpu_step_at_extreme_scales(scale, right):
    assert_step_is_right(bucket(40, 60, 8, right, scale=scale), step=1, right=right)


def test_cpu_step_takes_the_blas_without_onednn(monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_LINEAR", None)
    assert_step_is_right(bucket(300, 301, 80, True), step=2, right=True)


def test_cpu_step_without_native_bf16(monkeypatch):
    monkeypatch.setattr(cpu, "NATIVE_BF16", False)
    for right in (False, True):
        assert_step_is_right(bucket(96, 120, 16, right, torch.bfloat16), step=2, right=right)


def test_cpu_step_of_fp32_weights_with_bf16_bases_and_gradients_keeps_n_in_fp32():
    weights, grads, bases, exp_avgs, exp_avg_sqs = bucket(96, 120, 16, True, torch.bfloat16)
    weights = [weight.float() for weight in weights]
    # One with moments so large that R's own rounding to bf16 does not show beside them.
    tensors = [weights, [grad * 2.0**-20 for grad in grads], bases, exp_avgs, exp_avg_sqs]
    exact = in_fp64([[t.clone() for t in group] for group in tensors])
    before = weights[0].double().clone()
    formulas.adamw_step_(*exact, **HYPER, step=3, right=True)
    step_(*tensors, **HYPER, step=3, right=True)
    # Products and sums in fp32: r + some of its roundings, far under bf16's 2⁻⁹.
    assert (weights[0].double() - exact[0][0]).norm() <= 1e-5 * (exact[0][0] - before).norm()


def test_cpu_step_in_chunks_equals_one_by_one(monkeypatch):
    together, alone = bucket(40, 60, 8, True, batch=5), bucket(40, 60, 8, True, batch=5)
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 2 * 8 * 60)
    step_(*together, **HYPER, step=4, right=True)
    for number in range(5):
        step_(*([group[number]] for group in alone), **HYPER, step=4, right=True)
    for a, b in zip(together[0] + together[3] + together[4], alone[0] + alone[3] + alone[4], strict=True):
        assert torch.equal(a, b)


def test_fp64_step_stays_in_fp64():
    tensors = bucket(20, 30, 4, False, torch.float64)
    exact = [[t.clone() for t in group] for group in tensors]
    formulas.adamw_step_(*exact, **HYPER, step=1, right=False)
    step_(*tensors, **HYPER, step=1, right=False)
    for a, b in zip(tensors[0] + tensors[3], exact[0] + exact[3], strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("right", [False, True])
def test_parts_compose_to_the_step(right):
    whole, parts = (bucket(24, 36, 6, right, batch=2) for _ in range(2))
    step_(*whole, **HYPER, step=2, right=right)
    weights, grads, bases, exp_avgs, exp_avg_sqs = parts
    projected = cpu.project(bases, grads, right)
    counts = [torch.tensor(1.0) for _ in weights]
    normalised = cpu.update_moments_(exp_avgs, exp_avg_sqs, projected, beta1=0.9, beta2=0.99, eps=1e-8, device_steps=counts)
    cpu.back_project_(weights, bases, normalised, lr=0.05, scale=0.25, weight_decay=0.1, right=right)
    for a, b in zip(whole[0] + whole[3] + whole[4], parts[0] + parts[3] + parts[4], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", [step_, formulas.adamw_step_])
def test_found_inf_leaves_every_bit(implementation):
    tensors = bucket(24, 36, 6, False)
    tensors[1][0][0, 0] = float("inf")
    before = [[t.clone() for t in group] for group in tensors]
    implementation(*tensors, **HYPER, step=1, right=False, found_inf=torch.ones(1))
    assert all(torch.equal(a, b) for x, y in zip(tensors, before, strict=True) for a, b in zip(x, y, strict=True))
    tensors[1][0][0, 0] = 1.0
    implementation(*tensors, **HYPER, step=1, right=False, found_inf=torch.zeros(1))
    assert not torch.equal(tensors[0][0], before[0][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.ones(12, 21)] * 3}, r"weights \(12, 20\) and grads \(12, 21\) must share a shape"),
        ({"grads": [torch.ones(12, 20)] * 2}, "equally many matrices, got 2 grads for 3"),
        ({"grads": [torch.ones(12, 20), torch.ones(20, 12).T, torch.ones(12, 20)]}, r"grads must share shape, strides.*\[1\] has"),
        ({"grads": None}, "either grads or projected"),
        ({"projected": [torch.ones(3, 20)] * 3}, "either grads or projected"),
        ({"grads": None, "projected": [torch.ones(4, 20)] * 3}, r"projected must be row-major \(3, 20\)"),
        ({"grads": None, "projected": [torch.ones(20, 3).T] * 3}, r"projected must be row-major .* strides \(1, 3\)"),
        ({"grads": None, "projected": [torch.ones(3, 20)] * 2}, "equally many matrices, got 2 projected for 3"),
        ({"weights": []}, "weights is empty"),
        ({"right": True}, "must fit a right weight"),
        ({"bases": [torch.ones(11, 3)] * 3}, "must fit a left weight"),
        ({"exp_avg": [torch.ones(20, 3)] * 3}, r"exp_avg must be \(3, 20\) torch.float32, got \(20, 3\)"),
        ({"exp_avg": [torch.ones(3, 20).T.contiguous().T] * 3}, "exp_avg must be row-major"),
        ({"exp_avg": [torch.ones(3, 20).bfloat16()] * 3}, "exp_avg must be .* torch.float32, got .* torch.bfloat16"),
        ({"exp_avg": [torch.ones(3, 20, dtype=torch.uint8)] * 3}, "exp_avg must be .* got .* torch.uint8"),
        ({"exp_avg_scale": [torch.ones(3, 1)] * 3}, "states must be exp_avg, exp_avg_sq for .*, got exp_avg, exp_avg_sq, exp_avg_scale"),
        ({"steps": [torch.zeros(())]}, "equally many"),
        ({"steps": [torch.zeros((), dtype=torch.int64)] * 3}, "steps must be one float32"),
        ({"found_inf": torch.ones(2)}, "found_inf must be one float32"),
        ({"lr": torch.ones(2)}, "lr must be one float32"),
        ({"lr": torch.ones((), dtype=torch.float64)}, "lr must be one float32"),
        ({"rounding_seeds": torch.ones(2, dtype=torch.int64)}, r"rounding_seeds are \(3,\) int64"),
        ({"rounding_seeds": torch.ones(3, dtype=torch.int64)}, "for bfloat16 weights, got .* for torch.float32"),
    ],
    ids=str,
)
def test_a_bucket_says_what_does_not_fit(change, message):
    made, hyper = formulas.bucket_of(*bucket(12, 20, 3, False, batch=3), **HYPER, right=False)
    made.check(hyper)
    for name, value in change.items():
        if name == "lr":
            hyper = dataclasses.replace(hyper, lr=value)
        elif name.startswith("exp_avg"):
            made.states[name] = value
        else:
            setattr(made, name, value)
    with pytest.raises(ValueError, match=message):
        made.check(hyper)


@pytest.mark.parametrize("change", [{"exp_avg": torch.float32}, {"exp_avg_scale": None}, {"exp_avg_scale": (3, 2)}], ids=str)
def test_a_bucket_of_8_bit_states_says_what_does_not_fit(change):
    weights, grads, bases, _, _ = bucket(12, 20, 3, False)
    codes = {name: [torch.zeros(3, 20, dtype=torch.uint8)] for name in eight_bit.MOMENTS}
    scales = {name: [torch.ones(3, 1)] for name in eight_bit.SCALES}
    made = backends.Bucket(weights, bases, codes | scales, [torch.zeros(())], False, grads=grads)
    hyper = backends.Hyper(AdamW(), BackProjection(), EightBit(), lr=0.1)
    made.check(hyper)
    for name, value in change.items():
        if value is None:
            del made.states[name]
        else:
            made.states[name] = [torch.ones(value) if isinstance(value, tuple) else torch.ones(3, 20, dtype=value)]
    with pytest.raises(ValueError, match="exp_avg"):
        made.check(hyper)


def test_kernels_tell_autograd_that_they_wrote():
    """As in-place operators do, so that a backward pass through stale weights raises; here what CUDA runs, in
    the interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("needs the interpreter, on CPU tensors")
    whole, hyper = formulas.bucket_of(*bucket(12, 20, 3, False), **HYPER, right=False)
    version = whole.weights[0]._version
    cuda.step(whole, hyper)
    assert whole.weights[0]._version == version + 1
    cuda.lift(whole, hyper, torch.randn(1, 3, 20))
    assert whole.weights[0]._version == version + 2


@pytest.mark.parametrize("fused", [True, False])
def test_a_rate_on_the_device_reaches_the_kernels(fused):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("needs the interpreter, on CPU tensors")
    number, tensor = (bucket(12, 20, 3, False) for _ in range(2))
    for lists, lr in ((number, None), (tensor, torch.tensor(HYPER["lr"]))):
        made, hyper = formulas.bucket_of(*lists, **HYPER, right=False, device_lr=lr)
        if fused:
            cuda.step(made, hyper)
        else:
            cuda.lift(made, hyper, cuda.update(made, hyper, cuda.project(made)))
    assert torch.allclose(number[0][0], tensor[0][0], rtol=1e-6)


class Doubled(Rule):
    """What no device has in one go."""

    name = "doubled"

    def state(self, rank, n):
        return {"last": (rank, n)}

    def update(self, projected, state, step):
        return state["last"].copy_(2 * projected)


@pytest.mark.parametrize("implementation", ["cpu", "cuda"])
@pytest.mark.parametrize("right", [False, True])
def test_what_is_not_fused_is_composed(implementation, right, monkeypatch):
    if implementation == "cuda":
        pytest.importorskip("triton")
        monkeypatch.setitem(backends.BACKENDS, "cpu", backends.BACKENDS["cuda"])
    weights, grads, bases, _, _ = bucket(12, 20, 3, right, batch=2)
    exact = [w.double() - 0.05 * reference.orient(2 * p.double() @ p.double().mT @ reference.orient(g.double(), right), right)
             for w, p, g in zip(weights, bases, grads, strict=True)]  # fmt: skip
    last, steps = [torch.zeros(3, 20) for _ in range(2)], [torch.zeros(()) for _ in range(2)]
    made = backends.Bucket(weights, bases, {"last": last}, steps, right, grads=grads)
    hyper = backends.Hyper(Doubled(), BackProjection(), Plain(), lr=0.05)
    made.check(hyper)
    backends.step(made, hyper)
    assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6) for a, b in zip(weights, exact, strict=True))
    assert all(tensor.any() for tensor in last) and not any(steps), "whoever keeps the counts raises them"


def test_a_rule_of_its_own_has_no_8_bit_form():
    class Optimizer(lrk.LowRankAdamW):
        rule = Doubled()

    parameter = torch.nn.Parameter(torch.ones(8, 12))
    with pytest.raises(ValueError, match="state_bits=8 codes exp_avg and exp_avg_sq, and this rule keeps last.*group 0"):
        Optimizer([{"params": [parameter], "rank": 2, "state_bits": 8}])
    optimizer = Optimizer([{"params": [parameter], "rank": 2}])
    optimizer.param_groups[0]["state_bits"] = 8
    parameter.grad = torch.randn(8, 12)
    with pytest.raises(ValueError, match="state_bits=8 codes exp_avg and exp_avg_sq, and this rule keeps last"):
        optimizer.step()
    optimizer.param_groups[0] |= {"state_bits": 32, "moments": "rotate"}
    with pytest.raises(ValueError, match="moments='rotate' needs a rule that says .* 'doubled' does not"):
        optimizer.step()


@pytest.mark.parametrize("right", [False, True])
def test_a_step_from_what_is_projected_is_the_step_from_gradients(right):
    """R is an input of its own; the gradients that are there besides are not looked at."""
    whole, hyper = formulas.bucket_of(*bucket(24, 36, 6, right, batch=2), **HYPER, right=right)
    given, _ = formulas.bucket_of(*bucket(24, 36, 6, right, batch=2), **HYPER, right=right)
    given.projected, given.grads = [2 * r for r in backends.project(whole)], None
    for grad in whole.grads:
        grad.mul_(2)
    backends.step(whole, hyper)
    backends.step(given, hyper)
    for a, b in zip(whole.weights + whole.states["exp_avg"], given.weights + given.states["exp_avg"], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("extents", [(54, 87, 40), (133, 79, 1)], ids=str)
def test_memory_beside_a_basis_is_not_read(extents, by_columns, right):
    """A basis may be a view into a larger tensor, whatever stands in the gaps. Products in bf16 on Intel's
    AMX units multiply it by zero, which leaves a NaN one, in the left operand and in the right one."""
    whole, hyper = formulas.bucket_of(*bucket(*extents, right, batch=1, dtype=torch.bfloat16), **HYPER, right=right)
    viewed, _ = formulas.bucket_of(*([tensor.clone() for tensor in tensors] for tensors in bucket_lists(whole)), **HYPER, right=right)
    basis = viewed.bases[0].mT if by_columns else viewed.bases[0]
    frame = torch.full((basis.shape[0] + 6, basis.shape[1] + 6), torch.nan, dtype=torch.bfloat16)
    view = frame[3:-3, 3:-3].copy_(basis)
    viewed.bases[0] = view.mT if by_columns else view
    if extents[2] == 1:  # weights without a unit stride take another product of oneDNN's
        for each in (whole, viewed):
            weight = each.weights[0]
            each.weights[0] = weight.new_zeros(2 * weight.shape[0], 2 * weight.shape[1])[::2, ::2].copy_(weight)
    backends.step(whole, hyper)
    backends.step(viewed, hyper)
    assert torch.allclose(viewed.weights[0].float(), whole.weights[0].float(), rtol=2e-2, atol=2e-2)


def bucket_lists(made):
    return made.weights, made.grads, made.bases, made.states["exp_avg"], made.states["exp_avg_sq"]


PROBE = """
import torch
from lowrank_kernels import backends
from lowrank_kernels.ops import dispatch
from lowrank_kernels.backends import cpu
calls = []
cpu._product = lambda a, b: calls.append(1) or a @ b
backends.project(backends.Bucket([torch.randn(4, 5)], [torch.eye(4)], {}, [], False, grads=[torch.randn(4, 5)]))
print(dispatch.REFERENCE_FORCED, len(calls))
"""


@pytest.mark.parametrize("value, expected", [("1", "True 0"), (None, "False 1")])
def test_environment_variable_forces_the_reference(value, expected):
    environment = {key: text for key, text in os.environ.items() if key != "LOWRANK_KERNELS_REFERENCE"}
    if value is not None:
        environment["LOWRANK_KERNELS_REFERENCE"] = value
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_importing_on_a_cpu_stays_free_of_triton():
    probe = "import sys, lowrank_kernels; print([m for m in sys.modules if m.startswith('lowrank_kernels.backends.triton')])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
