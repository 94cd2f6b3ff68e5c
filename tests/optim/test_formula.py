"""The optimizer against torch.optim.AdamW, against GaLore's published rule, and against reference.py."""

import math

import pytest
import torch
from models import build, train
from torch import nn

import lowrank_kernels as lrk
from benchmarks import formulas
from lowrank_kernels.optim import refreshes
from lowrank_kernels.subspaces import SELECTIONS


def identity_bases(grads, previous, *, rank, right, dtype, **settings):
    return [torch.eye(grad.shape[-1 if right else -2], rank, dtype=dtype) for grad in grads]


@pytest.mark.parametrize("proj_type", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_with_p_identity_and_scale_1_it_is_adamw(monkeypatch, proj_type, dtype):
    monkeypatch.setattr(refreshes.ops, "choose_bases", identity_bases)
    torch.manual_seed(0)
    shapes = [(24, 31), (31, 24), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    exact = torch.float32 if dtype == torch.bfloat16 else dtype
    theirs = [nn.Parameter(parameter.detach().clone().to(exact)) for parameter in ours]
    settings = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    # The rank is clamped to the shorter side; on the longer one P would not be the identity.
    groups = [
        {"params": [p], "rank": p.shape[0 if side == "left" else 1], "scale": 1.0, "selection": "random", "proj_type": side}
        for p in ours
        for side in [proj_type if p.shape[0] == p.shape[1] else ("left" if p.shape[0] < p.shape[1] else "right")]
    ]
    low_rank, adamw = lrk.LowRankAdamW(groups, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(25):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.to(b.dtype)
        low_rank.step()
        adamw.step()
    for a, b in zip(ours, theirs, strict=True):
        # 25 steps, each rounding a weight of size ~1 once; bf16 weights also lose the part of a step below
        # half an ulp.
        tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 25 * 2.0**-8}[dtype]
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


def galore_rule(parameter, grad, basis, state, lr, betas, scale, step, right):
    """GaLore's published update (arXiv 2403.03507, algorithm 2, as in its released optimizer): Adam's ε on
    the uncorrected root."""
    low = grad @ basis if right else basis.mT @ grad
    state["m"] = betas[0] * state["m"] + (1 - betas[0]) * low
    state["v"] = betas[1] * state["v"] + (1 - betas[1]) * low**2
    step_size = lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
    normalised = state["m"] / state["v"].sqrt()
    return parameter - step_size * scale * (normalised @ basis.mT if right else basis @ normalised)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_with_eps_0_and_no_decay_it_is_galores_rule(shape):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = lrk.GaLoreAdamW(
        [{"params": [parameter], "rank": 7, "update_proj_gap": 5, "scale": 0.25, "svd": "exact"}], lr=0.03, betas=(0.9, 0.99), eps=0.0
    )
    mine, state, right = parameter.detach().clone(), {"m": 0.0, "v": 0.0}, shape[0] >= shape[1]
    for step in range(1, 14):
        parameter.grad = torch.randn(shape, dtype=torch.float64)
        if (step - 1) % 5 == 0:
            left, _, right_vectors = torch.linalg.svd(parameter.grad, full_matrices=False)
            basis = right_vectors[:7].mT if right else left[:, :7]
        optimizer.step()
        found = optimizer.state[parameter]["basis"]
        assert lrk.subspace_overlap(found, basis).item() == pytest.approx(1, abs=1e-10)
        # A singular vector's sign is arbitrary and its moments carry over a refresh, so the rule runs on the
        # basis in use.
        mine = galore_rule(mine, parameter.grad, found, state, 0.03, (0.9, 0.99), 0.25, step, right)
        assert torch.allclose(parameter, mine, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_sides_and_state_shapes(proj_type, shape):
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 6, "proj_type": proj_type}])
    parameter.grad = torch.randn(shape)
    optimizer.step()
    rows, columns = shape
    right = {"left": False, "right": True, "std": rows >= columns, "reverse_std": rows < columns}[proj_type]
    m, n = (columns, rows) if right else (rows, columns)
    state = optimizer.state[parameter]
    assert list(state) == ["step", "basis", "refreshed_at", "exp_avg", "exp_avg_sq"]
    assert state["basis"].shape == (m, 6) and state["exp_avg"].shape == state["exp_avg_sq"].shape == (6, n)


def test_refresh_schedule_counts_before_the_increment():
    parameter = nn.Parameter(torch.randn(10, 20))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 4, "update_proj_gap": 3}])
    changed, last = [], None
    for step in range(8):
        parameter.grad = torch.randn(10, 20)
        optimizer.step()
        basis = optimizer.state[parameter]["basis"]
        if last is None or not torch.equal(basis, last):
            changed.append(step)
        last = basis.clone()
    assert changed == [0, 3, 6]


