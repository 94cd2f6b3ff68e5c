"""The whole step in one launch. Its parts are tested beside those of the split, tile functions by
themselves."""

import dataclasses

import pytest
import steps
import torch
from buckets import DEVICE, DTYPES, LAYOUTS, OVER, SHAPES, bits, frames_intact, matrices, rows_of_this_machine, same_bits, states, stored
from coded import code_frames_intact
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import pairwise
from steps import NAMES, STEP, bucket, copy, same
from steps import check as check_step
from steps import run as run_step

from lowrank_kernels import philox
from lowrank_kernels.backends.bucket import Bucket
from lowrank_kernels.backends.triton import builtin, choose, single_pass, split, table
from lowrank_kernels.backends.triton.dots import INTERPRETED

pytestmark = pytest.mark.gpu
SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
CODED = pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8-bit"])


@pytest.fixture(autouse=True)
def a_row_for_everything(monkeypatch):
    steps.serve_everything(monkeypatch)


def run(lists, right, **step):
    run_step(single_pass, lists, right, **step)


def check(lists, right, device_lr=None, rounding_seeds=None, **step):
    check_step(single_pass, lists, right, device_lr, rounding_seeds, **step)
    assert frames_intact(lists["weights"])
    moments = lists["exp_avgs"] + lists["exp_avg_sqs"]
    if "exp_avg_scales" in lists:
        assert code_frames_intact(moments) and frames_intact(lists["exp_avg_scales"] + lists["exp_avg_sq_scales"])
    else:
        assert frames_intact(moments)


def seeds(count, dtype):
    return philox.seed_tensor([philox.derive_seed(7, index) for index in range(count)], DEVICE) if dtype == torch.bfloat16 else None


@pytest.mark.parametrize(("coded", "on_device", "dtype", "right"), pairwise([False, True], [False, True], DTYPES, [False, True]), ids=str)
def test_against_the_reference(coded, on_device, dtype, right):
    """bf16 weights are rounded stochastically where moments are 8-bit on the left side and fp32 on the right,
    to nearest elsewhere."""
    lists, device_lr = bucket(3, 70, 130, 17, right, dtype, coded), None
    if on_device:
        lists["steps"], device_lr = [torch.full((), float(t), device=DEVICE) for t in (0, 3, 1000)], torch.tensor(0.1, device=DEVICE)
    check(lists, right, device_lr, seeds(3, dtype) if coded != right else None)
    if on_device:
        assert [int(count) for count in lists["steps"]] == [0, 3, 1000]


@SIDES
@CODED
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_r_from_memory(source, coded, right):
    """As the gradients of coordinates bring it, of any dtype beside weights and bases of another."""
    lists = bucket(2, 70, 130, 17, right, torch.bfloat16, coded)
    del lists["grads"]
    lists["projected"] = [torch.randn(17, 130, device=DEVICE).to(source) for _ in range(2)]
    check(lists, right, rounding_seeds=seeds(2, torch.bfloat16))


@SIDES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, right):
    m, n, r = shape
    check(bucket(1, m, n, r, right), right)
    check(bucket(1, m, n, r, right, torch.bfloat16, coded=True), right, rounding_seeds=seeds(1, torch.bfloat16))


@SIDES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("basis_layout", LAYOUTS)
def test_layouts(layout, basis_layout, right):
    check(bucket(2, 37, 70, 9, right, layout=layout, basis_layout=basis_layout), right)


def addresses(tensor):
    """Of every element."""
    offsets = sum(torch.arange(size).view(-1, *(1,) * index) * stride for index, (size, stride) in enumerate(_extents(tensor)))
    return (tensor.data_ptr() + torch.as_tensor(offsets) * tensor.element_size()).flatten()


def _extents(tensor):
    """(size, stride) of each dimension, the last one first."""
    return zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter's accesses can be watched; elsewhere compute-sanitizer does it")
