"""Matrices of sharded parameters whose gradients are zero wait with their first bases, in all processes
alike."""

import pytest
import runs
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lowrank_kernels as lrk
from benchmarks import scale

SHAPE, RANK, IDLE_UNTIL = (3, 12, 20), 3, 3
"""Of three experts the middle one has no gradient before that step."""
STEPS, OVERFLOW = 8, (0, 3, 5)
"""Steps in which one process meets an infinite gradient; one of them is that of the middle expert's first
gradient."""
CLOSE = 1e-12
"""Of weights of size 1 in fp64. A wrong step is off by 1e-3 at least."""


def gradient_of(step):
    grad = runs.gradient(SHAPE, 0, step, torch.float64)
    grad[1] *= step >= IDLE_UNTIL
    return grad


def train(place, scaled, **options):
    """The weights, the bytes that each step sent, and in which steps the weights moved."""
    torch.manual_seed(0)
    start = torch.randn(SHAPE, dtype=torch.float64)
    param = torch.nn.Parameter(start if place is None else runs.spread(start, *place))
    optimizer = lrk.I3SAdamW([dict(params=[param], rank=RANK, update_proj_gap=20) | options], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000, enabled=scaled)
    sent, moved = [], []
    for step in range(STEPS):
        grad = scaler.scale(gradient_of(step).flatten()).view(SHAPE)
        param.grad = grad.clone() if place is None else runs.spread(grad, *place)
        here = param.grad if place is None else param.grad.to_local()
        if scaled and step in OVERFLOW and (place is None or dist.get_rank() == 0):
            here[(0,) * 3] = torch.inf
        before = runs.whole(param).detach().clone()
        with scale.Counted() as counted:
            scaler.step(optimizer)
        scaler.update()
        sent.append(counted.given.get("all_to_all", 0))
        moved.append(not torch.equal(before, runs.whole(param)))
    return runs.whole(param).detach(), sent, moved, optimizer.diagnostics()


def non_finite_in_one_part():
    """Tensor parallelism with an ordinary parameter that each process has whole: the scaler of a process
    whose own R is finite skips the step as well."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(12, 8, bias=False), "norm": torch.nn.LayerNorm(4)})
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), {"linear": ColwiseParallel()})
    groups = [dict(params=[model["linear"].weight], rank=3), dict(params=list(model["norm"].parameters()))]
    optimizer = lrk.GaLoreAdamW(groups, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    lrk.in_backward(model, optimizer, scaler=scaler)
    moved = []
    for step in range(4):
        factor = torch.inf if step == 2 and dist.get_rank() == 0 else 1.0
        part = model["linear"](torch.randn(5, 12, generator=torch.Generator().manual_seed(step)))
        ordinary = model["norm"](torch.ones(4))
        scaler.scale((part.square() * factor).sum() + ordinary.sum()).backward()
        before = model["linear"].weight.to_local().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not torch.equal(before, model["linear"].weight.to_local()))
    return moved


def settings_that_differ():
    """Diagnostics decide what a refresh sends."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = torch.nn.Parameter(runs.spread(torch.ones(8, 6), mesh, [Shard(0)]))
    optimizer = lrk.GaLoreAdamW([dict(params=[param], rank=2, diagnostics=dist.get_rank() == 0)], lr=1e-2)
    param.grad = runs.spread(torch.ones(8, 6), mesh, [Shard(0)])
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return None


def process():
    found = {"non-finite": non_finite_in_one_part(), "settings": settings_that_differ()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dim in range(3):
        for scaled in (False, True):
            found[dim, scaled] = train((mesh, [Shard(dim)]), scaled)
        found[dim, "diagnostics"] = train((mesh, [Shard(dim)]), False, diagnostics=True)
    return found


@pytest.fixture
def found(two):
    return [each["waiting"] for each in two]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dim", range(3))
def test_an_expert_that_waits_is_that_of_one_process(found, dim, scaled):
    weights, _, moved, _ = train(None, scaled)
    assert moved == [not scaled or step not in OVERFLOW for step in range(STEPS)]
    for each in found:
        assert (each[dim, scaled][0] - weights).abs().max() < CLOSE
        assert each[dim, scaled][2] == moved


@pytest.mark.parametrize("dim", [1, 2])
def test_only_matrices_that_wait_are_gathered(found, dim):
    """A process sends its half of each gradient, and the bases that it has chosen. In later steps the middle
    expert alone waits."""
    gradient, basis = 8 * 12 * 20 // 2, 8 * 12 * RANK
    one = [sum(each[dim, False][1][step] for each in found) for step in range(STEPS)]
    of_all = 3 * (2 * gradient + basis)
    assert one[0] == of_all and one[1:4] == [of_all // 3] * 3 and one[4:] == [0] * 4


@pytest.mark.parametrize("dim", range(3))
def test_what_a_waiting_refresh_has_found(found, dim):
    """The figures of the experts that did not wait are those of their own refresh."""
    expected = {row["expert"]: row for row in train(None, False, diagnostics=True)[3]}
    rows = {row["expert"]: row for each in found for row in each[dim, "diagnostics"][3]}
    assert expected.keys() == rows.keys() == {0, 1, 2}
    for expert, row in rows.items():
        for key in ("captured_energy", "effective_rank"):
            assert row[key] == pytest.approx(expected[expert][key], rel=1e-5)


def test_a_scaler_skips_a_step_for_what_another_process_has_found(found):
    assert [each["non-finite"] for each in found] == [[True, True, False, True]] * 2


def test_processes_with_other_diagnostics_are_refused(found):
    assert all("settings of subspaces differ" in (each["settings"] or "") for each in found)
