"""Fira's and APOLLO's steps against the reference in fp64, within bounds chained from those of their
parts."""

import copy
import dataclasses

import pytest
import torch
from buckets import DEVICE, DTYPES, OVER, frames_intact, orient, rows_of_this_machine, tf32_unit
from coded import assert_codes
from matrix import pairwise
from steps import NAMES, STEP, bucket, bucket_of
from tolerances import (
    ACCUMULATION_UNIT,
    BIAS_CORRECTION_ERROR,
    UNIT,
    assert_within,
    back_project_error,
    decoded_error,
    moments_error,
    normalised_error,
    project_error,
    rounded_between,
    store_unit,
)

from benchmarks import formulas
from lowrank_kernels import backends, philox
from lowrank_kernels.backends import cuda
from lowrank_kernels.backends.triton import builtin, choose, limiter, table
from lowrank_kernels.backends.triton.dots import INTERPRETED
from lowrank_kernels.lifts.residual import Residual
from lowrank_kernels.lifts.scaling import ChannelScaling, TensorScaling
from lowrank_kernels.storage import eight_bit

pytestmark = pytest.mark.gpu
SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
LIFTS = pytest.mark.parametrize("lift", [Residual(), ChannelScaling(), TensorScaling()], ids=lambda lift: lift.name)


def lifted(lists, right, lift, last, **options):
    """A bucket of `lift` whose update had the norm `last` in the step before."""
    made, hyper = bucket_of(lists, right, **options)
    [name] = lift.state()
    made.states[name] = [torch.full((), float(last), device=DEVICE) for _ in made.weights]
    hyper = dataclasses.replace(hyper, lift=lift)
    made.check(hyper)
    return made, hyper


def run(made, hyper):
    (cuda.residual_step if hyper.lift.name == "residual" else cuda.scaling_step)(made, hyper)


def check(made, hyper, step):
    before = copy.deepcopy(made)
    run(made, hyper)
    for index in range(len(made)):
        judge(before, made, hyper, index, step)
    assert frames_intact(made.weights)


