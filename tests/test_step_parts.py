"""Moments and back-projection on their own, with found_inf and counts on the device: every implementation
against fp64."""

import pytest
import torch
from tolerances import BIAS_CORRECTION_ERROR, UNIT, assert_within, back_project_error, moments_error, normalised_error, store_unit

from benchmarks import formulas
from lowrank_kernels import backends
from lowrank_kernels.backends import cpu, reference
from lowrank_kernels.lifts.back_projection import BackProjection
from lowrank_kernels.rounding import round_stochastically
from lowrank_kernels.rules.adamw import AdamW
from lowrank_kernels.storage import Plain

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADAM = dict(beta1=0.9, beta2=0.99, eps=1e-8)
UPDATE = dict(lr=0.1, scale=0.5, weight_decay=0.2)
SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
SKIPPED = pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])


def of_bucket(run):
    """update_moments_ by a function of a bucket. The weights and bases are there to have a bucket."""

    def update_moments_(exp_avgs, exp_avg_sqs, projected, *, beta1, beta2, eps, device_steps, found_inf=None):
        n, rank = projected.shape[2], projected.shape[1]
        weights, bases = ([torch.zeros(1, size, dtype=projected.dtype, device=DEVICE) for _ in range(len(projected))] for size in (n, rank))
        states = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs}
        made = backends.Bucket(weights, bases, states, device_steps, False, projected=list(projected), found_inf=found_inf)
        hyper = backends.Hyper(AdamW(), BackProjection(), Plain(), 0.0, options={"betas": (beta1, beta2), "eps": eps})
        if run is not reference.update:
            made.check(hyper)
        return run(made, hyper, made.projected)

    return update_moments_


def lifted_by(run):
    """back_project_ by a function of a bucket. The states are there to have a bucket."""

    def back_project_(weights, bases, normalised, *, right, device_steps=None, found_inf=None, rounding_seeds=None, **numbers):
        steps = device_steps or [torch.zeros((), device=DEVICE) for _ in weights]
        dtype = torch.float64 if torch.float64 in (weights[0].dtype, bases[0].dtype) else torch.float32
        shape = bases[0].shape[1], weights[0].shape[0 if right else 1]
        states = {name: [torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in weights] for name in ("exp_avg", "exp_avg_sq")}
        made = backends.Bucket(
            weights, bases, states, steps, right, projected=list(normalised), found_inf=found_inf, rounding_seeds=rounding_seeds
        )
        hyper = backends.Hyper(AdamW(), BackProjection(), Plain(), **numbers)
        made.check(hyper)
        run(made, hyper, made.projected, normalised)

    return back_project_


@pytest.fixture(params=["backend", "cpu", "reference", "Triton"])
def implementation(request):
    """Of a part by name. The backend is what an optimizer's bucket gets: on a GPU, and in the dry lane, the
    kernels. Triton on a CPU runs in the interpreter."""
    if request.param == "Triton":
        pytest.importorskip("triton")
    elif request.param == "cpu" and DEVICE != "cpu":
        pytest.skip("takes CPU tensors")

    def of(name):
        if request.param == "Triton":
            from lowrank_kernels.backends.triton import composed

            lift = lifted_by(lambda made, hyper, _, normalised: composed.lift(made, hyper, normalised))
            return {"update_moments_": counted(of_bucket(composed.update)), "back_project_": lift}[name]
        update, lift = {
            "backend": (of_bucket(backends.update), lifted_by(backends.lift)),
            "cpu": (cpu.update_moments_, cpu.back_project_),
            "reference": (of_bucket(reference.update), lifted_by(reference.lift)),
        }[request.param]
        return {"update_moments_": counted(update), "back_project_": lift}[name]

    of.name = request.param
    of.in_triton = request.param == "Triton" or (request.param == "backend" and DEVICE == "cuda")
    return of


def counted(update):
    """Takes the number of the update, where no counts are given."""

    def run(exp_avgs, *rest, step, device_steps=None, **options):
        counts = device_steps or [torch.tensor(step - 1.0, device=DEVICE) for _ in exp_avgs]
        return update(exp_avgs, *rest, device_steps=counts, **options)

    return run


def moments(batch=3, rank=5, n=33, dtype=torch.float32):
    exp_avgs = [torch.randn(rank, n, device=DEVICE, dtype=dtype) for _ in range(batch)]
    exp_avg_sqs = [torch.rand(rank, n, device=DEVICE, dtype=dtype) for _ in range(batch)]
    return exp_avgs, exp_avg_sqs, torch.randn(batch, rank, n, device=DEVICE, dtype=dtype)


