"""A matrix whose gradients are all zero waits with its first basis for one that is not."""

import copy

import pytest
import torch
from models import same_bits
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.optim.arriving import Arriving

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"matrix": (12, 20), "experts": (3, 12, 20)}


def setup(shape, **keys):
    torch.manual_seed(0)
    param, other = (nn.Parameter(torch.randn(shape, device=DEVICE)) for _ in range(2))
    group = {"params": [param, other], "rank": 4, "update_proj_gap": 6, "scale": 1.0, **keys}
    return lrk.LowRankAdamW([group], lr=0.1, capturable=False), param, other


def run(optimizer, grads):
    """A step for each pair of gradients; the first parameter's basis after it."""
    params, seen = optimizer.param_groups[0]["params"], []
    for pair in grads:
        for param, grad in zip(params, pair, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        seen.append(optimizer.state[params[0]]["basis"].clone())
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ["dominant", "importance"])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_basis_is_chosen_from_the_first_gradient_that_is_not_zero(kind, selection):
    optimizer, param, other = setup(SHAPES[kind], selection=selection)
    zero, some = torch.zeros_like(param), [torch.randn_like(param) for _ in range(5)]
    weight = param.detach().clone()
    bases = run(optimizer, [(zero, some[0]), (zero, some[1])])
    assert not any(basis.any() for basis in bases) and torch.equal(param, weight)
    kept = optimizer.state[other]["basis"].clone()
    bases = run(optimizer, [(some[2], some[2]), (some[3], some[3])])
    gram = bases[0].mT.double() @ bases[0].double()
    assert torch.allclose(gram, torch.eye(4, dtype=torch.float64, device=DEVICE).expand_as(gram), atol=1e-5)
    assert torch.equal(bases[1], bases[0])
    assert torch.equal(optimizer.state[other]["basis"], kept), "one that has its basis keeps it"
    assert not torch.equal(param, weight)
    if selection == "dominant":
        best = torch.linalg.svd(some[2].double())[0][..., :4]
        assert (best.mT @ bases[0].double()).square().sum() > 0.95 * best[..., 0, :].numel()
    (late,) = run(optimizer, [(some[4], some[4])] * 3)[2:]
    assert not torch.equal(late, bases[0]), "its turn comes with that of the others"


@pytest.mark.gpu
def test_each_expert_waits_for_itself():
    optimizer, param, other = setup(SHAPES["experts"], selection="dominant")
    grads = torch.randn(3, *SHAPES["experts"], device=DEVICE)
    grads[:2, 1] = 0  # of this expert, in the first two steps
    first, second, third = run(optimizer, [(grad, grads[2]) for grad in grads])
    assert first[0].any() and not first[1].any() and first[2].any()
    assert torch.equal(second, first)
    assert torch.equal(third[[0, 2]], first[[0, 2]]) and third[1].any()


@pytest.mark.gpu
def test_random_bases_wait_for_nothing():
    optimizer, param, _ = setup(SHAPES["matrix"], selection="random")
    (basis,) = run(optimizer, [(torch.zeros_like(param), torch.zeros_like(param))])
    assert basis.any()


@pytest.mark.gpu
def test_a_zero_gradient_later_keeps_the_basis():
    optimizer, param, _ = setup(SHAPES["matrix"])
    some = torch.randn_like(param)
    bases = run(optimizer, [(some, some)] * 6 + [(torch.zeros_like(param), some)])
    assert torch.equal(bases[6], bases[0])


def test_the_first_basis_captures_what_it_should():
    """A head of zeros makes every gradient before it zero once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Tanh(), nn.Linear(24, 10, bias=False))
    nn.init.zeros_(model[2].weight)
    optimizer = lrk.GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}], lr=1e-2)
    x, y = torch.randn(64, 16), torch.randn(64, 10)
    captured = []
    for _ in range(6):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        grad, basis = model[0].weight.grad, optimizer.state[model[0].weight]["basis"]
        captured.append(((basis.mT @ grad.mT).norm() / grad.norm().clamp_min(1e-30)).item())
    assert captured[0] == 0 and min(captured[1:]) > 0.6, captured


def test_resume_while_waiting():
    def grads(param):
        generator = torch.Generator().manual_seed(1)
        some = [torch.randn(param.shape, generator=generator) for _ in range(3)]
        return [(torch.zeros_like(param), some[0]), (torch.zeros_like(param), some[1]), (some[2], some[2])]

    whole, param, _ = setup(SHAPES["matrix"])
    run(whole, grads(param))
    part, param, _ = setup(SHAPES["matrix"])
    run(part, grads(param)[:2])
    resumed, again, _ = setup(SHAPES["matrix"])
    for new, old in zip(resumed.param_groups[0]["params"], part.param_groups[0]["params"], strict=True):
        new.data.copy_(old)
    resumed.load_state_dict(copy.deepcopy(part.state_dict()))
    run(resumed, grads(param)[2:])
    assert same_bits(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("delay", [1, 3, 100])
def test_how_late_the_host_learns_of_it_changes_nothing(monkeypatch, kind, delay):
    """As on a GPU, where flags arrive later, and the device alone decides which bases are taken."""

    def outcome():
        optimizer, param, _ = setup(SHAPES[kind])
        generator = torch.Generator().manual_seed(1)
        grads = [[torch.randn(SHAPES[kind], generator=generator) for _ in range(2)] for _ in range(9)]
        grads[0][0].zero_(), grads[1][0].zero_()
        if kind == "experts":
            grads[2][0][1] = 0
        run(optimizer, grads)
        return optimizer.state_dict(), param.detach().clone()

    at_once = outcome()
    asked = []

    class Late(Arriving):
        def __init__(self, values):
            super().__init__(values)
            self.questions = []
            asked.append(self.questions)

        def has_arrived(self):
            self.questions.append(None)
            return len(self.questions) > delay

    monkeypatch.setattr(lrk.optim.waiting, "Arriving", Late)
    monkeypatch.setattr(lrk.optim.optimizer, "HOST", ())
    assert same_bits(outcome(), at_once) and len(asked[0]) > 1