@SIDES
@CODED
@pytest.mark.parametrize("shape", [(1, 70, 1), (37, 130, 17), (5, 3, 7)], ids=str)
def test_no_access_outside_of_the_matrices(shape, coded, right, monkeypatch):
    """Not even a read whose value goes nowhere: it may lie outside of what is allocated."""
    from triton.runtime.interpreter import InterpreterBuilder

    m, n, r = shape
    lists = bucket(2, m, n, r, right, torch.bfloat16, coded, layout="strided", basis_layout="strided")
    lists["steps"] = [torch.full((), 5.0) for _ in range(2)]
    drawn, zero, rate = seeds(2, torch.bfloat16), torch.zeros(1), torch.full((), 0.1)
    made, hyper = steps.bucket_of(lists, right, found_inf=zero, device_lr=rate, rounding_seeds=drawn)
    rows = dataclasses.replace(table.rows_of(made), aligned=False)
    addressed = [row for row in vars(rows).values() if isinstance(row, torch.Tensor)]
    inside = torch.cat([addresses(tensor) for tensors in (*lists.values(), addressed, (drawn, zero, rate)) for tensor in tensors])
    seen = []

    def watch(name, mask_at):
        access = getattr(InterpreterBuilder, name)

        def watched(self, pointers, *arguments):
            at = torch.from_numpy(pointers.data.astype("int64")[arguments[mask_at].data.astype(bool)])
            seen.append(at.numel())
            assert torch.isin(at, inside).all(), f"{name} outside of the matrices"
            return access(self, pointers, *arguments)

        monkeypatch.setattr(InterpreterBuilder, name, watched)

    watch("create_masked_load", 0)
    watch("create_masked_store", 1)
    single_pass.step(made, hyper, rows, single_pass.row_for(made, False))
    assert sum(seen) >= sum(tensor.numel() for tensors in lists.values() for tensor in tensors)


@pytest.mark.parametrize(
    ("kind", "row", "wide", "right"),
    [
        pytest.param(*row, right, marks=() if number % 2 == right else pytest.mark.slow, id=f"{number}-{'right' if right else 'left'}")
        for number, row in enumerate(rows_of_this_machine(builtin.SINGLE_PASS))
        for right in (False, True)
    ],
)
def test_every_row(kind, row, wide, right, monkeypatch):
    """Over the edge of every tile."""
    monkeypatch.setattr(choose, "single_pass", lambda *args: row)
    dtype = torch.bfloat16 if kind[0] == "16bit" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind[0] == "tf32" else "highest")
    try:
        over = OVER[wide]
        m, n, r = max(row.BLOCK_K, row.BLOCK_M) + over[0], row.BLOCK_N + over[1], row.BLOCK_R - over[2]
        check(bucket(1, m, n, r, right, dtype, coded=kind[1] == "8-bit", pad=over[0]), right)
    finally:
        torch.set_float32_matmul_precision(before)


@settings(max_examples=15, deadline=None)
@given(
    m=st.integers(1, 90), n=st.integers(1, 90), r=st.integers(1, 70), right=st.booleans(), layout=st.sampled_from(LAYOUTS),
    coded=st.booleans(),
)  # fmt: skip
def test_any_shape(m, n, r, right, layout, coded):
    check(bucket(1, m, n, r, right, torch.float32, coded, layout), right)


@settings(max_examples=15, deadline=None)
@given(
    beta1=st.sampled_from([0.0, 0.5, 0.999]), beta2=st.floats(0, 0.9999), eps=st.sampled_from([1e-12, 1e-3]), lr=st.floats(0, 1),
    scale=st.floats(-2, 2), weight_decay=st.floats(0, 1), step=st.integers(1, 10**6), right=st.booleans(),
)  # fmt: skip
def test_any_coefficients(beta1, beta2, eps, lr, scale, weight_decay, step, right):
    scalars = {"beta1": beta1, "beta2": beta2, "eps": eps, "lr": lr, "scale": scale, "weight_decay": weight_decay, "step": step}
    check(bucket(1, 9, 13, 4, right), right, **scalars)


@SIDES
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_betas_on_the_device(beta, right):
    lists = bucket(1, 9, 13, 4, right)
    lists["steps"] = [torch.full((1,), 2.0, device=DEVICE)]
    check(lists, right, beta1=beta, beta2=beta)


@SIDES
@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_extreme_scales(scale, right):
    """R² stays representable; beyond that V is infinite or zero in fp32 whatever one does."""
    check(bucket(1, 70, 40, 17, right, scale=scale), right)
    check(bucket(1, 70, 40, 17, right, torch.bfloat16, coded=True, scale=scale), right)


@SIDES
def test_stochastic_draws(right):
    """Decay alone is known so well that nearly every draw is checked, not only that it gave a neighbour."""
    check(bucket(2, 70, 66, 9, right, torch.bfloat16), right, rounding_seeds=seeds(2, torch.bfloat16), scale=0.0)