def weights_of(right, dtype=torch.float32, batch=2, m=20, n=33, rank=5):
    weights = [torch.randn((n, m) if right else (m, n), device=DEVICE).to(dtype) for _ in range(batch)]
    bases = [torch.randn(m, rank, device=DEVICE).to(dtype) for _ in range(batch)]
    return weights, bases, torch.randn(batch, rank, n, device=DEVICE)


def bits(tensors):
    return [tensor.clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]) for tensor in tensors]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("counts", [None, (0, 7, 100_000)], ids=["counted by the host", "on the device"])
def test_moments_against_fp64(implementation, counts):
    exp_avgs, exp_avg_sqs, projected = moments()
    exact = [(m.double(), v.double(), r.double()) for m, v, r in zip(exp_avgs, exp_avg_sqs, projected, strict=True)]
    on_device = None if counts is None else [torch.tensor(float(count), device=DEVICE) for count in counts]
    step = 4 if counts is None else 0  # not looked at
    found = implementation("update_moments_")(exp_avgs, exp_avg_sqs, projected, **ADAM, step=step, device_steps=on_device)
    correction = BIAS_CORRECTION_ERROR if implementation.in_triton else UNIT[torch.float32]
    for index, (m, v, r) in enumerate(exact):
        t = 4 if counts is None else counts[index] + 1
        errors = moments_error(m, v, r, ADAM["beta1"], ADAM["beta2"])
        expected = formulas.update_moments_(m, v, r, **ADAM, step=t)
        assert_within(exp_avgs[index], m, errors[0], "M")
        assert_within(exp_avg_sqs[index], v, errors[1], "V")
        assert_within(found[index], expected, normalised_error(m, v, errors, **ADAM, step=t, correction=correction), "N")
    assert counts is None or [int(count) for count in on_device] == list(counts), "whoever keeps the counts raises them"


@SIDES
def test_weights_are_rounded_stochastically_as_the_reference_does(implementation, right):
    weights, bases, normalised = weights_of(right, torch.bfloat16)
    seeds = torch.tensor([3, 2**62], device=DEVICE)
    counts = [torch.tensor(float(count), device=DEVICE) for count in (0, 41)]
    exact = [formulas.updated_weight(w, p, n, **UPDATE, right=right) for w, p, n in zip(weights, bases, normalised, strict=True)]
    before = bits(weights)
    options = dict(**UPDATE, right=right, rounding_seeds=seeds, device_steps=counts)
    implementation("back_project_")(weights, bases, normalised, **options, found_inf=torch.ones((), device=DEVICE))
    assert same(before, bits(weights))
    implementation("back_project_")(weights, bases, normalised, **options)
    for weight, value, basis, n, seed, count in zip(weights, exact, bases, normalised, seeds.split(1), (1, 42), strict=True):
        expected = round_stochastically(value, seed, count)
        # fp32 sums in another order, and N rounded to the basis' 16 bits before a dot, land on the other
        # neighbour now and then.
        assert (weight == expected).float().mean() > 0.8
        # The interpreter cuts N to bf16 where a GPU rounds it.
        of_n = UPDATE["lr"] * UPDATE["scale"] * 2.0**-7 * reference.orient(basis.double().abs() @ n.double().abs(), right)
        assert ((weight.double() - value.double()).abs() <= (2.0**-7 * (value.double().abs() + of_n) + of_n)).all()
        assert not torch.equal(weight, value.bfloat16())


@pytest.mark.parametrize("implementation", ["backend", "cpu", "reference"], indirect=True)
def test_moments_of_fp64_stay_in_fp64(implementation):
    exp_avgs, exp_avg_sqs, projected = moments(batch=1, dtype=torch.float64)
    m, v = exp_avgs[0].clone(), exp_avg_sqs[0].clone()
    count = [torch.tensor(6.0, device=DEVICE)]
    found = implementation("update_moments_")(exp_avgs, exp_avg_sqs, projected, **ADAM, step=0, device_steps=count)
    expected = formulas.update_moments_(m, v, projected[0], **ADAM, step=7)
    for a, b in ((found[0], expected), (exp_avgs[0], m), (exp_avg_sqs[0], v)):
        assert a.dtype == torch.float64 and torch.allclose(a, b, rtol=1e-13, atol=1e-15)


