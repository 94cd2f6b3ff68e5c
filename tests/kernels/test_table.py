"""Pointer tables, written anew at each step."""

import functools

import pytest
import torch
from buckets import DEVICE, bits, same_bits

from benchmarks import formulas
from lowrank_kernels.backends import upload
from lowrank_kernels.backends.triton import adamw_step, table

ADAM = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, scale=0.5, right=False)
step = functools.partial(formulas.adamw_step_, run=adamw_step.step, **ADAM)


def matrices(count, rows=16, columns=32, **options):
    return [torch.randn(rows, columns, device=DEVICE, **options) for _ in range(count)]


def bucket(count=3, m=16, n=32, r=4):
    bases = [torch.linalg.qr(torch.randn(m, r))[0].contiguous().to(DEVICE) for _ in range(count)]
    states = [[torch.rand(r, n, device=DEVICE) for _ in range(count)] for _ in range(2)]
    return [matrices(count, m, n), matrices(count, m, n), bases, *states]


def addresses(tensors):
    return [tensor.data_ptr() for tensor in tensors]


def rows_of(lists, steps):
    return table.rows_of(formulas.bucket_of(*lists, **ADAM, device_steps=steps)[0])


def test_rows_are_the_addresses():
    lists, steps = bucket(), [torch.zeros((), device=DEVICE) for _ in range(3)]
    rows = rows_of(lists, steps)
    found = (rows.weights, rows.grads, rows.bases, rows.exp_avgs, rows.exp_avg_sqs, rows.steps)
    assert [row.tolist() for row in found] == list(map(addresses, (*lists, steps)))
    assert rows.aligned and rows.projected is None and rows.exp_avg_scales is None and rows.exp_avg_sq_scales is None


@pytest.mark.parametrize("crooked", range(5))
def test_one_address_that_is_no_multiple_of_16_is_seen(crooked):
    lists = bucket()
    shape = lists[crooked][1].shape
    lists[crooked][1] = torch.randn(shape.numel() + 1, device=DEVICE)[1:].view(shape)
    assert not rows_of(lists, [torch.zeros((), device=DEVICE) for _ in range(3)]).aligned


def test_a_count_need_not_be_aligned():
    assert rows_of(bucket(), [torch.zeros(2, device=DEVICE)[1] for _ in range(3)]).aligned


@pytest.mark.gpu
def test_a_bucket_larger_than_a_grid_goes_in_parts(monkeypatch):
    whole, parts = bucket(5), None
    parts = [[tensor.clone() for tensor in tensors] for tensors in whole]
    step(*whole)
    monkeypatch.setattr(table, "MAX_MATRICES", 2)
    step(*parts)
    assert all(same_bits(bits(a), bits(b)) for a, b in zip(whole, parts, strict=True))


def test_a_default_device_does_not_leak_in():
    tensors = bucket()
    with torch.device("meta"):
        step(*tensors, device_steps=[torch.zeros((), device=DEVICE) for _ in range(3)])
    assert all(tensor.device.type == torch.device(DEVICE).type for tensor in tensors[0])


def test_captured_copies_have_a_source_of_their_own():
    """A graph reads its source at every replay: no two captures share memory, and none is handed out
    again."""
    reserve = upload._Reserve()
    with pytest.raises(RuntimeError, match="take one step outside of the graph first"):
        reserve.take(torch.tensor([[1, 2], [3, 4]]))
    reserve._free = torch.zeros(10, dtype=torch.int64)
    first, second = reserve.take(torch.tensor([[1, 2], [3, 4]])), reserve.take(torch.tensor([5, 6, 7]))
    assert first.tolist() == [[1, 2], [3, 4]] and second.tolist() == [5, 6, 7]
    with pytest.raises(RuntimeError, match="no pinned memory is left"):
        reserve.take(torch.tensor([1, 2, 3, 4]))
