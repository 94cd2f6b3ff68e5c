import pytest
import torch
from buckets import DEVICE, DTYPES, LAYOUTS, SHAPES, bits, frames_intact, matrices, orient, same_bits, stored, tf32_unit
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import UNIT, assert_within, back_project_error, store_unit

from lowrank_kernels import reference
from lowrank_kernels.kernels import configs
from lowrank_kernels.kernels.back_project import back_project_
from lowrank_kernels.kernels.dots import INTERPRETED

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
        reference.back_project_(expected, basis.double(), norm.double(), right=right, **update)
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


def rows_of_this_machine():
    archs = list(configs.BACK_PROJECT) if INTERPRETED else [configs.architecture(torch.device("cuda")), None]
    rows = {(kind, row) for arch in archs for kind, rows in configs.BACK_PROJECT.get(arch, {}).items() for row in rows}
    return sorted(rows, key=str)


@SIDES
@pytest.mark.parametrize(("kind", "row"), rows_of_this_machine(), ids=str)
def test_every_row(kind, row, right, monkeypatch):
    monkeypatch.setattr(configs, "back_project_config", lambda *args: row)
    dtype = torch.bfloat16 if kind == "16bit" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        m, n, r = row.BLOCK_M + 3, row.BLOCK_N + 5, 2 * row.BLOCK_K + 7
        weights = stored(1, m, n, right, dtype)
        check(weights, matrices(1, m, r, dtype), normalised_of(1, r, n), right, **UPDATE)
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


def test_errors_help():
    weights, bases = [torch.zeros(4, 6, device=DEVICE)], [torch.zeros(4, 2, device=DEVICE)]
    with pytest.raises(ValueError, match=r"normalised must be row-major of shape \(1, 2, 6\), got \(1, 2, 5\)"):
        back_project_(weights, bases, normalised_of(1, 2, 5), right=False, **UPDATE)
    with pytest.raises(ValueError, match=r"must fit a right weight \(n, m\), got \(4, 2\) and \(4, 6\)"):
        back_project_(weights, bases, normalised_of(1, 2, 6), right=True, **UPDATE)
    with pytest.raises(ValueError, match="equally many"):
        back_project_(weights * 2, bases, normalised_of(1, 2, 6), right=False, **UPDATE)