@SKIPPED
def test_moments_keep_their_bits_where_a_step_is_skipped(implementation, shape):
    exp_avgs, exp_avg_sqs, projected = moments()
    exp_avgs[0][0, 0] = float("nan")
    projected[0], projected[1, 0, 0] = float("inf"), float("nan")
    before = bits(exp_avgs + exp_avg_sqs)
    counts = [torch.zeros((), device=DEVICE) for _ in exp_avgs]
    found_inf = torch.ones(shape, device=DEVICE)
    update = implementation("update_moments_")
    assert update(exp_avgs, exp_avg_sqs, projected, **ADAM, step=1, found_inf=found_inf).shape == projected.shape
    update(exp_avgs, exp_avg_sqs, projected, **ADAM, step=0, found_inf=found_inf, device_steps=counts)
    assert same(before, bits(exp_avgs + exp_avg_sqs)) and not any(counts)


@SKIPPED
def test_moments_do_not_see_a_found_inf_of_zero(implementation, shape):
    exp_avgs, exp_avg_sqs, projected = moments()
    others = [tensor.clone() for tensor in exp_avgs], [tensor.clone() for tensor in exp_avg_sqs]
    update = implementation("update_moments_")
    plain = update(*others, projected, **ADAM, step=2)
    found = update(exp_avgs, exp_avg_sqs, projected, **ADAM, step=2, found_inf=torch.zeros(shape, device=DEVICE))
    assert same(bits([plain, *others[0], *others[1]]), bits([found, *exp_avgs, *exp_avg_sqs]))


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_back_projection_against_fp64(implementation, dtype, right):
    if implementation.name == "Triton" and dtype == torch.float64:
        pytest.skip("the kernels take no fp64")
    weights, bases, normalised = weights_of(right, dtype)
    exact = [weight.double() for weight in weights]
    implementation("back_project_")(weights, bases, normalised, **UPDATE, right=right)
    tf32 = 2.0**-11 if dtype == torch.float32 and DEVICE == "cuda" and torch.get_float32_matmul_precision() != "highest" else 0.0
    # Of 16 bits, N is rounded to the bases' dtype for the dot where a tensor core, or a CPU's instructions,
    # take no other.
    rounds_n = dtype == torch.bfloat16 and implementation.name != "reference" and (implementation.in_triton or cpu.NATIVE_BF16)
    for weight, expected, basis, update in zip(weights, exact, bases, normalised, strict=True):
        bound = back_project_error(
            reference.orient(expected, right).to(dtype), basis, update, **UPDATE,
            store=store_unit(dtype, implementation.in_triton and DEVICE == "cpu") if dtype != torch.float64 else 0.0,
            operand_unit=(2 * UNIT[torch.bfloat16] if rounds_n else 0.0) + tf32, basis_unit=tf32,
        )  # fmt: skip
        formulas.back_project_(expected, basis.double(), update.double(), **UPDATE, right=right)
        assert_within(reference.orient(weight, right), reference.orient(expected, right), bound, "W")


@SIDES
@SKIPPED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_keep_their_bits_where_a_step_is_skipped(implementation, dtype, right, shape):
    if implementation.name == "Triton" and dtype == torch.float64:
        pytest.skip("the kernels take no fp64")
    weights, bases, normalised = weights_of(right, dtype)
    weights[1][0, 0] = float("nan")
    before = bits(weights)
    normalised[0], normalised[1, 0, 0] = float("inf"), float("nan")
    implementation("back_project_")(weights, bases, normalised, **UPDATE, right=right, found_inf=torch.ones(shape, device=DEVICE))
    assert same(before, bits(weights))


@SIDES
@SKIPPED
def test_weights_do_not_see_a_found_inf_of_zero(implementation, right, shape):
    weights, bases, normalised = weights_of(right)
    others = [weight.clone() for weight in weights]
    implementation("back_project_")(others, bases, normalised, **UPDATE, right=right)
    implementation("back_project_")(weights, bases, normalised, **UPDATE, right=right, found_inf=torch.zeros(shape, device=DEVICE))
    assert same(bits(others), bits(weights))


REFUSED = (ValueError, RuntimeError)


@pytest.mark.parametrize("implementation", ["backend", "cpu", "Triton"], indirect=True)
@pytest.mark.parametrize("wrong", ["exp_avgs", "exp_avg_sqs", "both", "projected", "device_steps", "too many device_steps"])
def test_moments_of_other_lengths_are_refused_untouched(implementation, wrong):
    exp_avgs, exp_avg_sqs, projected = moments()
    before = bits(exp_avgs + exp_avg_sqs)
    lists = [
        exp_avgs[:2] if wrong in ("exp_avgs", "both") else exp_avgs,
        exp_avg_sqs[:2] if wrong in ("exp_avg_sqs", "both") else exp_avg_sqs,
        projected[:2] if wrong == "projected" else projected,
    ]
    length = {"device_steps": 2, "too many device_steps": 4}.get(wrong)
    counts = None if length is None else [torch.zeros((), device=DEVICE) for _ in range(length)]
    with pytest.raises(REFUSED):
        implementation("update_moments_")(*lists, **ADAM, step=1, device_steps=counts)
    assert same(before, bits(exp_avgs + exp_avg_sqs))