def judge(before, after, hyper, index, step):
    """One matrix. The weights' bound is that of a back-projection by [P, I] of [X, s·G'], where X = N − s·R
    for Fira and nothing for APOLLO."""
    right, fira = before.right, hyper.lift.name == "residual"
    weight, p, grad = (tensors[index] for tensors in (before.weights, before.bases, before.grads))
    w, p, g = orient(weight.double(), right), p.double(), orient(grad.double(), right)
    states = {name: tensors[index] for name, tensors in before.states.items()}
    (beta1, beta2), eps = hyper.options["betas"], hyper.options["eps"]
    of_states = (0.0, 0.0)
    if "exp_avg_scale" in states:
        m, v = eight_bit.decode(*(states[name] for name in (*eight_bit.MOMENTS, *eight_bit.SCALES)), torch.float64)
        of_states = decoded_error(m, v)
    else:
        m, v = states["exp_avg"].double(), states["exp_avg_sq"].double()
    u32, of_basis = UNIT[torch.float32], before.bases[index].dtype
    u16, tf32 = (0.0 if of_basis == torch.float32 else 2 * UNIT[of_basis]), tf32_unit(of_basis)
    r = p.mT @ g
    of_r = project_error(p, g, tf32)
    errors = moments_error(m, v, r, beta1, beta2, projected_error=of_r, state_errors=of_states)
    adam = dict(beta1=beta1, beta2=beta2, eps=eps, step=step)
    n = formulas.update_moments_(m, v, r, **adam)
    of_n = normalised_error(m, v, errors, **adam, correction=BIAS_CORRECTION_ERROR)

    # The ratio of norms, by relative errors: those of the norms, sums of r squares (of r·n for a tensor), and
    # six roundings.
    whole = hyper.lift.name == "tensor_scaling"
    dims, terms = ((0, 1), r.numel()) if whole else ((0,), r.shape[0])

    def norms(x):
        return torch.linalg.vector_norm(x, dim=dims)

    ratio = torch.where(norms(r) > 0, norms(n) / norms(r), 0)
    of_ratio = torch.where(ratio > 0, norms(of_n) / norms(n) + norms(of_r) / norms(r), 0) + (terms + 6) * u32
    # The norm that the limiter sees.
    scaled, of_scaled = g, torch.zeros_like(g)
    if fira:
        size = p.abs() @ r.abs()
        scaled = g - p @ r
        of_scaled = p.abs() @ of_r + ((len(r) + 1) * ACCUMULATION_UNIT + 2 * u16 + 2 * tf32) * size + u32 * g.abs()
    norm = torch.linalg.vector_norm(ratio * scaled)
    of_norm = torch.linalg.vector_norm(ratio * (of_scaled + of_ratio * scaled.abs())) / norm + (g.numel() + 6) * u32
    last = states[next(iter(hyper.lift.state()))].double()
    most = 1.01 * last
    limited = most / norm if last > 0 and norm > most else torch.ones(())
    of_s = of_ratio + (of_norm + 4 * u32 if limited < 1 else 0.0)
    assert last == 0 or (norm * limited / most - 1).abs() > 2 * of_norm or limited < 1, "too near to the limit to be judged"

    s = limited * ratio
    x = n - s * r if fira else torch.zeros_like(n)
    of_x = of_n + s * of_r + s * of_s * r.abs() + u16 * s * r.abs() + 3 * u32 * (n.abs() + s * r.abs()) if fira else torch.zeros_like(n)
    directions = torch.cat([p, torch.eye(len(p), dtype=torch.float64, device=p.device)], 1)
    factors, of_factors = torch.cat([x, s * g]), torch.cat([of_x, (s * of_s).expand_as(g) * g.abs()])
    device_lr = isinstance(hyper.lr, torch.Tensor)
    numbers = dict(lr=float(hyper.lr), scale=hyper.scale, weight_decay=hyper.weight_decay)
    seed = None if before.rounding_seeds is None else before.rounding_seeds[index : index + 1]
    bound = back_project_error(
        w.to(weight.dtype), directions, factors, **numbers, device_lr=device_lr, normalised_error=of_factors,
        store=0.0 if seed is not None else store_unit(weight.dtype, INTERPRETED), operand_unit=u16 + tf32, basis_unit=tf32,
    )  # fmt: skip
    expected = (1 - numbers["lr"] * hyper.weight_decay) * w - numbers["lr"] * hyper.scale * (directions @ factors)
    found = after.weights[index]
    if seed is None:
        assert_within(orient(found, right), expected, bound, "W")
    else:
        least, greatest = rounded_between(orient(expected, right), orient(bound, right), seed, step)
        assert ((least <= found) & (found <= greatest)).all(), "W is not the stochastic rounding of anything within its bounds"
    if "exp_avg_scale" in states:
        assert_codes(tuple(after.states[name][index] for name in (*eight_bit.MOMENTS, *eight_bit.SCALES)), m, v, errors, step)
    else:
        assert_within(after.states["exp_avg"][index], m, errors[0], "M")
        assert_within(after.states["exp_avg_sq"][index], v, errors[1], "V")
    kept = after.states[next(iter(hyper.lift.state()))][index]
    assert abs(float(kept) / float(norm * limited) - 1) <= float(of_norm) + 4 * u32


@LIFTS
@pytest.mark.parametrize(("coded", "on_device", "dtype", "right"), pairwise([False, True], [False, True], DTYPES, [False, True]), ids=str)
def test_against_the_reference(coded, on_device, dtype, right, lift):
    """Without a limit, and with one that acts."""
    options = {"device_lr": torch.tensor(0.1, device=DEVICE)} if on_device else {}
    if dtype == torch.bfloat16 and coded:
        options["rounding_seeds"] = philox.seed_tensor([1, 2], DEVICE)
    for last in (0.0, 0.5, 1e6):
        check(*lifted(bucket(2, 70, 130, 17, right, dtype, coded), right, lift, last, **options), STEP["step"])


@LIFTS
@SIDES
@pytest.mark.parametrize("shape", [(1, 70, 1), (70, 1, 1), (67, 130, 65), (20, 30, 45), (48, 96, 16), (70, 1100, 9)], ids=str)
def test_shapes(shape, right, lift):
    m, n, r = shape
    check(*lifted(bucket(1, m, n, r, right), right, lift, 0.1), STEP["step"])


@LIFTS
@SIDES
@pytest.mark.parametrize("layout", ["columns", "strided"])
def test_layouts(layout, right, lift):
    check(*lifted(bucket(2, 37, 70, 9, right, layout=layout, basis_layout=layout), right, lift, 0.1), STEP["step"])


@SIDES
def test_many_directions_are_summed_over_tiles(right):
    """More directions than a tile of the projection has."""
    check(*lifted(bucket(1, 150, 40, 140, right), right, Residual(), 0.1), STEP["step"])
    check(*lifted(bucket(1, 150, 40, 140, right), right, ChannelScaling(), 0.1), STEP["step"])


