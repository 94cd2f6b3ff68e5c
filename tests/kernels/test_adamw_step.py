import functools

import pytest
import torch
from buckets import DEVICE, DTYPES, bits, matrices, orient, same_bits, states, stored, tf32_unit
from steps import serve_everything
from tolerances import (
    BIAS_CORRECTION_ERROR,
    UNIT,
    assert_within,
    back_project_error,
    moments_error,
    normalised_error,
    project_error,
    store_unit,
)

from benchmarks import formulas
from lowrank_kernels.backends import reference
from lowrank_kernels.backends.bucket import Bucket
from lowrank_kernels.backends.triton import adamw_step, builtin, single_pass
from lowrank_kernels.backends.triton.dots import INTERPRETED

pytestmark = pytest.mark.gpu
adamw_step_ = functools.partial(formulas.adamw_step_, run=adamw_step.step)
SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 4}
UPDATE = {"lr": 0.1, "scale": 0.5, "weight_decay": 0.2}


@pytest.fixture(autouse=True, params=["single-pass", "split"])
def path(request, monkeypatch):
    """Each path in turn, also where the other one would be chosen."""
    serve_everything(monkeypatch)
    if request.param == "split":
        monkeypatch.setattr(single_pass, "row_for", lambda *_: None)
    return request.param


def bucket(count, m, n, r, right, dtype=torch.float32):
    """weights, grads, bases, exp_avgs, exp_avg_sqs. Columns of the bases have length 1; the step does not
    need more of them."""
    bases = matrices(count, m, r, dtype, scale=m**-0.5)
    return stored(count, m, n, right, dtype), stored(count, m, n, right, dtype), bases, *states(count, r, n)


def copy(buckets):
    return [[tensor.clone() for tensor in tensors] for tensors in buckets]


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_against_the_reference(count, dtype, right):
    """The bounds of the three launches chained: an error of R grows into one of N and that into one of W."""
    buckets = bucket(count, 70, 40, 33, right, dtype)
    weights, grads, bases, exp_avgs, exp_avg_sqs = buckets
    exact = [[tensor.double() for tensor in tensors] for tensors in buckets]
    adamw_step_(*buckets, **ADAM, **UPDATE, right=right)
    betas = {"beta1": ADAM["beta1"], "beta2": ADAM["beta2"]}
    for index in range(count):
        w, g, p, m, v = (tensors[index] for tensors in exact)
        r = reference.project(p, g, right)
        tf32 = tf32_unit(dtype)
        errors = moments_error(m, v, r, **betas, projected_error=project_error(p, orient(g, right), tf32))
        n = formulas.update_moments_(m, v, r, **ADAM)
        of_n = normalised_error(m, v, errors, **ADAM, correction=BIAS_CORRECTION_ERROR)
        bound = back_project_error(
            orient(w, right).to(dtype), p, n, **UPDATE, store=store_unit(dtype, INTERPRETED),
            operand_unit=(0.0 if dtype == torch.float32 else 2 * UNIT[dtype]) + tf32, basis_unit=tf32, normalised_error=of_n,
        )  # fmt: skip
        formulas.back_project_(w, p, n, **UPDATE, right=right)
        assert_within(exp_avgs[index], m, errors[0], "M")
        assert_within(exp_avg_sqs[index], v, errors[1], "V")
        assert_within(orient(weights[index], right), orient(w, right), bound, "W")


@SIDES
def test_identity_basis_is_torch_adamw(right):
    """P = I and α = 1: four steps of torch.optim.AdamW, taken in fp64. A step moves W by at most about lr, to
    30u of itself."""
    m, n, lr = 13, 17, 0.01
    weights, _, _, exp_avgs, exp_avg_sqs = bucket(1, m, n, m, right)
    bases = [torch.eye(m, device=DEVICE)]
    exp_avgs[0].zero_(), exp_avg_sqs[0].zero_()
    truth = torch.nn.Parameter(weights[0].double().clone())
    optimizer = torch.optim.AdamW([truth], lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for step in range(1, 5):
        grads = stored(1, m, n, right, torch.float32)
        truth.grad = grads[0].double()
        optimizer.step()
        adamw_step_(
            weights, grads, bases, exp_avgs, exp_avg_sqs, lr=lr, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1,
            scale=1.0, step=step, right=right,
        )  # fmt: skip
    unit = 2.0**-24 + tf32_unit(torch.float32)
    assert_within(weights[0], truth.detach(), 4 * (3 * 2.0**-24 * truth.detach().abs() + 30 * lr * unit), "W")


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # R is NaN, as it may be
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_found_inf_leaves_the_bits(dtype):
    buckets = bucket(2, 70, 67, 33, False, dtype)
    buckets[1][0][0, 0] = float("inf")
    kept = [bits(tensors) for tensors in buckets]
    adamw_step_(*buckets, **ADAM, **UPDATE, right=False, found_inf=torch.ones(1, device=DEVICE))
    assert all(same_bits(bits(tensors), before) for tensors, before in zip(buckets, kept, strict=True))


def test_inputs_stay():
    buckets = bucket(2, 70, 67, 33, False, torch.bfloat16)
    kept = bits(buckets[1] + buckets[2])
    adamw_step_(*buckets, **ADAM, **UPDATE, right=False)
    assert same_bits(bits(buckets[1] + buckets[2]), kept)


def test_same_inputs_same_bits():
    first = bucket(3, 70, 67, 33, True, torch.bfloat16)
    second = copy(first)
    for buckets in (first, second):
        adamw_step_(*buckets, **ADAM, **UPDATE, right=True)
    assert all(same_bits(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


def test_a_matrix_gives_the_same_bits_alone():
    together = bucket(3, 70, 67, 33, False, torch.float32)
    alone = copy(together)
    adamw_step_(*together, **ADAM, **UPDATE, right=False)
    for index in range(3):
        adamw_step_(*([tensors[index]] for tensors in alone), **ADAM, **UPDATE, right=False)
    assert all(same_bits(bits(a), bits(b)) for a, b in zip(together, alone, strict=True))


def test_zero_gradient_of_a_fresh_state_only_decays():
    weights, _, bases, exp_avgs, exp_avg_sqs = bucket(1, 40, 30, 8, False)
    exp_avgs[0].zero_(), exp_avg_sqs[0].zero_()
    expected = [weight * (1 - UPDATE["lr"] * UPDATE["weight_decay"]) for weight in weights]
    adamw_step_(weights, [torch.zeros(40, 30, device=DEVICE)], bases, exp_avgs, exp_avg_sqs, **ADAM, **UPDATE, right=False)
    assert same_bits(bits(weights), bits(expected))


def test_the_path_that_is_chosen(monkeypatch):
    """The split for what has no row: mixed dtypes, ranks past the last row."""
    monkeypatch.undo()

    def single(r, m=300, dtypes=(torch.float32,) * 3):
        weight, grad = (torch.zeros(m, 64, dtype=dtype, device=DEVICE) for dtype in dtypes[:2])
        basis = torch.zeros(m, r, dtype=dtypes[2], device=DEVICE)
        return single_pass.row_for(Bucket([weight] * 1000, [basis] * 1000, {}, [], False, grads=[grad] * 1000), True) is not None

    largest = max(row.rank_covered for row in builtin.SINGLE_PASS[None]["ieee", "fp32"])
    if INTERPRETED:
        assert single(largest)
        assert not single(largest + 1, m=2 * largest)
    assert not single(64, dtypes=(torch.float32, torch.bfloat16, torch.bfloat16))
    assert not single(8192, m=8192)