def test_what_a_refresh_is_asked_for(monkeypatch):
    calls = []
    choose = refreshes.ops.choose_bases

    def spy(grads, previous, **arguments):
        calls.append((len(grads), previous is not None, arguments))
        return choose(grads, previous, **arguments)

    monkeypatch.setattr(refreshes.ops, "choose_bases", spy)
    dense, wide, experts, late = (nn.Parameter(torch.zeros(shape)) for shape in ((4,), (8, 12), (2, 8, 12), (8, 12)))
    options = {"rank": 3, "update_proj_gap": 2, "oversample": 1, "power_iters": 3, "seed": 7, "selection": "random", "svd": "exact"}
    optimizer = lrk.LowRankAdamW([{"params": [dense]}, {"params": [wide, experts, late], **options}])
    for _ in range(3):
        for parameter in (wide, experts, late):
            parameter.grad = torch.randn_like(parameter)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
    assert [(count, again) for count, again, _ in calls] == [(2, False), (2, False), (2, True), (2, True)]
    for index, (_, _, arguments) in enumerate(calls):
        assert list(arguments["places"]) == [[(1, 0), (3, 0)], [(2, 0), (2, 1)]][index % 2]
        assert arguments["refresh_number"] == index // 2
        assert {key: arguments[key] for key in ("rank", "oversample", "power_iters", "seed", "selection", "svd")} == {
            key: options[key] for key in ("rank", "oversample", "power_iters", "seed", "selection", "svd")
        }


@pytest.mark.parametrize(
    "key, values", [("lr", (0.0, 0.1)), ("scale", (0.0, 1.0)), ("proj_type", ("left", "right")), ("betas", ((0.0, 0.0), (0.9, 0.9)))]
)
def test_groups_that_differ_do_not_share_a_bucket(key, values):
    torch.manual_seed(0)
    together = [nn.Parameter(torch.ones(10, 10)) for _ in values]
    alone = [nn.Parameter(torch.ones(10, 10)) for _ in values]
    options = {"rank": 3, "selection": "dominant", "update_proj_gap": 2}
    both = lrk.LowRankAdamW([{"params": [p], key: value, **options} for p, value in zip(together, values, strict=True)])
    each = [lrk.LowRankAdamW([{"params": [p], key: value, **options}]) for p, value in zip(alone, values, strict=True)]
    for _ in range(3):
        grad = torch.randn(10, 10)
        for parameter in together + alone:
            parameter.grad = grad.clone()
        both.step()
        for optimizer in each:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True)) and not torch.equal(*together)


def test_fp64_parameters_with_fp32_gradients():
    parameter = nn.Parameter(torch.ones(8, 12, dtype=torch.float64))
    parameter.grad_dtype = None
    parameter.grad = torch.randn(8, 12)
    lrk.LowRankAdamW([{"params": [parameter], "rank": 2}]).step()
    assert not torch.equal(parameter, torch.ones_like(parameter))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_defaults_of_device_and_dtype_do_not_leak_in(selection):
    parameter, plain = (nn.Parameter(torch.ones(8, 30)) for _ in range(2))
    grads = [torch.randn(8, 30) for _ in range(3)]
    options = {"rank": 2, "oversample": 0, "selection": selection, "update_proj_gap": 2}
    for target in (parameter, plain):
        optimizer = lrk.LowRankAdamW([{"params": [target], **options}], betas=(0.9, 0.9999), lr=0.1)
        for grad in grads:
            target.grad = grad.clone()
            if target is plain:
                optimizer.step()
                continue
            torch.set_default_dtype(torch.bfloat16)
            try:
                with torch.device("meta"):
                    optimizer.step()
            finally:
                torch.set_default_dtype(torch.float32)
    assert torch.equal(parameter, plain)


