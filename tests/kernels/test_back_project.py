import pytest
import torch
from buckets import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    OVER,
    SHAPES,
    bits,
    frames_intact,
    matrices,
    orient,
    rows_of_this_machine,
    same_bits,
    stored,
    tf32_unit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from launchers import back_project_
from tolerances import UNIT, assert_within, back_project_error, rounded_between, store_unit

from benchmarks import formulas
from lowrank_kernels import philox
from lowrank_kernels.backends.triton import builtin, choose
from lowrank_kernels.backends.triton.dots import INTERPRETED

pytestmark = pytest.mark.gpu
SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
UPDATE = {"lr": 0.1, "scale": 0.5, "weight_decay": 0.2}


def normalised_of(count, r, n, dtype=torch.float32):
    return torch.randn(count, r, n, device=DEVICE).to(dtype)


def check(weights, bases, normalised, right, **update):
    """Against the reference in fp64 on the very inputs."""
    before = [weight.double() for weight in weights]
    back_project_(weights, bases, normalised, right=right, **update)
    dtype = bases[0].dtype
    rounds_n = dtype != torch.float32 and normalised.dtype != dtype
    tf32 = tf32_unit(dtype)
    for weight, expected, basis, norm in zip(weights, before, bases, normalised, strict=True):
        w = orient(expected, right).to(weight.dtype)
        bound = back_project_error(
            w, basis, norm, **update, store=store_unit(weight.dtype, INTERPRETED),
            operand_unit=(2 * UNIT[dtype] if rounds_n else 0.0) + tf32, basis_unit=tf32,
        )  # fmt: skip
        formulas.back_project_(expected, basis.double(), norm.double(), right=right, **update)
        assert_within(orient(weight, right), orient(expected, right), bound, "W")


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_back_project(shape, dtype, right):
    m, n, r = shape
    weights = stored(2, m, n, right, dtype)
    check(weights, matrices(2, m, r, dtype), normalised_of(2, r, n), right, **UPDATE)
    assert frames_intact(weights)


@SIDES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("basis_layout", LAYOUTS)
def test_layouts(layout, basis_layout, right):
    weights = stored(3, 67, 70, right, torch.float32, layout)
    check(weights, matrices(3, 67, 35, torch.float32, basis_layout), normalised_of(3, 35, 70), right, **UPDATE)
    assert frames_intact(weights)


@SIDES
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("basis_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalised_dtype", DTYPES, ids=str)
def test_dtypes_are_independent(weight_dtype, basis_dtype, normalised_dtype, right):
    normalised = normalised_of(1, 17, 66, normalised_dtype)
    check(stored(1, 40, 66, right, weight_dtype), matrices(1, 40, 17, basis_dtype), normalised, right, **UPDATE)


@SIDES
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scales(scale, dtype, right):
    check(stored(1, 70, 40, right, dtype, scale=scale), matrices(1, 70, 17, dtype), normalised_of(1, 17, 40), right, **UPDATE)


def test_aligned_bucket_of_many():
    weights = [torch.randn(48, 80, device=DEVICE) for _ in range(9)]
    bases = [torch.randn(48, 32, device=DEVICE) for _ in range(9)]
    normalised = normalised_of(9, 32, 80)
    check([weight.T.contiguous() for weight in weights], bases, normalised, True, **UPDATE)
    check(weights, bases, normalised, False, **UPDATE)


@SIDES
def test_rank_1024(right):
    check(stored(1, 37, 10, right, torch.bfloat16), matrices(1, 37, 1024, torch.bfloat16), normalised_of(1, 1024, 10), right, **UPDATE)


@settings(max_examples=25, deadline=None)
@given(lr=st.floats(0, 1), scale=st.floats(-2, 2), weight_decay=st.floats(0, 1), right=st.booleans())
def test_any_coefficients(lr, scale, weight_decay, right):
    check(
        stored(1, 9, 13, right, torch.float32), matrices(1, 9, 4, torch.float32), normalised_of(1, 4, 13), right,
        lr=lr, scale=scale, weight_decay=weight_decay,
    )  # fmt: skip


@SIDES
def test_zero_update_only_decays(right):
    """The dot is exactly 0, so W' is one product, rounded once; without decay not a bit moves."""
    weights, bases, zeros = stored(2, 70, 66, right, torch.float32), matrices(2, 70, 9, torch.float32), torch.zeros(2, 9, 66, device=DEVICE)
    kept = bits(weights)
    back_project_(weights, bases, zeros, lr=0.1, scale=0.25, weight_decay=0.0, right=right)
    assert same_bits(bits(weights), kept)
    expected = [weight * (1 - 0.1 * 0.5) for weight in weights]
    back_project_(weights, bases, zeros, lr=0.1, scale=0.25, weight_decay=0.5, right=right)
    assert same_bits(bits(weights), bits(expected))


