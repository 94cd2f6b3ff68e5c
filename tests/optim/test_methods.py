"""What every method that projects gradients does alike: resuming, skipped steps, missing gradients, experts,
sides, dtypes, moments in a new basis and in 8 bits."""

import copy

import pytest
import torch
from models import METHODS, batch, same_bits, through_a_file, train
from torch import nn

from lowrank_kernels import backends
from lowrank_kernels.backends import foreach
from lowrank_kernels.optim import refreshes
from lowrank_kernels.rules import Rule

pytestmark = pytest.mark.parametrize("method", METHODS)
HAS_CODES = [name for name in METHODS if name != "LowRankAdafactor without M"]


@pytest.mark.parametrize(
    "options", [{}, {"state_bits": 8}, {"dtype": torch.bfloat16, "rounding": "stochastic"}, {"stagger": True}], ids=str
)
@pytest.mark.parametrize("save_at", [3, 8])  # within a period, and just before a refresh (gap 4)
def test_resume_is_bit_identical(method, options, save_at):
    if "state_bits" in options and method not in HAS_CODES:
        pytest.skip("nothing to code")
    straight, optimizer = METHODS[method](**options)
    losses = train(straight, optimizer, 13)
    stopped, optimizer_before = METHODS[method](**options)
    train(stopped, optimizer_before, save_at)
    file = through_a_file({"model": stopped.state_dict(), "optimizer": optimizer_before.state_dict()})
    resumed, optimizer_after = METHODS[method](**options)
    resumed.load_state_dict(file["model"])
    optimizer_after.load_state_dict(file["optimizer"])
    assert train(resumed, optimizer_after, 13 - save_at, start=save_at) == losses[save_at:]
    assert same_bits(straight.state_dict(), resumed.state_dict())
    assert same_bits(optimizer.state_dict(), optimizer_after.state_dict())


def test_it_trains(method):
    model, optimizer = METHODS[method](lr=1e-2, weight_decay=0.0)
    x, y = batch(0)
    losses = []
    for _ in range(120):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_states_are_tensors_and_numbers_in_fp32(method):
    model, optimizer = METHODS[method](dtype=torch.bfloat16)
    train(model, optimizer, 2)
    for state in optimizer.state.values():
        for key, value in state.items():
            assert isinstance(value, (torch.Tensor, int)), key
            if isinstance(value, torch.Tensor) and "basis" in state:
                assert value.dtype == (torch.bfloat16 if key == "basis" else torch.float32), key


