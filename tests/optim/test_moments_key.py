"""The key `moments`: what a refresh does to M, V and t."""

import copy

import pytest
import torch
from models import build, same_bits, train
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.backends import cpu
from lowrank_kernels.storage import eight_bit


def values(state):
    """M and V in fp64."""
    if "exp_avg_scale" in state:
        return eight_bit.decode(*(state[name] for name in (*eight_bit.MOMENTS, *eight_bit.SCALES)), torch.float64)
    return state["exp_avg"].double(), state["exp_avg_sq"].double()


def around_a_refresh(moments, shape=(8, 12), gap=3, dtype=torch.float32, **options):
    """(optimizer, parameter, its state before the step that refreshes, the gradient of that step)."""
    parameter = nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 4, "update_proj_gap": gap, "moments": moments, **options}])
    for _ in range(gap):
        parameter.grad = torch.randn(shape).to(dtype)
        optimizer.step()
    before = copy.deepcopy(optimizer.state[parameter])
    parameter.grad = torch.randn(shape).to(dtype)
    return optimizer, parameter, before, parameter.grad.double()


def advanced(m, v, basis, grad):
    r = basis.double().mT @ grad
    return 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r.square()


@pytest.mark.parametrize("options", [{}, {"shape": (3, 8, 12)}, {"dtype": torch.bfloat16}, {"state_bits": 8}], ids=str)
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_against_the_formula(moments, options):
    optimizer, parameter, before, grad = around_a_refresh(moments, **options)
    m, v = values(before)
    optimizer.step()
    state = optimizer.state[parameter]
    assert not torch.equal(state["basis"], before["basis"])
    if moments == "rotate":
        turn = state["basis"].double().mT @ before["basis"].double()
        m, v = turn @ m, turn.square() @ v
    elif moments == "reset":
        m, v = torch.zeros_like(m), torch.zeros_like(v)
    m, v = advanced(m, v, state["basis"], grad)
    tolerance = 0.02 if "state_bits" in options else 1e-2 if options.get("dtype") == torch.bfloat16 else 1e-5
    for found, exact in zip(values(state), (m, v), strict=True):
        assert (found - exact).norm() <= tolerance * exact.norm()
    assert state["step"] == (1 if moments == "reset" else 4)


@pytest.mark.parametrize("moments, shape", [("rotate", (2, 8, 12)), ("rotate", (8, 12)), ("reset", (8, 12))])
def test_a_basis_that_stays_leaves_them_as_they_are(moments, shape, monkeypatch):
    """A gradient that is not finite keeps the old basis. A basis in bf16 is not its own inverse to more than
    two digits, so that it is not turned into itself. Of two experts only the one whose basis changes is
    turned."""
    monkeypatch.setattr(cpu, "NATIVE_BF16", False)
    optimizer, parameter, before, grad = around_a_refresh(moments, shape=shape, dtype=torch.bfloat16)
    parameter.grad.view(-1)[0] = float("nan")  # spoils the first column of R
    optimizer.step()
    state = optimizer.state[parameter]
    first = 0 if len(shape) == 3 else slice(None)
    assert torch.equal(state["basis"][first], before["basis"][first]) and state["step"] == 4
    assert len(shape) == 2 or not torch.equal(state["basis"][1], before["basis"][1])
    m, v = (moment[first] for moment in values(before))
    for found, exact in zip(values(state), advanced(m, v, before["basis"][first], grad[first]), strict=True):
        assert torch.allclose(found[first][:, 1:], exact[:, 1:], rtol=1e-5, atol=1e-7)


def test_experts_start_anew_together():
    """They share one count, so an expert without a gradient, whose basis stays, is reset with the others."""
    optimizer, parameter, _, grad = around_a_refresh("reset", shape=(2, 8, 12))
    parameter.grad[0] = 0
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["step"] == 1 and not state["exp_avg"][0].any() and state["exp_avg"][1].any()


@pytest.mark.parametrize("gap", [1, 2])
def test_each_period_of_reset_rounds_by_other_bits(gap):
    """Decay by a tenth of an ulp: with the same bits in each period some elements would move each time."""
    parameter = nn.Parameter(torch.full((8, 12), 1.0, dtype=torch.bfloat16))
    group = {"params": [parameter], "rank": 2, "update_proj_gap": gap, "moments": "reset", "rounding": "stochastic", "scale": 0.0}
    optimizer = lrk.LowRankAdamW([group | {"selection": "random"}], lr=1e-3, weight_decay=0.4)
    for _ in range(60):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = (1 - parameter.float()) / 2**-8
    assert moved.std() < 5 and moved.max() < 20


def test_nothing_else_is_carried_between_refreshes():
    plain, rotated = build(update_proj_gap=100), build(update_proj_gap=100, moments="rotate")
    train(*plain, 5)
    train(*rotated, 5)
    assert same_bits(plain[0].state_dict(), rotated[0].state_dict())


@pytest.mark.parametrize("moments", ["rotate", "reset"])
@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"state_bits": 8}], ids=str)
def test_resume_is_bit_identical(moments, options):
    whole, first, second = (build(moments=moments, **options) for _ in range(3))
    train(*whole, 11)
    train(*first, 5)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    train(*second, 6, start=5)
    assert same_bits(whole[0].state_dict(), second[0].state_dict())
    assert same_bits(whole[1].state_dict(), second[1].state_dict())