@pytest.mark.parametrize("implementation", ["backend", "cpu", "Triton"], indirect=True)
@pytest.mark.parametrize("size", [(5, 32), (4, 33), (1, 33), (5, 34)], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["exp_avgs", "exp_avg_sqs"])
def test_moments_of_another_shape_are_refused_untouched(implementation, which, size):
    """The fused AdamW that the CPU runs would write past their end."""
    lists = moments()
    lists[which][1] = torch.rand(size, device=DEVICE)
    before = bits(lists[0] + lists[1])
    with pytest.raises(REFUSED):
        implementation("update_moments_")(*lists, **ADAM, step=1)
    assert same(before, bits(lists[0] + lists[1]))


@pytest.mark.parametrize("lay", [lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, 1)[:, ::2]], ids=["columns", "strided"])
@pytest.mark.parametrize("which", [0, 1], ids=["exp_avgs", "exp_avg_sqs"])
def test_moments_that_are_not_row_major_are_refused_or_right(implementation, which, lay):
    lists = moments()
    lists[which][:] = [lay(tensor) for tensor in lists[which]]
    before = bits(lists[0] + lists[1])
    if implementation.name == "reference":
        rows = [[tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors] for tensors in lists[:2]]
        found = implementation("update_moments_")(*lists, **ADAM, step=1)
        assert torch.equal(found, implementation("update_moments_")(*rows, lists[2], **ADAM, step=1))
        return
    with pytest.raises(ValueError, match="must be row-major"):
        implementation("update_moments_")(*lists, **ADAM, step=1)
    assert same(before, bits(lists[0] + lists[1]))


def test_the_cpu_takes_projected_gradients_of_any_strides():
    """The kernels take row-major ones only, and say so."""
    exp_avgs, exp_avg_sqs, projected = ([tensor.cpu() for tensor in part] for part in moments())
    projected = torch.stack(projected)
    others = [[tensor.clone() for tensor in tensors] for tensors in (exp_avgs, exp_avg_sqs)]
    expected = counted(cpu.update_moments_)(exp_avgs, exp_avg_sqs, projected, **ADAM, step=1)
    found = counted(cpu.update_moments_)(*others, projected.mT.contiguous().mT, **ADAM, step=1)
    assert found.is_contiguous() and torch.equal(expected, found)
    assert same(bits(exp_avgs + exp_avg_sqs), bits(others[0] + others[1]))


@pytest.mark.parametrize("implementation", ["backend", "cpu", "Triton"], indirect=True)
@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.bfloat16], ids=["fp64", "bf16"])
def test_moments_of_another_dtype_are_refused_untouched(implementation, change):
    exp_avgs, exp_avg_sqs, projected = moments()
    wrong = [change(tensor) for tensor in exp_avgs]
    before = bits(wrong + exp_avg_sqs)
    with pytest.raises(REFUSED):
        implementation("update_moments_")(wrong, exp_avg_sqs, projected, **ADAM, step=1)
    assert same(before, bits(wrong + exp_avg_sqs))


@SIDES
@pytest.mark.parametrize("wrong", ["weights", "bases", "normalised", "rank", "m", "n", "one column"])
def test_back_projections_that_do_not_fit_are_refused_untouched(implementation, wrong, right):
    weights, bases, normalised = weights_of(right)
    before = bits(weights)
    change = {
        "weights": lambda: (weights[:1], bases, normalised),
        "bases": lambda: (weights, bases[:1], normalised),
        "normalised": lambda: (weights, bases, normalised[:1]),
        "rank": lambda: (weights, bases, normalised[:, :4].contiguous()),
        "m": lambda: (weights, [basis[:19].contiguous() for basis in bases], normalised),
        "n": lambda: (weights, bases, normalised[..., :32].contiguous()),
        "one column": lambda: (weights, bases, normalised[..., :1].contiguous()),  # which PyTorch would repeat
    }
    with pytest.raises(REFUSED):
        implementation("back_project_")(*change[wrong](), **UPDATE, right=right)
    assert same(before, bits(weights))
