"""FiraAdamW against its formula, written out in fp64; the limiter; what it keeps and resumes."""

import copy

import pytest
import torch
from models import build, same_bits, train
from torch import nn

import lowrank_kernels as lrk


def fira_step(w, g, p, m, v, last, t, *, lr, scale, wd, right, eps=1e-8):
    """One matrix, in fp64: the new W, and ‖φS‖ after the limiter."""
    w, g = (w.mT, g.mT) if right else (w, g)
    r = p.mT @ g
    m.mul_(0.9).add_(0.1 * r)
    v.mul_(0.999).add_(0.001 * r.square())
    n = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps)
    phi_s = (g - p @ r) * (n.norm(dim=0) / r.norm(dim=0))
    norm = phi_s.norm()
    if last is not None and norm > 1.01 * last:
        phi_s, norm = phi_s * (1.01 * last / norm), 1.01 * last
    w = (1 - lr * wd) * w - lr * scale * (p @ n + phi_s)
    return (w.mT if right else w), norm


@pytest.mark.parametrize("selection", ["dominant", "importance"])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (2, 12, 30)], ids=str)
def test_against_the_formula(shape, selection):
    """Gradients of which little lies outside of the basis, then much, so that the limiter acts, then little
    again, so that it does not."""
    parameter = nn.Parameter(torch.randn(shape))
    group = {"params": [parameter], "rank": 4, "selection": selection}
    optimizer = lrk.FiraAdamW([group], lr=0.05, weight_decay=0.1)
    right, each = shape[-2] >= shape[-1], shape[0] if len(shape) == 3 else 1
    n = max(shape[-2:])
    moments = [(torch.zeros(4, n).double(), torch.zeros(4, n).double()) for _ in range(each)]
    last, limited = [None] * each, 0
    low_rank = torch.randn(*shape[:-1], 4) @ torch.randn(*shape[:-2], 4, shape[-1])
    for t, noise in enumerate((0.03, 1.0, 10.0, 0.03, 1.0), 1):
        parameter.grad = low_rank + noise * torch.randn(shape)
        before = parameter.detach().double().view(each, *shape[-2:]).clone()
        grads = parameter.grad.double().view(each, *shape[-2:])
        optimizer.step()
        bases = optimizer.state[parameter]["basis"].double().view(each, *optimizer.state[parameter]["basis"].shape[-2:])
        norms = optimizer.state[parameter]["residual_norm"].view(each)
        for i in range(each):
            expected, norm = fira_step(before[i], grads[i], bases[i], *moments[i], last[i], t, lr=0.05, scale=0.25, wd=0.1, right=right)
            found = parameter.detach().double().view(each, *shape[-2:])[i]
            assert (found - expected).norm() <= 1e-5 * (expected - before[i]).norm() + 1e-6
            assert abs(norms[i] - norm) <= 1e-4 * norm
            limited += last[i] is not None and norm == 1.01 * last[i]
            last[i] = norm
    assert limited, "the limiter has acted"


def test_a_full_basis_leaves_nothing_over():
    """P square: S = 0, which is AdamW in that basis."""
    parameters = [nn.Parameter(torch.ones(8, 12)) for _ in range(2)]
    options = {"rank": 8, "selection": "dominant"}
    optimizers = [cls([{"params": [p], **options}], lr=0.1) for cls, p in zip((lrk.FiraAdamW, lrk.LowRankAdamW), parameters, strict=True)]
    for _ in range(4):
        grad = torch.randn(8, 12)
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    assert torch.allclose(*parameters, atol=1e-5)


def test_zero_gradients_make_no_nan_and_lift_the_limit():
    parameter = nn.Parameter(torch.ones(8, 12))
    optimizer = lrk.FiraAdamW([{"params": [parameter], "rank": 2}], lr=0.1)
    for size in (1.0, 0.0, 1.0):
        parameter.grad = size * torch.randn(8, 12)
        optimizer.step()
        assert parameter.isfinite().all()
    assert optimizer.state[parameter]["residual_norm"] > 0


@pytest.mark.parametrize("save_at", [1, 5])
def test_resume_is_bit_identical(save_at):
    whole = build(optimizer=lrk.FiraAdamW)
    train(*whole, 9)
    first, second = build(optimizer=lrk.FiraAdamW), build(optimizer=lrk.FiraAdamW)
    train(*first, save_at)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    train(*second, 9 - save_at, start=save_at)
    assert same_bits(whole[0].state_dict(), second[0].state_dict())
    assert same_bits(whole[1].state_dict(), second[1].state_dict())


def test_a_skipped_step_leaves_every_bit(monkeypatch):
    """Where the host does not look at found_inf, as on a GPU."""
    model, optimizer = build(optimizer=lrk.FiraAdamW)
    train(model, optimizer, 2)
    monkeypatch.setattr(lrk.optim.optimizer, "HOST", ())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert same_bits(before, (model.state_dict(), optimizer.state_dict()["state"]))


def test_what_it_stands_for():
    parameter = nn.Parameter(torch.ones(8, 12))
    assert lrk.FiraAdamW([{"params": [parameter], "rank": 2}]).param_groups[0]["selection"] == "dominant"
    with pytest.raises(ValueError, match="lift is 'back_projection' but this optimizer's is 'residual'"):
        lrk.FiraAdamW([{"params": [parameter], "rank": 2, "lift": "back_projection"}])
    plain = lrk.LowRankAdamW([{"params": [parameter], "rank": 2}])
    parameter.grad = torch.randn(8, 12)
    plain.step()
    plain.param_groups[0]["lift"] = "residual"
    with pytest.raises(ValueError, match="the state has no residual_norm, which the group's method needs, with lift='residual'"):
        plain.step()