@SIDES
def test_stochastic_rounding_is_unbiased(right):
    """W = 1 decays to 0.999, which lies between two bf16: the mean over many elements is 0.999, not a
    neighbour 5e-4 or 3e-3 away."""
    m, n = 96, 256
    lists = bucket(1, m, n, 4, right, torch.bfloat16)
    lists["weights"][0].fill_(1.0)
    run(lists, right, rounding_seeds=seeds(1, torch.bfloat16), scale=0.0, lr=0.005)
    weight = lists["weights"][0].double()
    assert len(weight.unique()) == 2
    # Deviation of the mean: at most half of a spacing over √(m·n).
    assert abs(float(weight.mean()) - 0.999) < 5 * 2.0**-9 / (m * n) ** 0.5


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0/0 outside the matrix, as it may be
@SIDES
def test_rows_past_the_rank_take_no_part(right):
    """With ε = 0 they would be 0/0."""
    check(bucket(2, 20, 30, 5, right), right, eps=0.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # R is NaN, as it may be
@CODED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_found_inf_leaves_the_bits(dtype, coded):
    lists = bucket(2, 70, 67, 33, False, dtype, coded)
    lists["grads"][0][0, 0] = float("inf")
    kept = copy(lists)
    run(lists, False, found_inf=torch.ones(1, device=DEVICE), rounding_seeds=seeds(2, dtype))
    assert same(lists, kept)


@SIDES
@CODED
def test_found_inf_of_zero_changes_nothing(coded, right):
    lists = bucket(2, 40, 67, 9, right, torch.bfloat16, coded)
    others = copy(lists)
    run(lists, right)
    run(others, right, found_inf=torch.zeros((), device=DEVICE))
    assert same(lists, others)


@SIDES
@CODED
def test_zero_gradient_of_a_fresh_state_only_decays(coded, right):
    lists = bucket(2, 40, 67, 9, right, coded=coded)
    for name in NAMES[3:]:
        for tensor in lists.get(name, ()):
            tensor.zero_()
    for grad in lists["grads"]:
        grad.zero_()
    expected = [weight * (1 - STEP["lr"] * STEP["weight_decay"]) for weight in lists["weights"]]
    run(lists, right)
    assert same_bits(bits(lists["weights"]), bits(expected))
    if not coded:
        assert not any(tensor.any() for tensor in lists["exp_avgs"] + lists["exp_avg_sqs"])


def test_decay_comes_before_the_update():
    """With W = 0 the decay has nothing to act on: the update is not decayed. A step from zero moments has
    size one."""
    lists = bucket(1, 6, 70, 6, False)
    lists["weights"][0].zero_(), lists["exp_avgs"][0].zero_(), lists["exp_avg_sqs"][0].zero_()
    lists["bases"][0].copy_(torch.eye(6))
    run(lists, False, lr=0.5, scale=0.5, weight_decay=1.0, step=1)
    assert ((lists["weights"][0] + 0.25 * lists["grads"][0].sign()).abs() < 1e-3).all()


@SIDES
@CODED
def test_inputs_stay(coded, right):
    lists = bucket(2, 40, 67, 9, right, torch.bfloat16, coded)
    lists["steps"] = [torch.full((), 5.0, device=DEVICE) for _ in range(2)]
    kept = copy({name: lists[name] for name in ("grads", "bases", "steps")})
    run(lists, right)
    assert same(kept, lists)


@SIDES
@CODED
def test_same_inputs_same_bits(coded, right):
    first = bucket(2, 70, 67, 33, right, torch.bfloat16, coded)
    second = copy(first)
    for lists in (first, second):
        run(lists, right, rounding_seeds=seeds(2, torch.bfloat16))
    assert same(first, second)


@CODED
def test_a_matrix_gives_the_same_bits_alone(coded):
    together = bucket(3, 40, 67, 9, True, torch.bfloat16, coded)
    together["steps"] = [torch.full((), float(t), device=DEVICE) for t in range(3)]
    alone, drawn = copy(together), seeds(3, torch.bfloat16)
    run(together, True, rounding_seeds=drawn)
    for index in range(3):
        run({name: [tensors[index]] for name, tensors in alone.items()}, True, rounding_seeds=drawn[index : index + 1])
    assert same(together, alone)


@pytest.mark.skipif(not INTERPRETED, reason="which product of a sum a compiler fuses is its own choice for each kernel")
@SIDES
@CODED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_split_bit_for_bit(dtype, coded, right):
    """Where no order of summation matters: G of small integers, and a basis that selects rows. Then every
    rounding is the same."""
    lists = bucket(2, 70, 130, 17, right, dtype, coded)
    for grad, basis in zip(lists["grads"], lists["bases"], strict=True):
        grad.mul_(4).round_()
        basis.zero_()
        basis[torch.randperm(70)[:17], torch.arange(17)] = 1
    others, drawn = copy(lists), seeds(2, dtype)
    run(lists, right, rounding_seeds=drawn)
    run_step(split, others, right, rounding_seeds=drawn)
    assert same(lists, others)


@SIDES
def test_no_columns(right):
    lists = {
        "weights": stored(1, 5, 0, right, torch.float32), "grads": stored(1, 5, 0, right, torch.float32),
        "bases": matrices(1, 5, 2, torch.float32), **dict(zip(NAMES[3:5], states(1, 2, 0), strict=True)),
    }  # fmt: skip
    run(lists, right)


class TestChoice:
    """Which buckets have a row, and enough programs."""

    @pytest.fixture(autouse=True)
    def the_real_choice(self, monkeypatch, a_row_for_everything):
        monkeypatch.setattr(choose, "single_pass", steps.chosen_row)

    def row(self, monkeypatch, arch, m=4096, n=4096, r=128, weight=torch.bfloat16, basis=torch.bfloat16, aligned=True):
        monkeypatch.setattr(choose, "architecture", lambda device: arch)
        first = (torch.empty(m, n, dtype=weight, device="meta"), torch.empty(m, n, dtype=weight, device="meta"))
        bases = [torch.empty(m, r, dtype=basis, device="meta")]
        return single_pass.row_for(Bucket([first[0]], bases, {}, [], False, grads=[first[1]]), aligned)

    @pytest.mark.parametrize("arch", [80, 90, 100])
    @pytest.mark.parametrize("r", [1, 32, 33, 128, 256])
    def test_rows_cover_the_rank(self, arch, r, monkeypatch):
        assert self.row(monkeypatch, arch, r=16 * -(-r // 16)).BLOCK_R >= r

    @pytest.mark.parametrize("arch", [80, 90, 100])
    def test_the_split_serves_the_rest(self, arch, monkeypatch):
        assert self.row(monkeypatch, arch, r=1024) is None
        assert self.row(monkeypatch, arch, aligned=False) is None
        assert self.row(monkeypatch, arch, n=4097) is None
        assert self.row(monkeypatch, arch, weight=torch.float32) is None
        assert self.row(monkeypatch, 75) is None and self.row(monkeypatch, "gfx942") is None

    def test_programs(self):
        row = builtin.SINGLE_PASS[90]["16bit", "fp32"][0]
        assert row.programs(row.BLOCK_N * 3 + 1, 5) == 20

    def test_few_programs_are_left_to_the_split(self, monkeypatch):
        monkeypatch.setattr(choose, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(choose, "device_name", lambda device: None)
        monkeypatch.setattr(choose, "architecture", lambda device: 90)

        class OnCuda:
            """Enough of a tensor for the choice."""

            def __init__(self, *shape):
                self.dtype, self.device, self.shape = torch.bfloat16, torch.device("cuda", 0), torch.Size(shape)

            def stride(self):
                return self.shape[1], 1

        for count, served in ((1, False), (32, True)):
            matrices, bases = [OnCuda(4096, 4096)] * count, [OnCuda(4096, 128)] * count
            row = single_pass.row_for(Bucket(matrices, bases, {}, [], False, grads=matrices), aligned=True)
            assert (row is not None) == served

    def test_the_extent_across_a_run_of_memory_does_not_matter(self, monkeypatch):
        """A weight of 5461 rows of 2048 runs in large tiles on the right side; 2048 rows of 5461 have no
        accesses of 16 bytes."""
        monkeypatch.setattr(choose, "architecture", lambda device: 90)
        for shape, right in (((5461, 2048), True), ((2048, 5461), False)):
            matrix = [torch.empty(shape, dtype=torch.bfloat16, device="meta")]
            bases = [torch.empty(128, 2048, dtype=torch.bfloat16, device="meta").mT]
            row = single_pass.row_for(Bucket(matrix, bases, {}, [], right, grads=matrix), aligned=True)
            assert (row is not None) == right


@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8-bit"])
def test_no_temporaries(coded, monkeypatch):
    made, hyper = steps.bucket_of(bucket(3, 70, 130, 17, False, torch.bfloat16, coded), False)
    rows = table.rows_of(made)
    for name in ("empty", "zeros", "full", "empty_like"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("an allocation"))
    single_pass.step(made, hyper, rows, single_pass.row_for(made, False))