def test_decay_comes_before_the_update():
    """With W = 0 the decay has nothing to act on: the update is not decayed."""
    weights, bases = [torch.zeros(6, 5, device=DEVICE)], [torch.eye(6, device=DEVICE)]
    normalised = normalised_of(1, 6, 5)
    back_project_(weights, bases, normalised, lr=0.5, scale=0.5, weight_decay=1.0, right=False)
    assert_within(weights[0], -0.25 * normalised[0], tf32_unit(torch.float32) * normalised[0].abs() + 1e-30, "W")


@SIDES
@pytest.mark.parametrize(("kind", "row", "wide"), rows_of_this_machine(builtin.BACK_PROJECT), ids=str)
def test_every_row(kind, row, wide, right, monkeypatch):
    monkeypatch.setattr(choose, "back_project", lambda *args: row)
    dtype = torch.bfloat16 if kind == "16bit" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        over = OVER[wide]
        m, n, r = row.BLOCK_M + over[0], row.BLOCK_N + over[1], 2 * row.BLOCK_K + over[2]
        weights = stored(1, m, n, right, dtype, pad=over[0])
        check(weights, matrices(1, m, r, dtype, pad=over[0]), normalised_of(1, r, n), right, **UPDATE)
        assert frames_intact(weights)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_found_inf_leaves_the_bits(dtype):
    weights = stored(2, 70, 66, False, dtype)
    weights[0][0, 0] = float("nan")
    kept = bits(weights)
    normalised = torch.full((2, 9, 66), float("inf"), device=DEVICE)
    back_project_(weights, matrices(2, 70, 9, dtype), normalised, right=False, **UPDATE, found_inf=torch.ones((), device=DEVICE))
    assert same_bits(bits(weights), kept)


def test_found_inf_of_zero_changes_nothing():
    weights, bases, normalised = stored(1, 70, 66, False, torch.float32), matrices(1, 70, 9, torch.float32), normalised_of(1, 9, 66)
    copies = [weight.clone() for weight in weights]
    back_project_(weights, bases, normalised, right=False, **UPDATE)
    back_project_(copies, bases, normalised, right=False, **UPDATE, found_inf=torch.zeros(1, device=DEVICE))
    assert same_bits(bits(weights), bits(copies))


@SIDES
def test_learning_rate_on_the_device(right):
    """lr is the fp32 there, and the argument is not looked at."""
    weights, bases, normalised = stored(2, 70, 66, right, torch.float32), matrices(2, 70, 9, torch.float32), normalised_of(2, 9, 66)
    before = [weight.double() for weight in weights]
    device_lr = torch.tensor(UPDATE["lr"], device=DEVICE)
    back_project_(weights, bases, normalised, right=right, **{**UPDATE, "lr": float("nan")}, device_lr=device_lr)
    tf32 = tf32_unit(torch.float32)
    update = {**UPDATE, "lr": float(device_lr)}
    for weight, expected, basis, norm in zip(weights, before, bases, normalised, strict=True):
        w = orient(expected, right).float()
        bound = back_project_error(
            w, basis, norm, **update, store=UNIT[torch.float32], operand_unit=tf32, basis_unit=tf32, device_lr=True
        )  # fmt: skip
        formulas.back_project_(expected, basis.double(), norm.double(), right=right, **update)
        assert_within(orient(weight, right), orient(expected, right), bound, "W")
    assert frames_intact(weights)


