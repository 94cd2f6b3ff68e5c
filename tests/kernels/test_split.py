"""The two launches of a split step, with every option of a step."""

import pytest
import torch
from buckets import DEVICE, DTYPES, OVER, rows_of_this_machine, stored
from launchers import back_project_, project, update_moments_
from matrix import pairwise
from steps import STEP, bucket, copy, same
from steps import check as check_step
from steps import run as run_step

from lowrank_kernels import philox
from lowrank_kernels.backends.bucket import Bucket
from lowrank_kernels.backends.triton import builtin, choose, split, table

pytestmark = pytest.mark.gpu
SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])


def run(lists, right, **step):
    run_step(split, lists, right, **step)


def check(lists, right, device_lr=None, rounding_seeds=None):
    check_step(split, lists, right, device_lr, rounding_seeds)


@pytest.mark.parametrize(("coded", "on_device", "dtype", "right"), pairwise([False, True], [False, True], DTYPES, [False, True]), ids=str)
def test_against_the_reference(coded, on_device, dtype, right, poisoned_empty):
    lists, device_lr = bucket(3, 70, 130, 9, right, dtype, coded), None
    if on_device:
        lists["steps"], device_lr = [torch.full((), float(t), device=DEVICE) for t in (0, 3, 1000)], torch.tensor(0.1, device=DEVICE)
    seeds = philox.seed_tensor([1, 2, 3], DEVICE) if dtype == torch.bfloat16 else None
    check(lists, right, device_lr, seeds)
    if on_device:
        assert [int(count) for count in lists["steps"]] == [0, 3, 1000]


@SIDES
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 70, 1), (70, 1, 1), (5, 200, 5), (70, 65, 33)], ids=str)
def test_eight_bit_shapes(shape, right, poisoned_empty):
    m, n, r = shape
    check(bucket(2, m, n, r, right, torch.float32, coded=True), right)


@SIDES
def test_stochastic_weights_of_fp32_bases(right):
    """The error in fp32 is so small here that nearly every draw is checked, not only its neighbourhood."""
    lists = bucket(2, 70, 66, 9, right)
    lists["weights"] = stored(2, 70, 66, right, torch.bfloat16)
    check(lists, right, rounding_seeds=philox.seed_tensor([3, 4], DEVICE))


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_three_launches_bit_for_bit(dtype, right):
    """R is the same on the chip and in memory. Rows that sum R in the same tiles sum it in the same
    order."""
    lists = bucket(2, 70, 67, 33, right, dtype)
    apart = copy(lists)
    run(lists, right)
    adam = {name: STEP[name] for name in ("beta1", "beta2", "eps", "step")}
    projected = project(apart["bases"], apart["grads"], right)
    normalised = torch.empty_like(projected, dtype=dtype)
    update_moments_(apart["exp_avgs"], apart["exp_avg_sqs"], projected=projected, out=normalised, **adam)
    update = {name: STEP[name] for name in ("lr", "scale", "weight_decay")}
    back_project_(apart["weights"], apart["bases"], normalised, **update, right=right)
    assert same(lists, apart)


