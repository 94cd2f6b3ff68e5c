"""The three launches chained, with every option of a step; what each launch does alone is tested beside
it."""

import gc
import weakref

import pytest
import torch
from buckets import DEVICE, DTYPES, stored
from matrix import pairwise
from steps import NAMES, STEP, bucket, copy, prepare, same
from steps import check as check_step
from steps import run as run_step

from lowrank_kernels import philox
from lowrank_kernels.backends.triton import table, two_pass
from lowrank_kernels.backends.triton.back_project import back_project_
from lowrank_kernels.backends.triton.moments import update_moments_
from lowrank_kernels.backends.triton.project import project

pytestmark = pytest.mark.gpu
SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])


def run(lists, right, **step):
    run_step(two_pass, lists, right, **step)


def check(lists, right, device_lr=None, rounding_seeds=None):
    check_step(two_pass, lists, right, device_lr, rounding_seeds)


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
def test_equals_its_three_launches_bit_for_bit(dtype, right):
    """Whether N is rounded to the bases' dtype when it is stored or when it is multiplied is the same."""
    lists = bucket(2, 70, 67, 33, right, dtype)
    apart = copy(lists)
    run(lists, right)
    adam = {name: STEP[name] for name in ("beta1", "beta2", "eps", "step")}
    normalised = update_moments_(apart["exp_avgs"], apart["exp_avg_sqs"], project(apart["bases"], apart["grads"], right), **adam)
    update = {name: STEP[name] for name in ("lr", "scale", "weight_decay")}
    back_project_(apart["weights"], apart["bases"], normalised, **update, right=right)
    assert same(lists, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_give_the_same_bits(dtype, monkeypatch):
    """A large bucket goes through in parts, each with its own rows of every list, and its own seeds."""
    whole = bucket(5, 70, 67, 9, True, dtype, coded=True)
    whole["steps"] = [torch.full((), float(t), device=DEVICE) for t in range(5)]
    parts = copy(whole)
    seeds = philox.seed_tensor(range(5), DEVICE) if dtype == torch.bfloat16 else None
    run(whole, True, rounding_seeds=seeds)
    each = 9 * 67 * (4 if dtype == torch.float32 else 6)
    monkeypatch.setattr(two_pass, "TEMPORARY_BYTES", 2 * each + 5)
    monkeypatch.setattr(two_pass, "CACHED_BYTES", 0)
    allocated = recorded_bytes(monkeypatch)
    run(parts, True, rounding_seeds=seeds)
    assert sum(allocated) == 2 * each
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


@pytest.mark.parametrize("cached", [0, two_pass.CACHED_BYTES], ids=["past the cache", "in the cache"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_temporaries_are_at_most_4_bytes_an_element_of_r(count, dtype, cached, monkeypatch):
    """And N is multiplied as it is wherever it stood in between."""
    monkeypatch.setattr(two_pass, "CACHED_BYTES", cached)
    lists = bucket(count, 40, 67, 9, False, dtype)
    others = copy(lists)
    allocated = recorded_bytes(monkeypatch)
    run(lists, False)
    assert 0 < sum(allocated) <= 4 * 9 * 67 * count
    monkeypatch.setattr(two_pass, "CACHED_BYTES", two_pass.CACHED_BYTES if not cached else 0)
    run(others, False)
    assert same(lists, others)


def test_a_refilled_table_reaches_every_part(monkeypatch):
    """Rows are kept, not copied: the next step follows tensors that moved."""
    monkeypatch.setattr(two_pass, "TEMPORARY_BYTES", 1)
    lists, moved = bucket(3, 20, 67, 9, False), bucket(3, 20, 67, 9, False)
    expected = copy(moved)
    rows = table.Rows(**dict(zip(lists, table.pointer_table(*lists.values()), strict=True)))
    launch = two_pass.prepare(rows, *(lists[name][0] for name in NAMES[:4]), count=3, right=False, aligned=False, stochastic=False)
    kept = copy(lists)
    for name, tensors in moved.items():
        getattr(rows, name).copy_(torch.tensor([tensor.data_ptr() for tensor in tensors]))
    launch(**STEP, found_inf=None, device_lr=None, rounding_seeds=None)
    run(expected, False)
    assert same(moved, expected) and same(lists, kept)


@pytest.mark.parametrize(
    ("count", "bytes_each", "most", "at_once"),
    [
        (1, 2**40, 1, 1),
        (7, 2**28, 7, 1),
        (7, 2**26, 7, 4),
        (9, 2**26, 6, 3),
        (4, 2**26, 4, 4),
        (4, 2**26, 2, 2),
        (3, 0, 3, 3),
        (3, 0, 2, 2),
    ],
)
def test_parts_are_even(count, bytes_each, most, at_once):
    assert two_pass.matrices_at_once(count, bytes_each, most) == at_once


def test_what_is_kept_holds_no_tensor():
    lists = bucket(1, 8, 70, 3, False, coded=True)
    launch = prepare(two_pass, lists, False)
    references = [weakref.ref(tensor) for name in NAMES[:4] for tensor in lists[name]]
    del lists
    gc.collect()
    assert launch is not None and not any(reference() is not None for reference in references)


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