def check_drawn(weights, bases, normalised, right, seeds, step, counts=None, sharp=0.9, **update):
    """Rounded stochastically, with the reference's draws: what differs lies within the fp32 error of a
    threshold."""
    before = [weight.double() for weight in weights]
    back_project_(weights, bases, normalised, right=right, device_steps=counts, step=step, **update, rounding_seeds=seeds)
    tf32 = tf32_unit(bases[0].dtype)
    for index, (weight, w, basis, norm) in enumerate(zip(weights, before, bases, normalised, strict=True)):
        rounds_n = bases[0].dtype != torch.float32 and normalised.dtype != bases[0].dtype
        error = back_project_error(
            orient(w, right), basis, norm, **update, store=0.0,
            operand_unit=(2 * UNIT[bases[0].dtype] if rounds_n else 0.0) + tf32, basis_unit=tf32,
        )  # fmt: skip
        arguments = {name: update[name] for name in ("lr", "scale", "weight_decay")}
        exact = formulas.updated_weight(w, basis.double(), norm.double(), **arguments, right=right)
        t = int(counts[index]) + 1 if counts else step
        least, greatest = rounded_between(exact, orient(error, right), seeds[index : index + 1], t)
        assert ((least <= weight) & (weight <= greatest)).all()
        assert (least == greatest).float().mean() >= sharp  # the interval leaves a choice to few
    assert frames_intact(weights)


@SIDES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stochastic_rounding(shape, right):
    m, n, r = shape
    seeds = philox.seed_tensor([philox.derive_seed(7, index) for index in range(2)], DEVICE)
    bases, normalised = matrices(2, m, r, torch.bfloat16), normalised_of(2, r, n, torch.bfloat16)
    check_drawn(stored(2, m, n, right, torch.bfloat16), bases, normalised, right, seeds, 3, **UPDATE)


@SIDES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stochastic_rounding_of_any_layout(layout, right):
    """The draws belong to elements, not to places in memory. fp32 bases, for a change; tf32 widens the
    intervals."""
    seeds = philox.seed_tensor([11, 12, 13], DEVICE)
    weights = stored(3, 67, 70, right, torch.bfloat16, layout)
    normalised = normalised_of(3, 35, 70)
    sharp = 0.9 if INTERPRETED else 0.0
    check_drawn(weights, matrices(3, 67, 35, torch.float32), normalised, right, seeds, 1, sharp=sharp, **UPDATE)


@SIDES
def test_stochastic_rounding_with_steps_counted_on_the_device(right):
    """Each matrix draws with its own count."""
    seeds = philox.seed_tensor([5, 5], DEVICE)
    counts = [torch.full((), float(count), device=DEVICE) for count in (0, 41)]
    bases, normalised = matrices(2, 70, 9, torch.bfloat16), normalised_of(2, 9, 66, torch.bfloat16)
    check_drawn(stored(2, 70, 66, right, torch.bfloat16), bases, normalised, right, seeds, None, counts, **UPDATE)


@SIDES
def test_stochastic_rounding_keeps_what_bf16_holds(right):
    weights, bases = stored(2, 70, 66, right, torch.bfloat16), matrices(2, 70, 9, torch.bfloat16)
    kept = bits(weights)
    zeros, seeds = torch.zeros(2, 9, 66, device=DEVICE), philox.seed_tensor([1, 2], DEVICE)
    back_project_(weights, bases, zeros, right=right, lr=0.1, scale=0.25, weight_decay=0.0, rounding_seeds=seeds, step=1)
    assert same_bits(bits(weights), kept)


@SIDES
@pytest.mark.parametrize(("kind", "row", "wide"), rows_of_this_machine(builtin.BACK_PROJECT), ids=str)
def test_stochastic_rounding_of_every_row(kind, row, wide, right, monkeypatch):
    monkeypatch.setattr(choose, "back_project", lambda *args: row)
    dtype = torch.bfloat16 if kind == "16bit" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        over = OVER[wide]
        m, n, r = row.BLOCK_M + over[0], row.BLOCK_N + over[1], row.BLOCK_K + over[2]
        seeds = philox.seed_tensor([9], DEVICE)
        sharp = 0.9 if INTERPRETED or kind != "tf32" else 0.0
        weights, bases = stored(1, m, n, right, torch.bfloat16, pad=over[0]), matrices(1, m, r, dtype, pad=over[0])
        check_drawn(weights, bases, normalised_of(1, r, n, dtype), right, seeds, 2, sharp=sharp, **UPDATE)
    finally:
        torch.set_float32_matmul_precision(before)


def test_stochastic_rounding_and_found_inf():
    weights = stored(2, 70, 66, False, torch.bfloat16)
    kept = bits(weights)
    normalised, seeds = torch.full((2, 9, 66), float("inf"), device=DEVICE), philox.seed_tensor([1, 2], DEVICE)
    found_inf = torch.ones((), device=DEVICE)
    bases = matrices(2, 70, 9, torch.bfloat16)
    back_project_(weights, bases, normalised, right=False, **UPDATE, found_inf=found_inf, rounding_seeds=seeds, step=1)
    assert same_bits(bits(weights), kept)