@pytest.mark.parametrize("selection", ["random", "importance"])
def test_every_draw_is_keyed_by_seed_parameter_and_refresh(selection):
    """With one and the same gradient everywhere, bases differ between parameters, refreshes and seeds, and
    repeat with them."""
    grad = torch.randn(20, 60)

    def bases(seed):
        parameters = [nn.Parameter(torch.zeros(20, 60)) for _ in range(2)]
        group = {"params": parameters, "rank": 4, "update_proj_gap": 1, "selection": selection, "seed": seed}
        optimizer, found = lrk.LowRankAdamW([group]), []
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = grad.clone()
            optimizer.step()
            found += [optimizer.state[parameter]["basis"].clone() for parameter in parameters]
        return found

    first, again, other = bases(0), bases(0), bases(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    everything = first + other
    pairs = [(a, b) for index, a in enumerate(everything) for b in everything[:index]]
    assert all(lrk.subspace_overlap(a, b) < 0.99 for a, b in pairs)


@pytest.mark.parametrize("shape", [(3, 20, 30), (3, 30, 20)])
def test_experts_are_a_batch_of_matrices(shape):
    torch.manual_seed(0)
    together = nn.Parameter(torch.randn(shape))
    apart = [nn.Parameter(matrix.clone()) for matrix in together.detach()]
    options = {"rank": 5, "update_proj_gap": 2, "selection": "dominant"}
    one, many = lrk.LowRankAdamW([{"params": [together], **options}]), lrk.LowRankAdamW([{"params": apart, **options}])
    for _ in range(5):
        together.grad = torch.randn(shape)
        for parameter, grad in zip(apart, together.grad, strict=True):
            parameter.grad = grad.clone()
        one.step()
        many.step()
    assert torch.allclose(together, torch.stack(list(apart)), atol=1e-6)
    assert one.state[together]["basis"].shape == (3, 20, 5) and one.state[together]["exp_avg"].shape == (3, 5, 30)


@pytest.mark.parametrize("channels_last", [False, True])
def test_four_dimensions_are_out_by_the_rest(channels_last):
    torch.manual_seed(0)
    value = torch.randn(16, 8, 3, 3)
    convolution = nn.Parameter(value.to(memory_format=torch.channels_last) if channels_last else value.clone())
    matrix = nn.Parameter(value.reshape(16, -1).clone())
    options = {"rank": 5, "update_proj_gap": 2, "selection": "dominant"}
    optimizers = [lrk.LowRankAdamW([{"params": [parameter], **options}], lr=0.1) for parameter in (convolution, matrix)]
    for _ in range(5):
        grad = torch.randn(16, 8, 3, 3)
        convolution.grad = grad.to(memory_format=torch.channels_last) if channels_last else grad
        matrix.grad = grad.reshape(16, -1).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(convolution.reshape(16, -1), matrix, atol=1e-6)
    assert not torch.allclose(convolution, value)


def test_strided_parameters_and_gradients():
    torch.manual_seed(0)
    storage = torch.randn(30, 40)
    transposed, sliced = nn.Parameter(storage.clone().mT), nn.Parameter(torch.randn(30, 80)[:, ::2])
    plain = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in (transposed, sliced)]
    options = {"rank": 5, "selection": "dominant"}
    strided_optimizer = lrk.LowRankAdamW([{"params": [transposed, sliced], **options}])
    optimizer = lrk.LowRankAdamW([{"params": plain, **options}])
    for _ in range(3):
        for a, b in zip((transposed, sliced), plain, strict=True):
            a.grad = torch.randn(b.mT.shape).mT
            b.grad = a.grad.contiguous()
        strided_optimizer.step()
        optimizer.step()
    for a, b in zip((transposed, sliced), plain, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_dense_groups_are_torch_adamw_to_the_bit():
    torch.manual_seed(0)
    shapes = [(20, 30), (7,), ()]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes] + [nn.Parameter(torch.randn(9, 9).bfloat16())]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = dict(lr=3e-3, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.2)
    mine, adamw = lrk.LowRankAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings, fused=True)
    for step in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = None if step == 2 else torch.randn_like(a)
            b.grad = a.grad
        mine.step()
        adamw.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(mine.state[a][key], adamw.state[b][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_complex_parameters_in_a_dense_group():
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    theirs = nn.Parameter(ours.detach().clone())
    mine, adamw = lrk.LowRankAdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    for _ in range(4):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        mine.step()
        adamw.step()
    assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_reduces_the_loss(selection, dtype):
    model, optimizer = build(dtype, selection=selection, lr=2e-2)
    target = torch.randn(10, 12).to(dtype)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(100):
        x = torch.randn(64, 12, generator=generator).to(dtype)
        loss = (model(x) - x @ target.mT).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_one_step_is_the_reference_on_the_basis_it_chose():
    model, optimizer = build(lr=0.05)
    train(model, optimizer, 5)
    weight = model.layers[0].weight
    state = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in optimizer.state[weight].items()}
    before = weight.detach().double().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    formulas.adamw_step_(
        [before],
        [weight.grad.double()],
        [state["basis"]],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        lr=0.05,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.1,
        scale=0.25,
        step=6,
        right=True,
    )
    assert torch.allclose(weight.double(), before, rtol=1e-6, atol=1e-7)
    assert torch.allclose(optimizer.state[weight]["exp_avg"].double(), state["exp_avg"], rtol=1e-5, atol=1e-7)
