import math

import pytest
import torch
import triton
import triton.language as tl
from buckets import DEVICE, DTYPES, bits, frames_intact, guarded, same_bits, states
from coded import assert_codes, code_frames_intact, coded_states
from hypothesis import given, settings
from hypothesis import strategies as st
from launchers import update_moments_ as advance_
from tolerances import BIAS_CORRECTION_ERROR, assert_within, decoded_error, moments_error, normalised_error, store_unit

from benchmarks import formulas
from lowrank_kernels.backends.triton import adam
from lowrank_kernels.backends.triton.dots import INTERPRETED
from lowrank_kernels.storage import eight_bit

pytestmark = pytest.mark.gpu
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 3}


def update_moments_(exp_avgs, exp_avg_sqs, projected, **options):
    return advance_(exp_avgs, exp_avg_sqs, projected=projected, **options)


def check(exp_avgs, exp_avg_sqs, projected, out=None, **adam):
    """Against the reference in fp64 on the very inputs."""
    before = [(m.double(), v.double(), r.double()) for m, v, r in zip(exp_avgs, exp_avg_sqs, projected, strict=True)]
    normalised = update_moments_(exp_avgs, exp_avg_sqs, projected, out=out, **adam)
    assert normalised is (projected if out is None else out)
    coefficients = {"beta1": adam["beta1"], "beta2": adam["beta2"]}
    store = store_unit(normalised.dtype, INTERPRETED) if normalised.dtype != torch.float32 else 0.0
    for (m, v, r), exp_avg, exp_avg_sq, result in zip(before, exp_avgs, exp_avg_sqs, normalised, strict=True):
        errors = moments_error(m, v, r, **coefficients)
        expected = formulas.update_moments_(m, v, r, **adam)
        assert_within(exp_avg, m, errors[0], "M")
        assert_within(exp_avg_sq, v, errors[1], "V")
        assert_within(
            result,
            expected,
            normalised_error(m, v, errors, **adam, store=store, correction=BIAS_CORRECTION_ERROR) + 2.0**-25 * (store > 0),
            "N",
        )


