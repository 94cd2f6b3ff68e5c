"""The step's optional arguments: counts and rate on the device, 8-bit moments, stochastic rounding. The CPU
path against reference.py."""

import functools

import pytest
import torch

from benchmarks import formulas
from lowrank_kernels import backends
from lowrank_kernels.backends import cpu, reference
from lowrank_kernels.storage import eight_bit

step_ = functools.partial(formulas.adamw_step_, run=backends.step)
ADAM = dict(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, scale=0.25)
SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])


@pytest.fixture
def fp32_products(monkeypatch):
    """A CPU with bf16 instructions rounds R to bf16, which moves codes and hides what these tests look
    for."""
    monkeypatch.setattr(cpu, "NATIVE_BF16", False)


def bucket(m, n, rank, right, dtype=torch.float32, batch=2):
    """weights, grads (as stored), bases, exp_avgs, exp_avg_sqs with some history."""
    shape = (n, m) if right else (m, n)
    weights, grads = ([torch.randn(shape).to(dtype) for _ in range(batch)] for _ in range(2))
    bases = [torch.linalg.qr(torch.randn(m, rank))[0].to(dtype) for _ in range(batch)]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return weights, grads, bases, *([torch.rand(rank, n, dtype=state) for _ in range(batch)] for _ in range(2))


def coded(exp_avgs, exp_avg_sqs):
    """The same moments in 8 bits: codes, codes, scales, scales."""
    found = [[], [], [], []]
    for m, v in zip(exp_avgs, exp_avg_sqs, strict=True):
        scales = eight_bit.scales_shape(m.shape)
        codes = [torch.empty(m.shape, dtype=torch.uint8) for _ in range(2)] + [torch.empty(scales) for _ in range(2)]
        eight_bit.encode_(m - 0.5, v, *codes, step=1)
        for part, code in zip(found, codes, strict=True):
            part.append(code)
    return found


def clone(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_count_and_rate_on_the_device_are_those_of_the_host(step, dtype, right, fp32_products):
    host = bucket(20, 30, 5, right, dtype)
    device, truth = clone(host), clone(host)
    step_(*host, **ADAM, lr=0.125, step=step, right=right)
    counts = [torch.tensor(step - 1.0) for _ in host[0]]
    options = dict(lr=0.0, step=0, right=right, device_lr=torch.tensor([0.125]), device_steps=counts)
    step_(*device, **ADAM, **options)
    formulas.adamw_step_(*truth, **ADAM, **options)
    for a, b, c in zip(host[0] + host[3], device[0] + device[3], truth[0] + truth[3], strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a.float(), c.float(), rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert all(count == step - 1 for count in counts), "whoever keeps the counts raises them"


def test_each_matrix_has_its_own_count():
    together = bucket(20, 30, 5, False)
    alone = clone(together)
    step_(*together, **ADAM, lr=0.1, step=0, right=False, device_steps=[torch.tensor(2.0), torch.tensor(40.0)])
    for index, step in enumerate((3, 41)):
        step_(*([tensors[index]] for tensors in alone), **ADAM, lr=0.1, step=step, right=False)
    assert all(torch.equal(a, b) for a, b in zip(together[0], alone[0], strict=True))


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("m, n, rank", [(1, 1, 1), (20, 64, 5), (20, 65, 20), (70, 200, 33), (9, 3, 3)])
def test_8_bit_moments_against_the_reference(m, n, rank, dtype, right, fp32_products):
    """A code is off by one where its exact value lies at half an integer, to the rounding of fp32; how
    seldom, and no further."""
    weights, grads, bases, exp_avgs, exp_avg_sqs = bucket(m, n, rank, right, dtype)
    codes = coded(exp_avgs, exp_avg_sqs)
    before = [weight.double() for weight in weights]
    truth = [[t.double() for t in weights], [g.double() for g in grads], [b.double() for b in bases], *clone(codes[:2])]
    truth_scales = clone(codes[2:])
    options = dict(lr=0.1, step=3, right=right)
    scales = dict(exp_avg_scales=codes[2], exp_avg_sq_scales=codes[3])
    step_(weights, grads, bases, *codes[:2], **ADAM, **options, **scales)
    formulas.adamw_step_(*truth, **ADAM, **options, exp_avg_scales=truth_scales[0], exp_avg_sq_scales=truth_scales[1])
    for found, exact in zip(codes[0] + codes[1], truth[3] + truth[4], strict=True):
        difference = (found.int() - exact.int()).abs()
        assert difference.max() <= 1 and difference.count_nonzero() <= 1 + 0.02 * difference.numel()
    for found, exact in zip(codes[2] + codes[3], truth_scales[0] + truth_scales[1], strict=True):
        assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6)  # the last block is one column, whose M may cancel
    unit = torch.finfo(dtype).eps / 2
    for found, exact, old in zip(weights, truth[0], before, strict=True):
        error = (found.double() - exact).abs()
        assert (error <= 1.01 * unit * exact.abs() + 1e-4 * (exact - old).abs().max()).all()


@SIDES
def test_stochastic_rounding_on_a_cpu_is_the_references(right):
    """Both round the same number up or down by the same bits, so they differ only where a threshold lies
    within an fp32 rounding."""
    weights, grads, bases, exp_avgs, exp_avg_sqs = bucket(48, 100, 7, right, torch.bfloat16)
    truth = clone((weights, grads, bases, exp_avgs, exp_avg_sqs))
    seeds = torch.tensor([3, -(2**63)])
    options = dict(lr=0.1, step=3, right=right, rounding_seeds=seeds)
    projected = cpu.project(bases, grads, right)  # on some CPUs rounded to bf16: the reference gets what the CPU has
    step_(weights, grads, bases, exp_avgs, exp_avg_sqs, **ADAM, **options)
    for index in range(2):
        adam = {key: ADAM[key] for key in ("beta1", "beta2", "eps")}
        normalised = formulas.update_moments_(truth[3][index], truth[4][index], projected[index], **adam, step=3)
        exact = formulas.updated_weight(
            truth[0][index].double(), truth[2][index], normalised, lr=0.1, scale=0.25, weight_decay=0.1, right=right
        )
        expected = reference.round_stochastically(exact, seeds[index : index + 1], 3)
        assert (weights[index] != expected).double().mean() < 1e-3
        assert not torch.equal(weights[index], exact.to(torch.bfloat16))


@SIDES
@pytest.mark.parametrize("implementation", [step_, formulas.adamw_step_])
def test_found_inf_leaves_every_bit(implementation, right):
    weights, grads, bases, exp_avgs, exp_avg_sqs = bucket(24, 80, 6, right, torch.bfloat16)
    codes = coded(exp_avgs, exp_avg_sqs)
    grads[0][0, 0] = float("inf")
    lists = [weights, grads, bases, *codes]
    before = clone(lists)
    options = dict(lr=0.1, step=1, right=right, rounding_seeds=torch.tensor([1, 2]), device_steps=[torch.tensor(0.0)] * 2)
    scales = dict(exp_avg_scales=codes[2], exp_avg_sq_scales=codes[3])
    implementation(weights, grads, bases, *codes[:2], **ADAM, **options, **scales, found_inf=torch.ones(1))
    assert all(torch.equal(a, b) for x, y in zip(lists, before, strict=True) for a, b in zip(x, y, strict=True))