def test_a_skipped_step_changes_nothing(method):
    model, optimizer = METHODS[method]()
    train(model, optimizer, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    x, y = batch(3)
    scaler.scale((model(x) - y).square().mean()).backward()
    model.up.weight.grad[0, 0] = float("inf")
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    scaler.step(optimizer)
    assert same_bits(before[0], model.state_dict()) and same_bits(before[1], optimizer.state_dict())


def test_a_scaler_changes_nothing_else(method):
    plain, scaled = METHODS[method](), METHODS[method]()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert train(*plain, 6) == train(*scaled, 6, scaler=scaler)
    assert same_bits(plain[0].state_dict(), scaled[0].state_dict())


def test_a_parameter_without_a_gradient_stays(method):
    model, optimizer = METHODS[method]()
    train(model, optimizer, 3)
    skipped = model.layers[1].weight
    before = copy.deepcopy(optimizer.state[skipped]), skipped.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    skipped.grad = None
    optimizer.step()
    assert same_bits(before[0], optimizer.state[skipped]) and torch.equal(before[1], skipped)
    assert optimizer.state[model.layers[0].weight]["step"] == 4


def one_group(method, parameters, **keys):
    """The method's optimizer, on these parameters alone."""
    _, optimizer = METHODS[method](rank=1 if "Mini" in method and "Apollo" in method else 3, update_proj_gap=2, **keys)
    own = next(group for group in optimizer.param_groups if "rank" in group)
    return type(optimizer)([{**{key: own[key] for key in own if key not in ("params", "param_names")}, "params": parameters}])


def same_basis_for_all(grads, previous, *, rank, right, dtype, refresh_number, **settings):
    generator = torch.Generator().manual_seed(refresh_number)
    basis = torch.linalg.qr(torch.randn(min(grads[0].shape), rank, generator=generator))[0]
    return [basis.to(dtype) for _ in grads]


def test_experts_are_matrices_of_their_own(method, monkeypatch):
    monkeypatch.setattr(refreshes.ops, "choose_bases", same_basis_for_all)
    whole = nn.Parameter(torch.randn(3, 8, 20))
    apart = [nn.Parameter(matrix.clone()) for matrix in whole.detach().unbind()]
    together, each = one_group(method, [whole]), one_group(method, apart)
    for _ in range(5):
        whole.grad = torch.randn(3, 8, 20)
        for parameter, grad in zip(apart, whole.grad.unbind(), strict=True):
            parameter.grad = grad.clone()
        together.step()
        each.step()
    assert torch.allclose(torch.stack(apart), whole, rtol=1e-5, atol=1e-6)
    for key, value in together.state[whole].items():
        if isinstance(value, torch.Tensor) and key != "step":
            assert torch.allclose(torch.stack([each.state[parameter][key] for parameter in apart]), value, rtol=1e-4, atol=1e-7), key


def test_the_right_side_is_the_left_one_of_the_transpose(method, monkeypatch):
    monkeypatch.setattr(refreshes.ops, "choose_bases", same_basis_for_all)
    left = nn.Parameter(torch.randn(8, 20))
    right = nn.Parameter(left.detach().mT.contiguous())
    pair = [one_group(method, [parameter]) for parameter in (left, right)]
    for _ in range(5):
        left.grad = torch.randn(8, 20)
        right.grad = left.grad.mT.contiguous()
        for each in pair:
            each.step()
    assert torch.allclose(left, right.mT, rtol=1e-5, atol=1e-6)
    for key, value in pair[0].state[left].items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value, pair[1].state[right][key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_moments_in_a_new_basis(method, moments):
    model, optimizer = METHODS[method](moments="reset")
    group = next(group for group in optimizer.param_groups if "rank" in group)
    if moments == "rotate" and group["selection"] == "gaussian":
        with pytest.raises(ValueError, match="moments='rotate' needs orthonormal bases, which selection='gaussian' does not draw .group 1"):
            METHODS[method](moments="rotate")
        return
    model, optimizer = METHODS[method](moments=moments)
    assert type(optimizer._rule(group)).rotate is not Rule.rotate
    train(model, optimizer, 4)
    before = copy.deepcopy(optimizer.state[model.up.weight])
    train(model, optimizer, 1, start=4)  # the refresh
    state = optimizer.state[model.up.weight]
    assert not torch.equal(before["basis"], state["basis"]) and state["step"] == (5 if moments == "rotate" else 1)
    train(model, optimizer, 8, start=5)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_rotated_second_moment_keeps_its_total(method):
    """An orthogonal turn keeps ΣV of AdamW's V and of what stands for it, and −1 and swaps change no size."""
    _, optimizer = METHODS[method]()
    rule = optimizer._rule(next(group for group in optimizer.param_groups if "rank" in group))
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "beta2_decay": -0.8, "clip_threshold": 1.0}
    state = {name: torch.zeros(shape).double() for name, shape in rule.state(4, 10).items()}
    for step in range(1, 4):
        rule.update(torch.randn(4, 10).double(), state, step, **{key: options[key] for key in rule.keys})

    def second(kept):
        if "col_var" in kept:
            return kept["row_var"] * kept["col_var"] / kept["row_var"].mean()
        return kept["exp_avg_sq"] if "exp_avg_sq" in kept else kept["row_var"].expand(4, 10) / 10

    before = {name: tensor.clone() for name, tensor in state.items()}
    turn = torch.eye(4).double()[[2, 0, 3, 1]] * torch.tensor([1.0, -1, 1, -1])[:, None]
    rule.rotate(state, turn)
    assert torch.allclose(second(state), second(before)[[2, 0, 3, 1]])
    if "exp_avg" in state:
        assert torch.allclose(state["exp_avg"], turn @ before["exp_avg"])
    any_turn = torch.linalg.qr(torch.randn(4, 4).double())[0]
    rule.rotate(state, any_turn)
    assert torch.allclose(second(state), any_turn.square() @ second(before)[[2, 0, 3, 1]])
    fresh = {name: torch.zeros(shape) for name, shape in rule.state(4, 10).items()}
    rule.rotate(fresh, turn.float())
    assert all(not tensor.any() for tensor in fresh.values())


def test_8_bits(method):
    if method not in HAS_CODES:
        with pytest.raises(ValueError, match="state_bits=8 codes exp_avg and exp_avg_sq, and this rule keeps row_var, col_var.*group 1"):
            METHODS[method](state_bits=8)
        return
    (model, coded), (plain_model, plain) = METHODS[method](state_bits=8), METHODS[method]()
    losses, plain_losses = train(model, coded, 12), train(plain_model, plain, 12)
    assert losses != plain_losses and abs(losses[-1] - plain_losses[-1]) < 0.05 * plain_losses[-1]
    state, plain_state = coded.state[model.up.weight], plain.state[plain_model.up.weight]
    for key in plain_state:
        coded_one = key in ("exp_avg", "exp_avg_sq")
        assert not coded_one or (state[key].dtype == torch.uint8 and state[f"{key}_scale"].dtype == torch.float32)
        assert coded_one or getattr(state[key], "dtype", int) == getattr(plain_state[key], "dtype", int)


def test_in_batches_it_is_what_it_is_one_after_the_other(method, monkeypatch):
    """As on a GPU, where rules without a kernel run on batches."""
    (model, optimizer), (other, plain) = METHODS[method](), METHODS[method]()
    monkeypatch.setattr(backends, "backend_of", lambda bucket: backends.REFERENCE)
    train(other, plain, 6)
    batched = backends.Backend(any_rule=foreach.batched)
    monkeypatch.setattr(backends, "backend_of", lambda bucket: batched)
    train(model, optimizer, 6)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