@pytest.mark.parametrize("shape", [(1, 1), (1, 1023), (5, 205), (33, 67), (64, 48), (1030, 1)], ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_update_moments(shape, count):
    exp_avgs, exp_avg_sqs = states(count, *shape)
    projected = guarded(torch.randn(count, *shape))
    check(exp_avgs, exp_avg_sqs, projected, **ADAM)
    assert frames_intact([*exp_avgs, *exp_avg_sqs, projected])


@settings(max_examples=40, deadline=None)
@given(beta1=st.floats(0, 0.999), beta2=st.floats(0, 0.9999), eps=st.sampled_from([1e-12, 1e-8, 1e-3]), step=st.integers(1, 10**6))
def test_any_coefficients(beta1, beta2, eps, step):
    exp_avgs, exp_avg_sqs = states(1, 7, 11)
    check(exp_avgs, exp_avg_sqs, torch.randn(1, 7, 11, device=DEVICE), beta1=beta1, beta2=beta2, eps=eps, step=step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_of_any_dtype(dtype):
    exp_avgs, exp_avg_sqs = states(2, 9, 150)
    projected = torch.randn(2, 9, 150, device=DEVICE)
    kept = projected.clone()
    check(exp_avgs, exp_avg_sqs, projected, torch.full_like(projected, float("nan"), dtype=dtype), **ADAM)
    assert torch.equal(projected, kept)


@pytest.mark.parametrize("scale", [1e15, 1e-15, 1e-18])
def test_extreme_scales(scale):
    """R² stays representable; beyond that V is infinite or zero in fp32 whatever one does."""
    exp_avgs, exp_avg_sqs = states(1, 9, 50, scale)
    check(exp_avgs, exp_avg_sqs, scale * torch.randn(1, 9, 50, device=DEVICE), **ADAM)


def test_first_step_from_zero_has_size_one():
    """M̂ = R and V̂ = R²: N = R / (|R| + ε), so the bias corrections cancel exactly what the betas left
    out."""
    projected = torch.randn(1, 20, 30, device=DEVICE)
    r = projected.double().clone()
    zeros = [torch.zeros(20, 30, device=DEVICE)], [torch.zeros(20, 30, device=DEVICE)]
    normalised = update_moments_(*zeros, projected, beta1=0.9, beta2=0.999, eps=1e-8, step=1)
    assert_within(normalised, r / (r.abs() + 1e-8), torch.full_like(r, 20 * 2.0**-24), "N")


def test_zero_gradient_and_zero_states_give_zero():
    zeros = [torch.zeros(3, 5, device=DEVICE)], [torch.zeros(3, 5, device=DEVICE)]
    assert not update_moments_(*zeros, torch.zeros(1, 3, 5, device=DEVICE), **ADAM).any()


def test_each_matrix_its_own_states():
    """A matrix of a bucket gives the bits that it gives alone."""
    exp_avgs, exp_avg_sqs = states(4, 6, 300)
    projected = torch.randn(4, 6, 300, device=DEVICE)
    alone = [([m.clone()], [v.clone()], r.clone()[None]) for m, v, r in zip(exp_avgs, exp_avg_sqs, projected, strict=True)]
    update_moments_(exp_avgs, exp_avg_sqs, projected, **ADAM)
    for index, (m, v, r) in enumerate(alone):
        update_moments_(m, v, r, **ADAM)
        assert same_bits(bits([m[0], v[0], r[0]]), bits([exp_avgs[index], exp_avg_sqs[index], projected[index]]))


def test_found_inf_leaves_the_bits():
    exp_avgs, exp_avg_sqs = states(2, 9, 150)
    exp_avgs[0][0, 0] = float("nan")
    kept = bits(exp_avgs + exp_avg_sqs)
    projected = torch.full((2, 9, 150), float("inf"), device=DEVICE)
    update_moments_(exp_avgs, exp_avg_sqs, projected, **ADAM, found_inf=torch.ones((), device=DEVICE))
    assert same_bits(bits(exp_avgs + exp_avg_sqs), kept)


def test_found_inf_of_zero_changes_nothing():
    first = states(1, 9, 150)
    second = [[tensor.clone() for tensor in bucket] for bucket in first]
    projected = torch.randn(1, 9, 150, device=DEVICE)
    a = update_moments_(*first, projected.clone(), **ADAM)
    b = update_moments_(*second, projected.clone(), **ADAM, found_inf=torch.zeros(1, device=DEVICE))
    assert same_bits(bits([a, *first[0], *first[1]]), bits([b, *second[0], *second[1]]))


def updated(states, projected, out, counts=None, **adam):
    """The launch on four lists of 8-bit moments, or on two of fp32 ones; counts: each matrix's own."""
    advance_(*states, projected=projected, out=out, device_steps=counts, **adam)


def check_coded(states, projected, out, counts=None, **adam):
    """8-bit moments against the reference in fp64 on what the codes say."""
    exact = [eight_bit.decode(*coded, torch.float64) for coded in zip(*states, strict=True)]
    r_before = projected.double().clone()
    updated(states, projected, out, counts, **adam)
    betas = {"beta1": adam["beta1"], "beta2": adam["beta2"]}
    store = store_unit(out.dtype, INTERPRETED) if out.dtype != torch.float32 else 0.0
    for index, ((m, v), coded) in enumerate(zip(exact, zip(*states, strict=True), strict=True)):
        r, step = r_before[index], int(counts[index]) + 1 if counts else adam["step"]
        errors = moments_error(m, v, r, **betas, state_errors=decoded_error(m, v))
        here = {**adam, "step": step}
        expected = formulas.update_moments_(m, v, r, **here)
        bound = normalised_error(m, v, errors, **here, store=store, correction=BIAS_CORRECTION_ERROR)
        assert_within(out[index], expected, bound + 2.0**-25 * (store > 0), "N")
        assert_codes(coded, m, v, errors, step)


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 205), (33, 67), (2, 512), (21, 1)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_eight_bit(shape, count):
    states = coded_states(count, *shape)
    projected = guarded(torch.randn(count, *shape))
    check_coded(states, projected, projected, **ADAM)
    assert frames_intact([*states[2], *states[3], projected]) and code_frames_intact(states[0] + states[1])


@pytest.mark.parametrize("scale", [1e15, 1e-15])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_bit_of_any_size_and_out_of_any_dtype(dtype, scale):
    projected = scale * torch.randn(2, 9, 150, device=DEVICE)
    kept = projected.clone()
    check_coded(coded_states(2, 9, 150, scale), projected, torch.full_like(projected, float("nan"), dtype=dtype), **ADAM)
    assert torch.equal(projected, kept)


def test_eight_bit_aligned():
    """Addresses, and shapes, that let the compiler move 16 bytes at a time."""
    states = [[tensor.clone() for tensor in tensors] for tensors in coded_states(2, 16, 320)]
    check_coded(states, torch.randn(2, 16, 320, device=DEVICE), torch.empty(2, 16, 320, device=DEVICE), **ADAM)


def test_fresh_eight_bit_moments():
    """Scales of 0 stand for moments of 0, whatever the codes are: N = R / (|R| + ε)."""
    states = coded_states(1, 9, 70)
    states[2][0].zero_(), states[3][0].zero_()
    check_coded(states, torch.randn(1, 9, 70, device=DEVICE), torch.empty(1, 9, 70, device=DEVICE), **{**ADAM, "step": 1})


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # R is NaN, as it may be
def test_eight_bit_nan_stays_in_its_block():
    states = coded_states(1, 3, 200)
    clean = [[tensor.clone() for tensor in tensors] for tensors in states]
    projected = torch.randn(1, 3, 200, device=DEVICE)
    other = projected.clone()
    projected[0, 1, 70] = float("nan")
    for _ in range(2):  # the second time the gradient is clean and the moments are not
        out, expected = torch.empty_like(projected), torch.empty_like(projected)
        updated(states, projected, out, **ADAM)
        updated(clean, other, expected, **ADAM)
        for tensors in (states, clean):
            tensors.append(eight_bit.decode(*(tensor[0] for tensor in tensors)))
        for found, right in zip(states.pop(), clean.pop(), strict=True):
            assert found[1, 64:128].isnan().all()
            found[1, 64:128] = right[1, 64:128] = 0
            assert torch.equal(found, right)
        projected = other
    assert out[0, 1, 64:128].isnan().all()
    out[0, 1, 64:128] = expected[0, 1, 64:128] = 0
    assert torch.equal(out, expected)


def test_eight_bit_found_inf_leaves_the_bits():
    states = coded_states(2, 9, 150)
    kept = [[tensor.clone() for tensor in tensors] for tensors in states]
    projected = torch.full((2, 9, 150), float("inf"), device=DEVICE)
    updated(states, projected, projected, **ADAM, found_inf=torch.ones((), device=DEVICE))
    assert all(torch.equal(a, b) for tensors, before in zip(states, kept, strict=True) for a, b in zip(tensors, before, strict=True))


@triton.jit
def _bias_correction_kernel(counts, log_beta, out, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(counts + offs, mask=offs < numel, other=1.0)
    tl.store(out + offs, adam.bias_correction(t, tl.cast(log_beta, tl.float32)), mask=offs < numel)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.999999])