@SIDES
@pytest.mark.parametrize(("kind", "row", "wide"), rows_of_this_machine(builtin.RESIDUAL), ids=str)
def test_every_row(kind, row, wide, right, monkeypatch):
    monkeypatch.setattr(choose, "residual", lambda *_: row)
    dtype = torch.bfloat16 if kind == "16bit" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        over = OVER[wide]
        m, n, r = row.BLOCK_M + over[0], row.BLOCK_N + over[1], row.BLOCK_K + over[2]
        check(*lifted(bucket(1, m, n, r, right, dtype, pad=over[0]), right, Residual(), 0.1), STEP["step"])
    finally:
        torch.set_float32_matmul_precision(before)


@LIFTS
@SIDES
@pytest.mark.parametrize("size", [1e-2, 1e-6, 1e-9])
def test_tiny_gradients_of_fp16_weights(size, right, lift):
    """R of the unscaled gradients that a GradScaler brings in fp32 is subnormal in fp16, or zero."""
    lists = bucket(1, 40, 67, 9, right, torch.float16, scale=1.0)
    lists["grads"] = [size * torch.randn(grad.shape, device=DEVICE) for grad in lists["grads"]]
    for name in NAMES[3:5]:
        lists[name][0].zero_()
    lists["weights"][0].zero_()
    check(*lifted(lists, right, lift, 0.0, eps=1e-30, lr=1e-3), STEP["step"])


@LIFTS
def test_found_inf_leaves_the_bits(lift):
    made, hyper = lifted(bucket(2, 40, 67, 9, False), False, lift, 0.3, found_inf=torch.ones(1, device=DEVICE))
    made.grads[0][0, 0] = float("inf")
    before = copy.deepcopy(made)
    run(made, hyper)
    for name in made.states:
        assert all(torch.equal(a, b) for a, b in zip(made.states[name], before.states[name], strict=True)), name
    assert all(torch.equal(a, b) for a, b in zip(made.weights, before.weights, strict=True))


@LIFTS
def test_a_zero_gradient_only_decays(lift):
    lists = bucket(1, 20, 67, 5, False)
    for name in ("grads", *NAMES[3:5]):
        lists[name][0].zero_()
    made, hyper = lifted(lists, False, lift, 0.3)
    expected = made.weights[0] * (1 - STEP["lr"] * STEP["weight_decay"])
    run(made, hyper)
    assert torch.equal(made.weights[0], expected)


@LIFTS
def test_parts_give_the_same_bits(lift, monkeypatch):
    made, hyper = lifted(bucket(5, 40, 67, 9, True, torch.bfloat16), True, lift, 0.3)
    parts = copy.deepcopy(made)
    run(made, hyper)
    monkeypatch.setattr(table, "TEMPORARY_BYTES", 2 * 2 * 2 * 9 * 67)
    monkeypatch.setattr(table, "MAX_MATRICES", 2)
    run(parts, hyper)
    assert all(torch.equal(a, b) for a, b in zip(made.weights, parts.weights, strict=True))


def test_the_limiter_alone():
    """By hand: two columns with ratios of 2 and 0."""
    sums = torch.tensor([[[[4.0, 9.0], [1.0, 0.0], [0.0, 0.0]]]], device=DEVICE)
    squares = torch.tensor([[9.0, 2.0]], device=DEVICE)
    for last, factor, kept in ((0.0, 1.0, 6.0), (10.0, 1.0, 6.0), (3.0, 3.03 / 6, 3.03)):
        norm = torch.tensor(last, device=DEVICE)
        at = torch.tensor([norm.data_ptr()], device=DEVICE)
        factors = limiter.launch(sums, squares, at, None, whole=False)
        assert_within(factors, torch.tensor([[2 * factor, 0.0]], device=DEVICE), torch.full((1, 2), 1e-6), "f·s")
        assert abs(float(norm) - kept) < 1e-5


@LIFTS
def test_a_bucket_of_r_alone_is_refused(lift):
    lists = bucket(1, 20, 30, 5, False)
    del lists["grads"]
    lists["projected"] = [torch.zeros(5, 30, device=DEVICE)]
    made, hyper = lifted(lists, False, lift, 0.0)
    with pytest.raises(ValueError, match=f"the lift '{lift.name}' moves the weights by their gradients"):
        backends.step(made, hyper)
