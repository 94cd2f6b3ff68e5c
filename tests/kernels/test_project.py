import pytest
import torch
from buckets import DEVICE, DTYPES, LAYOUTS, OVER, SHAPES, matrices, orient, rows_of_this_machine, stored, tf32_unit
from hypothesis import given, settings
from hypothesis import strategies as st
from launchers import project
from tolerances import assert_within, project_error

from lowrank_kernels.backends import reference
from lowrank_kernels.backends.triton import builtin, choose

pytestmark = pytest.mark.gpu
SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])


def check(bases, grads, right):
    """Against the reference in fp64 on the very inputs."""
    projected = project(bases, grads, right)
    m, r = bases[0].shape
    assert projected.shape == (len(bases), r, orient(grads[0], right).shape[1]) and projected.dtype == torch.float32
    both_16_bit = bases[0].dtype == grads[0].dtype and bases[0].element_size() == 2
    for basis, grad, result in zip(bases, grads, projected, strict=True):
        expected = reference.project(basis.double(), grad.double(), right)
        bound = project_error(basis, orient(grad, right), 0.0 if both_16_bit else tf32_unit(torch.float32))
        assert_within(result, expected, bound, "R")


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project(shape, dtype, right, poisoned_empty):
    m, n, r = shape
    check(matrices(2, m, r, dtype), stored(2, m, n, right, dtype), right)


@SIDES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("basis_layout", LAYOUTS)
def test_layouts(layout, basis_layout, right, poisoned_empty):
    check(matrices(3, 67, 35, torch.float32, basis_layout), stored(3, 67, 70, right, torch.float32, layout), right)


@SIDES
@pytest.mark.parametrize("basis_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_dtypes_are_independent(basis_dtype, grad_dtype, right, poisoned_empty):
    check(matrices(1, 40, 17, basis_dtype), stored(1, 40, 66, right, grad_dtype), right)


@SIDES
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scales(scale, dtype, right, poisoned_empty):
    check(matrices(1, 70, 17, dtype), stored(1, 70, 40, right, dtype, scale=scale), right)


def test_aligned_bucket_of_many(poisoned_empty):
    bases = [torch.randn(48, 32, device=DEVICE) for _ in range(9)]
    grads = [torch.randn(48, 80, device=DEVICE) for _ in range(9)]
    check(bases, grads, False)
    check(bases, [grad.T.contiguous() for grad in grads], True)


@SIDES
def test_rank_1024(right, poisoned_empty):
    check(matrices(1, 37, 1024, torch.bfloat16), stored(1, 37, 10, right, torch.bfloat16), right)


@SIDES
def test_zero_gradient_gives_zero(right, poisoned_empty):
    grads = [torch.zeros((70, 33) if right else (33, 70), device=DEVICE)]
    assert not project(matrices(1, 33, 9, torch.float32), grads, right).any()


@SIDES
@pytest.mark.parametrize(("kind", "row", "wide"), rows_of_this_machine(builtin.PROJECT), ids=str)
def test_every_row(kind, row, wide, right, monkeypatch, poisoned_empty):
    monkeypatch.setattr(choose, "project", lambda *args: row)
    dtype = torch.bfloat16 if kind == "16bit" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        over = OVER[wide]
        m, n, r = 2 * row.BLOCK_K + over[0], row.BLOCK_N + over[1], row.BLOCK_R + over[2]
        check(matrices(1, m, r, dtype, pad=over[0]), stored(1, m, n, right, dtype, pad=over[0]), right)
    finally:
        torch.set_float32_matmul_precision(before)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 90), n=st.integers(1, 90), r=st.integers(1, 70), right=st.booleans(), layout=st.sampled_from(LAYOUTS))
def test_any_shape(m, n, r, right, layout):
    check(matrices(2, m, r, torch.float32), stored(2, m, n, right, torch.float32, layout), right)


def test_same_inputs_same_bits():
    bases, grads = matrices(2, 100, 20, torch.bfloat16), matrices(2, 100, 70, torch.bfloat16)
    assert torch.equal(project(bases, grads, False), project(bases, grads, False))


def test_sides_agree():
    bases, grads = matrices(2, 100, 20, torch.float32), matrices(2, 100, 70, torch.float32)
    transposed = [grad.T.contiguous() for grad in grads]
    left, right = project(bases, grads, False), project(bases, transposed, True)
    bound = 2 * torch.stack([project_error(basis, grad, tf32_unit(torch.float32)) for basis, grad in zip(bases, grads, strict=True)])
    assert_within(left, right, bound, "left against right")
