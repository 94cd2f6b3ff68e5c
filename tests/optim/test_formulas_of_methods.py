"""The trajectory of each method against its paper's formula, written out in fp64 for one matrix, without the
library's rules and lifts. FiraAdamW's is in test_fira.py, that of AdamW, GaLore and I3S in
test_formula.py."""

import math

import pytest
import torch
from torch import nn

import lowrank_kernels as lrk

SHAPES = [(12, 30), (30, 12), (2, 12, 30)]


def adafactor(r, kept, t, *, first_moment=True, decay=-0.8, threshold=1.0):
    """N from R (arXiv 1804.04235, algorithm 4, and an uncorrected first moment of that), element by
    element."""
    rows, columns = r.shape
    new = t**decay
    squares = [[r[i, j].item() ** 2 + 1e-30 for j in range(columns)] for i in range(rows)]
    kept.setdefault("rows", [0.0] * rows)
    kept.setdefault("columns", [0.0] * columns)
    kept["rows"] = [(1 - new) * old + new * sum(squares[i]) / columns for i, old in enumerate(kept["rows"])]
    kept["columns"] = [(1 - new) * old + new * sum(row[j] for row in squares) / rows for j, old in enumerate(kept["columns"])]
    mean = sum(kept["rows"]) / rows
    v = torch.tensor([[kept["rows"][i] * kept["columns"][j] / mean for j in range(columns)] for i in range(rows)], dtype=r.dtype)
    update = r / v.sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item() / threshold)
    if not first_moment:
        return update
    kept["m"] = 0.9 * kept.get("m", 0.0) + 0.1 * update
    return kept["m"]


def adam_mini(r, kept, t):
    """N from R (arXiv 2406.16793, algorithm 1): a block is a row."""
    kept["m"] = 0.9 * kept.get("m", 0.0) + 0.1 * r
    kept["v"] = [0.999 * old + 0.001 * (r[i] @ r[i]).item() / r.shape[1] for i, old in enumerate(kept.get("v", [0.0] * r.shape[0]))]
    return torch.stack([kept["m"][i] / (1 - 0.9**t) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8) for i, v in enumerate(kept["v"])])


def adamw(r, kept, t):
    kept["m"] = 0.9 * kept.get("m", 0.0) + 0.1 * r
    kept["v"] = 0.999 * kept.get("v", 0.0) + 0.001 * r * r
    return kept["m"] / (1 - 0.9**t) / ((kept["v"] / (1 - 0.999**t)).sqrt() + 1e-8)


def back_project(p, n, r, g, kept):
    return p @ n


def apollo(p, n, r, g, kept, *, whole=False):
    """D (arXiv 2412.05270, algorithm 1): the gradient times the ratio of norms. Its norm grows by at most
    1 %."""
    if whole:
        d = g * (n.norm() / r.norm())
    else:
        d = torch.stack([g[:, j] * (n[:, j].norm() / r[:, j].norm()) for j in range(g.shape[1])], 1)
    if kept.get("last") is not None and d.norm() > 1.01 * kept["last"]:
        d = d * (1.01 * kept["last"] / d.norm())
        kept["limited"] = True
    kept["last"] = d.norm()
    return d


METHODS = {
    "adafactor": (lrk.LowRankAdafactor, {}, adafactor, back_project, {}, 0.25),
    "adafactor without m": (
        lrk.LowRankAdafactor,
        {"first_moment": False, "beta2_decay": -0.5, "clip_threshold": 0.7},
        lambda r, kept, t: adafactor(r, kept, t, first_moment=False, decay=-0.5, threshold=0.7),
        back_project,
        {},
        0.25,
    ),
    "adam-mini": (lrk.LowRankAdamMini, {}, adam_mini, back_project, {}, 0.25),
    "apollo": (lrk.ApolloAdamW, {}, adamw, apollo, {}, 1.0),
    "apollo-mini": (lrk.ApolloMiniAdamW, {}, adamw, lambda *a: apollo(*a, whole=True), {"rank": 1}, math.sqrt(128)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_against_the_formula(method, shape):
    """Three steps in one basis, and three in the next. The fourth gradient is ten times larger."""
    optimizer_of, arguments, normalise, direction, keys, scale = METHODS[method]
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    group = {"params": [parameter], "rank": 4, "update_proj_gap": 3} | keys
    optimizer = optimizer_of([group], lr=0.05, weight_decay=0.1, **arguments)
    right, each = shape[-2] >= shape[-1], shape[0] if len(shape) == 3 else 1
    kept = [{} for _ in range(each)]
    for t, size in enumerate((1.0, 1.0, 1.0, 10.0, 1.0, 1.0), 1):
        parameter.grad = size * torch.randn(shape)
        before = parameter.detach().double().view(each, *shape[-2:]).clone()
        grads = parameter.grad.double().view(each, *shape[-2:])
        optimizer.step()
        bases = optimizer.state[parameter]["basis"].double()
        for i, p in enumerate(bases.view(each, *bases.shape[-2:])):
            w, g = (before[i].mT, grads[i].mT) if right else (before[i], grads[i])
            r = p.mT @ g
            expected = (1 - 0.05 * 0.1) * w - 0.05 * scale * direction(p, normalise(r, kept[i], t), r, g, kept[i])
            found = parameter.detach().double().view(each, *shape[-2:])[i]
            found = found.mT if right else found
            assert (found - expected).norm() <= 2e-5 * (expected - w).norm() + 1e-6
    assert "apollo" not in method or any("limited" in state for state in kept), "the limiter has acted"


def test_apollos_projection_is_gaussian():
    """N(0, 1/r), anew in each period, and not orthonormal."""
    parameter = nn.Parameter(torch.zeros(256, 512))
    optimizer = lrk.ApolloAdamW([{"params": [parameter], "rank": 64, "update_proj_gap": 2}], lr=0.1)
    drawn = []
    for _ in range(4):
        parameter.grad = torch.randn(256, 512)
        optimizer.step()
        drawn.append(optimizer.state[parameter]["basis"].clone())
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
    for basis in (drawn[0], drawn[2]):
        z = 8 * basis.flatten()
        assert abs(z.mean()) < 0.03 and abs(z.var() - 1) < 0.05 and abs((z**4).mean() - 3) < 0.3
    assert abs((drawn[0] * drawn[2]).sum() / drawn[0].norm() / drawn[2].norm()) < 0.04
    assert (drawn[0].mT @ drawn[0] - torch.eye(64)).norm() > 1


@pytest.mark.parametrize("growth", [1e-12, 1.0, 1e15])
def test_adafactor_takes_gradients_of_any_size(growth):
    """A direction and a column without any gradient get no update, and all others the same one."""
    parameters = [nn.Parameter(torch.zeros(8, 12)) for _ in range(2)]
    grad = torch.randn(8, 12)
    grad[3], grad[:, 5] = 0, 0
    for parameter, size in zip(parameters, (1.0, growth), strict=True):
        optimizer = lrk.LowRankAdafactor([{"params": [parameter], "rank": 8, "selection": "random"}], lr=0.1)
        parameter.grad = torch.zeros(8, 12)
        optimizer.step()  # makes the state
        optimizer.state[parameter]["basis"].copy_(torch.eye(8))
        optimizer.state[parameter]["step"].zero_()
        for name in ("row_var", "col_var"):
            optimizer.state[parameter][name].zero_()
        for _ in range(2):
            parameter.grad = size * grad
            optimizer.step()
        assert parameter.isfinite().all() and not parameter[3].any() and not parameter[:, 5].any()
    assert torch.allclose(*parameters, rtol=1e-4)