def test_bias_correction_on_the_device(beta):
    counts = torch.unique(torch.cat([torch.arange(1, 4000), torch.logspace(0, 7, 4000).round()])).float().to(DEVICE)
    found, log = torch.full_like(counts, float("nan")), math.log(beta) if beta else -math.inf
    _bias_correction_kernel[(triton.cdiv(len(counts), 1024),)](counts, log, found, len(counts), 1024)
    exact = -torch.expm1(counts.double() * log)
    assert_within(found, exact, BIAS_CORRECTION_ERROR * exact, "1 − βᵗ")


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.5, 0.999999)], ids=str)
@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8-bit"])
def test_steps_counted_on_the_device(coded, betas):
    """Each matrix by its own counter, which the launch only reads."""
    counts = [torch.full((), float(count), device=DEVICE) for count in (0, 7, 100_000)]
    adam = {"beta1": betas[0], "beta2": betas[1], "eps": 1e-8, "step": None}
    projected = torch.randn(3, 9, 150, device=DEVICE)
    out = torch.full_like(projected, float("nan"))
    if coded:
        check_coded(coded_states(3, 9, 150), projected, out, counts, **adam)
    else:
        before = [states(1, 9, 150) for _ in counts]
        both = [m[0].double() for m, _ in before], [v[0].double() for _, v in before]
        updated([[m[0] for m, _ in before], [v[0] for _, v in before]], projected, out, counts, **adam)
        for m, v, r, result, count in zip(*both, projected, out, (1, 8, 100_001), strict=True):
            errors = moments_error(m, v, r, *betas)
            here = {**adam, "step": count}
            expected = formulas.update_moments_(m, v, r.double(), **here)
            assert_within(result, expected, normalised_error(m, v, errors, **here, correction=BIAS_CORRECTION_ERROR), "N")
    assert [int(count) for count in counts] == [0, 7, 100_000]


def test_the_launcher_takes_counts_on_the_device_instead_of_a_step():
    """What `step` says is then not looked at, nor are the counts raised."""
    counts = [torch.full((), float(count), device=DEVICE) for count in (0, 7, 100_000)]
    exp_avgs, exp_avg_sqs = states(3, 9, 150)
    projected = torch.randn(3, 9, 150, device=DEVICE)
    before = [(m.double(), v.double(), r.double()) for m, v, r in zip(exp_avgs, exp_avg_sqs, projected, strict=True)]
    out = torch.full_like(projected, float("nan"))
    assert update_moments_(exp_avgs, exp_avg_sqs, projected, **{**ADAM, "step": 0}, device_steps=counts, out=out) is out
    for (m, v, r), result, step in zip(before, out, (1, 8, 100_001), strict=True):
        errors = moments_error(m, v, r, ADAM["beta1"], ADAM["beta2"])
        here = {**ADAM, "step": step}
        expected = formulas.update_moments_(m, v, r, **here)
        assert_within(result, expected, normalised_error(m, v, errors, **here, correction=BIAS_CORRECTION_ERROR), "N")
    assert [int(count) for count in counts] == [0, 7, 100_000] and frames_intact([*exp_avgs, *exp_avg_sqs])
