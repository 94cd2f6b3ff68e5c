"""Two processes over gloo: draws that differ are refused, ZeroRedundancyOptimizer gives what one process
does, FSDP1 is refused by name."""

import gloo
import pytest
import torch
from models import Net, batch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import lowrank_kernels as lrk

RANKS = 2
OPTIONS = dict(rank=4, update_proj_gap=2)


def low_rank(seed=0, **options):
    torch.manual_seed(0)
    model = Net()
    return model, lrk.LowRankAdamW(lrk.param_groups(model, seed=seed, **(OPTIONS | options)), lr=1e-2)


def rso(seed=0, inner_steps=3, distribution="gaussian"):
    torch.manual_seed(0)
    model = lrk.to_subspace(Net(), rank=3, seed=seed, distribution=distribution)
    return model, lrk.RSOAdamW(model.parameters(), lr=1e-2, inner_steps=inner_steps)


def train(parallel, optimizer, steps=5):
    for step in range(steps):
        x, y = batch(step)
        (parallel(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def outcome(build, **options):
    """Of a few steps under DistributedDataParallel: the weights, or what was raised and whether any weight
    had moved by then."""
    model, optimizer = build(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        train(DistributedDataParallel(model), optimizer)
    except RuntimeError as error:
        return str(error), all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return model.state_dict(), None


def under_zero():
    torch.manual_seed(0)
    model = Net()
    groups = lrk.param_groups(model, selection="importance", **OPTIONS)
    parallel = DistributedDataParallel(model)
    train(parallel, ZeroRedundancyOptimizer(groups, optimizer_class=lrk.LowRankAdamW, lr=1e-2))
    return model.state_dict()


def raised(function):
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return None, "nothing"


def halves(step):
    """What each of two processes reads."""
    x, y = batch(step)
    return list(zip(x.chunk(RANKS), y.chunk(RANKS), strict=True))


def principal(rank):
    """The weights, and the principal directions of one layer, after redraws whose inputs both processes
    saw."""
    model, optimizer = rso(distribution="principal", inner_steps=2)
    parallel = DistributedDataParallel(model)
    for step in range(7):
        x, y = halves(step)[rank]
        (parallel(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), model.up.subspace.principal


def principal_of_other_layers(rank):
    layer = lrk.SubspaceLinear(6, 5 + rank, rank=2, distribution="principal")
    optimizer = lrk.RSOAdamW(layer.parameters())
    layer(torch.randn(3, 6)).sum().backward()
    return raised(optimizer.step)


def rso_under_zero():
    model = lrk.to_subspace(nn.Sequential(nn.Linear(6, 5, bias=False)), rank=2)
    ZeroRedundancyOptimizer(list(model.parameters()), optimizer_class=lrk.RSOAdamW)


def under_fsdp(method):
    """Wrapped before the optimizer is built, and after it."""
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        model = Net()
        if method == "rso":
            lrk.to_subspace(model, rank=3)
        groups = lrk.param_groups(model, **OPTIONS) if method == "low-rank" else model.parameters()
        optimizer = lrk.LowRankAdamW if method == "low-rank" else lrk.RSOAdamW
        built = optimizer(groups) if late else None
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        before = [p.detach().clone() for p in wrapped.parameters()]
        if not late:
            groups = [{"params": list(wrapped.parameters()), "rank": 2}] if method == "low-rank" else wrapped.parameters()
            found.append((*raised(lambda: optimizer(groups)), True))  # noqa: B023
            continue

        def step():
            for param in wrapped.parameters():  # noqa: B023
                param.grad = torch.ones_like(param)
            built.step()  # noqa: B023

        found.append((*raised(step), all(torch.equal(a, b) for a, b in zip(before, wrapped.parameters(), strict=True))))
    return found


def uneven(rank):
    """The second process has no projected matrix: none at all, or under ZeroRedundancyOptimizer none of its
    own."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
    alone = lrk.LowRankAdamW([{"params": [weight], "rank": 2}] if rank == 0 else [bias])
    zero = ZeroRedundancyOptimizer([{"params": [weight], "rank": 2}], optimizer_class=lrk.LowRankAdamW)
    weight.grad, bias.grad = torch.ones(6, 8), torch.ones(6)
    alone.step()
    if rank:
        weight.data.copy_(torch.randn(6, 8))  # which the other one's step under ZeRO overwrites
    zero.step()
    return weight.detach().clone()


def process(rank):
    return {
        "same": outcome(low_rank),
        "other seeds": outcome(low_rank, seed=rank),
        "other gaps": outcome(low_rank, update_proj_gap=2 + rank),
        "rso": outcome(rso),
        "rso, other seeds": outcome(rso, seed=rank),
        "rso, other inner steps": outcome(rso, inner_steps=3 + rank),
        "zero": under_zero(),
        "uneven": uneven(rank),
        "principal": principal(rank),
        "principal, other layers": principal_of_other_layers(rank),
        "rso under zero": raised(rso_under_zero),
        "low-rank under FSDP": under_fsdp("low-rank"),
        "rso under FSDP": under_fsdp("rso"),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process saw."""
    return gloo.results(process, tmp_path_factory.mktemp("processes"), RANKS)


def test_a_process_without_a_matrix_does_not_keep_the_others_waiting(found):
    assert torch.equal(found[0]["uneven"], found[1]["uneven"])


@pytest.mark.parametrize("case", ["same", "rso"])
def test_equal_settings_train_as_one_process(found, case):
    model, optimizer = (low_rank if case == "same" else rso)()
    train(model, optimizer)
    for rank in range(RANKS):
        assert all(torch.allclose(found[rank][case][0][name], value, atol=1e-5) for name, value in model.state_dict().items())
    assert all(torch.equal(found[0][case][0][name], found[1][case][0][name]) for name in model.state_dict())


def test_principal_directions_are_those_of_all_processes_inputs(found):
    model, optimizer = rso(distribution="principal", inner_steps=2)
    for step in range(7):
        for x, y in halves(step):
            ((model(x) - y).square().mean() / RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(RANKS):
        weights, directions = found[rank]["principal"]
        assert (
            torch.equal(directions, found[0]["principal"][1]) and lrk.subspace_overlap(directions, model.up.subspace.principal) > 1 - 1e-4
        )
        for name, value in model.state_dict().items():
            assert torch.allclose(weights[name], value, atol=1e-4) and torch.equal(weights[name], found[0]["principal"][0][name]), name
        kind, message = found[rank]["principal, other layers"]
        assert kind == "RuntimeError" and "distribution='principal' adds up the sketches of all processes" in message


@pytest.mark.parametrize("case", ["other seeds", "other gaps", "rso, other seeds", "rso, other inner steps"])
def test_settings_that_differ_between_processes_are_refused(found, case):
    for rank in range(RANKS):
        message, untouched = found[rank][case]
        assert "processes 0 and 1 have the same parameters, but their seeds or other settings of subspaces differ" in message
        assert untouched


def test_zero_redundancy_gives_what_one_process_gives(found):
    torch.manual_seed(0)
    model = Net()
    train(model, lrk.LowRankAdamW(lrk.param_groups(model, selection="importance", **OPTIONS), lr=1e-2))
    for rank in range(RANKS):
        for name, value in model.state_dict().items():
            assert torch.allclose(found[rank]["zero"][name], value, atol=1e-5), name


def test_rso_under_zero_redundancy_is_told_that_it_cannot_work(found):
    assert any("ZeroRedundancyOptimizer" in found[rank]["rso under zero"][1] for rank in range(RANKS))


@pytest.mark.parametrize("method", ["low-rank", "rso"])
def test_fsdp_is_refused_by_its_name_before_anything_moves(found, method):
    for rank in range(RANKS):
        for kind, message, untouched in found[rank][f"{method} under FSDP"]:
            assert kind in ("TypeError", "RuntimeError", "ValueError") and "FullyShardedDataParallel (FSDP1)" in message, message
            assert untouched
