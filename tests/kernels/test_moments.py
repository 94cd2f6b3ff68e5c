import pytest
import torch
from buckets import DEVICE, DTYPES, bits, frames_intact, guarded, same_bits, states
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_within, moments_error, normalised_error, store_unit

from lowrank_kernels import reference
from lowrank_kernels.kernels.dots import INTERPRETED
from lowrank_kernels.kernels.moments import update_moments_

pytestmark = pytest.mark.gpu
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 3}


def check(exp_avgs, exp_avg_sqs, projected, out=None, **adam):
    """Against the reference in fp64 on the very inputs."""
    before = [(m.double(), v.double(), r.double()) for m, v, r in zip(exp_avgs, exp_avg_sqs, projected, strict=True)]
    normalised = update_moments_(exp_avgs, exp_avg_sqs, projected, out=out, **adam)
    assert normalised is (projected if out is None else out)
    coefficients = {"beta1": adam["beta1"], "beta2": adam["beta2"]}
    store = store_unit(normalised.dtype, INTERPRETED) if normalised.dtype != torch.float32 else 0.0
    for (m, v, r), exp_avg, exp_avg_sq, result in zip(before, exp_avgs, exp_avg_sqs, normalised, strict=True):
        errors = moments_error(m, v, r, **coefficients)
        expected = reference.update_moments_(m, v, r, **adam)
        assert_within(exp_avg, m, errors[0], "M")
        assert_within(exp_avg_sq, v, errors[1], "V")
        assert_within(result, expected, normalised_error(m, v, errors, **adam, store=store) + 2.0**-25 * (store > 0), "N")


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
    """M̂ = R and V̂ = R²: N = R / (|R| + ε), so the bias corrections cancel exactly what the betas left out."""
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


def test_errors_help():
    exp_avgs, exp_avg_sqs = states(2, 4, 6)
    projected = torch.zeros(2, 4, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"projected must be row-major of shape \(2, 4, 6\), got \(2, 4, 5\)"):
        update_moments_(exp_avgs, exp_avg_sqs, projected[..., :5], **ADAM)
    with pytest.raises(ValueError, match="step counts from 1, got 0"):
        update_moments_(exp_avgs, exp_avg_sqs, projected, **{**ADAM, "step": 0})
    with pytest.raises(ValueError, match="exp_avgs must be row-major"):
        update_moments_([m.T for m in exp_avgs], [v.T for v in exp_avg_sqs], projected, **ADAM)
    with pytest.raises(ValueError, match="exp_avgs must be one of torch.float32, got torch.bfloat16"):
        update_moments_([m.bfloat16() for m in exp_avgs], exp_avg_sqs, projected, **ADAM)
    with pytest.raises(ValueError, match="found_inf must be one float32"):
        update_moments_(exp_avgs, exp_avg_sqs, projected, **ADAM, found_inf=torch.zeros(2, device=DEVICE))
