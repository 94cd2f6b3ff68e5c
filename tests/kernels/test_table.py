"""Pointer tables that are kept from one step to the next, and the launches that go with them."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from buckets import DEVICE, bits, same_bits

from lowrank_kernels.backends.triton import adamw_step, table

ADAM = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, scale=0.5, right=False)


def matrices(count, rows=16, columns=32, **options):
    return [torch.randn(rows, columns, device=DEVICE, **options) for _ in range(count)]


def bucket(count=3, m=16, n=32, r=4):
    bases = [torch.linalg.qr(torch.randn(m, r))[0].contiguous().to(DEVICE) for _ in range(count)]
    states = [[torch.rand(r, n, device=DEVICE) for _ in range(count)] for _ in range(2)]
    return [matrices(count, m, n), matrices(count, m, n), bases, *states]


def addresses(tensors):
    return [tensor.data_ptr() for tensor in tensors]


@pytest.fixture
def copies(monkeypatch):
    """The rows that went to the device."""
    made = []
    source = table._source
    monkeypatch.setattr(table, "_source", lambda rows, device: made.append(rows) or source(rows, device))
    return made


@pytest.fixture
def prepared(monkeypatch):
    """Each preparation of a bucket; none are left from before."""
    made = []
    init = adamw_step._Prepared.__init__
    monkeypatch.setattr(adamw_step._Prepared, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    adamw_step._kept.clear()
    return made


def test_only_rows_that_moved_are_copied_again(copies):
    first, second = matrices(3), matrices(3)
    kept = table.CachedTable([first, second])
    assert [row.tolist() for row in kept.rows] == [addresses(first), addresses(second)] and len(copies) == 1
    assert kept.new_objects([first, second]) == [] and kept.moved([first, second]) == {}
    moved = [second[0], matrices(1)[0], second[2]]
    rows = kept.rows
    assert kept.new_objects([first, moved]) == [1]
    kept.refill(kept.moved([first, moved]))
    assert copies[1:] == [addresses(moved)]
    assert kept.rows is rows and [row.tolist() for row in rows] == [addresses(first), addresses(moved)]
    assert kept.new_objects([first, moved]) == [1], "checked at every step from now on"


def test_memory_that_is_swapped_beneath_a_tensor_is_seen(copies):
    tensors = matrices(2)
    kept = table.CachedTable([tensors])
    tensors[1].data = torch.randn(16, 32, device=DEVICE)
    kept.refill(kept.moved([tensors]))
    assert kept.rows[0].tolist() == addresses(tensors)


def test_a_table_keeps_nothing_alive():
    tensors = matrices(2)
    kept = table.CachedTable([tensors])
    gone = weakref.ref(tensors[0])
    del tensors
    gc.collect()
    assert gone() is None
    again = matrices(2)
    assert kept.new_objects([again]) == [0], "even at the same addresses"


def test_alignment_follows():
    wide = torch.randn(3 * 64, device=DEVICE)
    straight, crooked = wide[:64].view(8, 8), wide[65:129].view(8, 8)
    kept = table.CachedTable([[straight], [straight]])
    assert kept.aligned == [True, True]
    kept.refill(kept.moved([[straight], [crooked]]))
    assert kept.aligned == [True, False]


def step(tensors, number=1, **options):
    adamw_step.adamw_step_(*tensors, **{**ADAM, "step": number} | options)


@pytest.mark.gpu
def test_a_steady_step_prepares_nothing(prepared, copies):
    tensors = bucket()
    for number in range(1, 4):
        step(tensors, number)
    assert len(prepared) == 1 and len(copies) == 1
    tensors[1] = matrices(3)
    step(tensors, 4, lr=0.2, found_inf=torch.zeros(1, device=DEVICE))
    step(tensors, 5)
    assert len(prepared) == 1 and copies[1:] == [addresses(tensors[1])]


@pytest.mark.gpu
def test_what_is_kept_gives_the_bits_of_what_is_prepared_anew(prepared):
    """Through every kind of change between two steps."""
    kept = bucket()
    anew = [[tensor.clone() for tensor in tensors] for tensors in kept]
    crooked = torch.randn(3 * 16 * 32 + 1, device=DEVICE)[1:].view(3, 16, 32)

    def grads_of(number):
        torch.manual_seed(number)
        if number == 3:
            return [grad.T for grad in matrices(3, 32, 16)]
        return list(crooked) if number == 4 else matrices(3)

    for number in range(1, 8):
        for tensors in (kept, anew):
            tensors[1] = grads_of(number)
            if number == 5:
                tensors[3] = [tensor.clone() for tensor in tensors[3]]
            if number == 6:
                tensors[0][1].data = tensors[0][1].data.clone()
            if tensors is anew:
                adamw_step._kept.clear()
            step(tensors, number)
    assert all(same_bits(bits(a), bits(b)) for a, b in zip(kept, anew, strict=True))


@pytest.mark.gpu
def test_new_tensors_are_checked_as_the_first_ones_were(prepared):
    tensors = bucket()
    step(tensors)
    before = [bits(part) for part in tensors]
    bad = matrices(3)
    bad[2] = matrices(1, 32, 16)[0].T
    with pytest.raises(ValueError, match=r"grads must share shape, strides.*\[2\] has \(16, 32\), \(1, 16\)"):
        step([tensors[0], bad, *tensors[2:]], 2)
    with pytest.raises(ValueError, match=r"weights \(16, 32\) and grads \(16, 31\) must share a shape"):
        step([tensors[0], matrices(3, 16, 31), *tensors[2:]], 2)
    assert all(same_bits(bits(a), b) for a, b in zip(tensors, before, strict=True))
    step(tensors, 2)


@pytest.mark.gpu
def test_buckets_that_are_no_more_are_let_go(monkeypatch):
    monkeypatch.setattr(adamw_step, "KEPT", 2)
    adamw_step._kept.clear()
    tensors = [bucket(1) for _ in range(4)]
    for each in tensors:
        step(each)
    assert len(adamw_step._kept) == 2
    gone = weakref.ref(tensors[3][0][0])
    del each, tensors
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device_lr": torch.ones(2)}, "device_lr must be one float32"),
        ({"device_lr": torch.ones(1, dtype=torch.float64)}, "device_lr must be one float32"),
        ({"device_steps": [torch.ones(1)]}, "equally many"),
        ({"device_steps": [torch.ones(1, dtype=torch.int64)] * 3}, "device_steps must be one float32"),
        ({"rounding_seeds": torch.ones(2, dtype=torch.int64)}, r"rounding_seeds must be \(3,\) int64"),
        ({"rounding_seeds": torch.ones(3, dtype=torch.int64)}, "rounding_seeds are for bfloat16 weights, got torch.float32"),
        ({"exp_avg_scales": [torch.ones(4, 1)] * 3, "exp_avg_sq_scales": [torch.ones(4, 1)] * 3}, "8-bit moments .* others without"),
        ({"found_inf": torch.ones(2)}, "found_inf must be one float32"),
        ({"step": 0}, "step counts from 1, got 0"),
    ],
    ids=str,
)
def test_errors_help(change, message):
    if DEVICE != "cpu":
        change = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        step(bucket(), **change)


def test_8_bit_errors_help():
    weights, grads, bases, exp_avgs, exp_avg_sqs = bucket()
    codes = [[tensor.to(torch.uint8) for tensor in part] for part in (exp_avgs, exp_avg_sqs)]
    scales = [[torch.ones(4, 1, device=DEVICE) for _ in range(3)] for _ in range(2)]
    named = dict(zip(("exp_avg_scales", "exp_avg_sq_scales"), scales, strict=True))
    with pytest.raises(ValueError, match="8-bit moments .* come with exp_avg_scales and exp_avg_sq_scales"):
        step([weights, grads, bases, *codes])
    with pytest.raises(ValueError, match="must share a dtype, got torch.uint8 and torch.float32"):
        step([weights, grads, bases, codes[0], exp_avg_sqs], **named)
    with pytest.raises(ValueError, match=r"exp_avg_scales \(4, 2\) must be \(r, ⌈n / 64⌉\) = \(4, 1\)"):
        step([weights, grads, bases, *codes], **named | {"exp_avg_scales": [torch.ones(4, 2, device=DEVICE)] * 3})


def test_lists_that_the_caller_vouches_for_are_not_looked_at_again(prepared, monkeypatch):
    tensors = bucket()
    step(tensors)
    checked = []
    check = adamw_step._check_buckets
    monkeypatch.setattr(adamw_step, "_check_buckets", lambda lists, device: checked.extend(lists) or check(lists, device))
    tensors[1], tensors[3] = matrices(3), [tensor.clone() for tensor in tensors[3]]
    step(tensors, 2, vouched=("weights", "grads"))
    assert checked == ["exp_avgs"] and len(prepared) == 1


def test_lists_of_unequal_length_are_refused_at_any_step(prepared):
    tensors = bucket()
    step(tensors)
    before = [bits(part) for part in tensors]
    for index in range(5):
        with pytest.raises(ValueError, match="equally many"):
            step([part[:1] if number == index else part for number, part in enumerate(tensors)], 2)
    assert all(same_bits(bits(a), b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.gpu
def test_memory_that_is_laid_out_anew_beneath_a_tensor_is_seen(prepared):
    """A basis by columns where one by rows was: the launch has other strides."""
    kept = bucket(1)
    step(kept)
    kept[2][0].data = kept[2][0].data.T.contiguous().T
    anew = [[tensor.clone(memory_format=torch.preserve_format) for tensor in part] for part in kept]
    step(kept, 2)
    adamw_step._kept.clear()
    step(anew, 2)
    assert len(prepared) == 3 and all(same_bits(bits(a), bits(b)) for a, b in zip(kept, anew, strict=True))
    kept[3][0].data = kept[3][0].data.T.contiguous().T
    with pytest.raises(ValueError, match="exp_avgs must be row-major"):
        step(kept, 3)
    pair = bucket(2)
    step(pair)
    pair[2][1].data = pair[2][1].data.T.contiguous().T
    with pytest.raises(ValueError, match="bases must share shape, strides"):
        step(pair, 2)


def test_a_default_device_does_not_leak_in(prepared):
    tensors = bucket()
    with torch.device("meta"):
        step(tensors)
    assert all(tensor.device.type == torch.device(DEVICE).type for tensor in tensors[0])


def test_many_threads_keep_their_own(monkeypatch):
    """More buckets than are kept, stepped side by side."""
    monkeypatch.setattr(adamw_step, "KEPT", 3)
    monkeypatch.setattr(adamw_step, "_Prepared", lambda *_: SimpleNamespace(launch=lambda **_: None, follow=lambda *_: True))
    problems = []

    def work():
        mine = [bucket(1) for _ in range(3)]
        try:
            for _ in range(200):
                for each in mine:
                    step(each)
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_captured_copies_have_a_source_of_their_own():
    """A graph reads its source at every replay: no two captures share memory, and none is handed out again."""
    reserve = table._Reserve()
    with pytest.raises(RuntimeError, match="take one step outside of the graph first"):
        reserve.take([[1, 2], [3, 4]])
    reserve._free = torch.zeros(10, dtype=torch.int64)
    first, second = reserve.take([[1, 2], [3, 4]]), reserve.take([5, 6, 7])
    assert first.tolist() == [[1, 2], [3, 4]] and second.tolist() == [5, 6, 7]
    with pytest.raises(RuntimeError, match="no pinned memory is left"):
        reserve.take([1, 2, 3, 4])