@SIDES
@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8-bit"])
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_r_from_memory(source, coded, right):
    lists = bucket(2, 70, 130, 9, right, torch.bfloat16, coded)
    del lists["grads"]
    lists["projected"] = [torch.randn(9, 130, device=DEVICE).to(source) for _ in range(2)]
    check(lists, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_give_the_same_bits(dtype, monkeypatch):
    """A large bucket goes through in parts, each with its own rows of every list, and its own seeds."""
    whole = bucket(5, 70, 67, 9, True, dtype, coded=True)
    whole["steps"] = [torch.full((), float(t), device=DEVICE) for t in range(5)]
    parts = copy(whole)
    seeds = philox.seed_tensor(range(5), DEVICE) if dtype == torch.bfloat16 else None
    run(whole, True, rounding_seeds=seeds)
    each = 9 * 67 * dtype.itemsize
    monkeypatch.setattr(table, "TEMPORARY_BYTES", 2 * each + 5)
    allocated = recorded_bytes(monkeypatch)
    run(parts, True, rounding_seeds=seeds)
    assert allocated == [2 * each, 2 * each, each]
    assert same(whole, parts)


def recorded_bytes(monkeypatch):
    """What torch.empty allocates on the device from here on."""
    allocated, empty = [], torch.empty

    def recorded(*arguments, **options):
        tensor = empty(*arguments, **options)
        if tensor.device.type == DEVICE:
            allocated.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", recorded)
    return allocated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_the_only_temporary_is_n(count, dtype, monkeypatch):
    lists = bucket(count, 40, 67, 9, False, dtype)
    allocated = recorded_bytes(monkeypatch)
    run(lists, False)
    assert sum(allocated) == dtype.itemsize * 9 * 67 * count


@pytest.mark.parametrize(
    ("bytes_each", "sizes"),
    [(2**40, [1]), (2**28, [1] * 3), (2**26, [4, 3]), (2**26, [3] * 3), (2**26, [4]), (0, [3])],
)
def test_parts_are_even(bytes_each, sizes):
    matrices = [torch.empty(1, 1)] * sum(sizes)
    made = Bucket(matrices, matrices, {}, matrices, False, grads=matrices)
    assert [len(part) for part in table.launchable(made, bytes_each)] == sizes


@pytest.mark.parametrize(
    ("kind", "row", "wide", "right"),
    [
        pytest.param(*row, right, marks=() if number % 2 == right else pytest.mark.slow, id=f"{number}-{'right' if right else 'left'}")
        for number, row in enumerate(rows_of_this_machine(builtin.PROJECT_MOMENTS))
        for right in (False, True)
    ],
)
@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8-bit"])
def test_every_row(kind, row, wide, right, coded, monkeypatch):
    """Over the edge of every tile."""
    monkeypatch.setattr(choose, "project_moments", lambda *args: row)
    dtype = torch.bfloat16 if kind == "16bit" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        over = OVER[wide]
        m, n, r = 2 * row.BLOCK_K + over[0], row.BLOCK_N + over[1], row.BLOCK_R + over[2]
        check(bucket(1, m, n, r, right, dtype, coded, pad=over[0]), right)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # R is NaN, as it may be
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8-bit"])
def test_found_inf_leaves_the_bits(coded, dtype):
    lists = bucket(2, 70, 67, 33, False, dtype, coded)
    lists["grads"][0][0, 0] = float("inf")
    kept = copy(lists)
    seeds = philox.seed_tensor([1, 2], DEVICE) if dtype == torch.bfloat16 else None
    run(lists, False, found_inf=torch.ones(1, device=DEVICE), rounding_seeds=seeds)
    assert same(lists, kept)


@SIDES
@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8-bit"])
def test_found_inf_of_zero_changes_nothing(coded, right):
    lists = bucket(2, 70, 67, 9, right, torch.bfloat16, coded)
    others = copy(lists)
    run(lists, right)
    run(others, right, found_inf=torch.zeros((), device=DEVICE))
    assert same(lists, others)


def test_inputs_stay():
    lists = bucket(2, 70, 67, 9, False, torch.bfloat16, coded=True)
    kept = copy({name: lists[name] for name in ("grads", "bases")})
    run(lists, False)
    assert same(kept, lists)


@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8-bit"])
def test_a_matrix_gives_the_same_bits_alone(coded):
    together = bucket(3, 70, 67, 9, True, torch.bfloat16, coded)
    alone = copy(together)
    seeds = philox.seed_tensor([1, 2, 3], DEVICE)
    run(together, True, rounding_seeds=seeds)
    for index in range(3):
        run({name: [tensors[index]] for name, tensors in alone.items()}, True, rounding_seeds=seeds[index : index + 1].clone())
    assert same(together, alone)
