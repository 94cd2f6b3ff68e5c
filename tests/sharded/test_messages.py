"""What sharded steps and refreshes send, by formula; and what is refused."""

import re
from unittest import mock

import pytest
import runs
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import lowrank_kernels as lrk
from benchmarks import scale

RANKS, RANK = 2, 4


def sent(shape, placement, dtype=torch.float32, count=3, steps=2, **options):
    """Of a refresh with its step, and of a step without."""
    mesh = init_device_mesh("cpu", (RANKS,))
    params = [torch.nn.Parameter(runs.spread(torch.randn(shape, dtype=dtype), mesh, [placement])) for _ in range(count)]
    optimizer = lrk.LowRankAdamW([dict(params=params, rank=RANK, update_proj_gap=2) | options], lr=1e-2)
    found = []
    for number in range(1 + steps):
        for index, param in enumerate(params):
            param.grad = runs.spread(runs.gradient(shape, index, number, dtype), mesh, [placement])
        with scale.Counted() as counted:
            optimizer.step()
        found.append(dict(counted.given))
    return found[1:]  # the first step compares the processes' settings


def fp32_is_exact():
    """Sums of the same products in the same order: a process's columns of R and of P·N are those of the whole
    matrices, bit for bit."""
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    weights = [torch.randn(256, 128) for _ in range(2)]
    found = []
    for place in (None, (mesh, [Shard(0)])):
        params = [torch.nn.Parameter(weight.clone() if place is None else runs.spread(weight, *place)) for weight in weights]
        optimizer = lrk.I3SAdamW([dict(params=params, rank=32, update_proj_gap=4)], lr=1e-2)
        for number in range(10):
            runs.step(params, optimizer, number, torch.float32, place)
        found.append([runs.whole(param) for param in params])
    return all(map(torch.equal, *found))


def refusals():
    mesh = init_device_mesh("cpu", (1, RANKS))
    weight = torch.randn(8, 6)
    conv = torch.randn(8, 6, 3, 3)
    found = {}
    for name, local, placements in (
        ("two cuts", weight, [Shard(0), Shard(1)]),
        ("FSDP2 over TP", weight, [_StridedShard(0, split_factor=2), Replicate()]),
        ("convolution", conv, [Replicate(), Shard(1)]),
    ):
        param = torch.nn.Parameter(DTensor.from_local(local, mesh, placements, run_check=False))
        found[name] = message(lambda param=param: lrk.I3SAdamW([dict(params=[param], rank=2)]))
    param = torch.nn.Parameter(DTensor.from_local(weight, mesh, [Replicate(), Shard(0)], run_check=False))
    held = vars(param.device_mesh)  # torch 2.9 keeps the type in the mesh, later ones compute it
    with mock.patch.dict(held, device_type="cuda") if "device_type" in held else mock.patch.object(DeviceMesh, "device_type", "cuda"):
        found["offload"] = message(lambda: lrk.I3SAdamW([dict(params=[param], rank=2)]))
    found["mesh"] = loaded_from_another_mesh(weight)
    found["flat"] = message(lambda: lrk.I3SAdamW([dict(params=[torch.nn.Parameter(torch.randn(48))], rank=2)]))
    zero3 = torch.nn.Parameter(torch.randn(8, 6))
    zero3.ds_id = 0
    found["ZeRO-3"] = message(lambda: lrk.I3SAdamW([dict(params=[zero3], rank=2)]))
    return found


def columns_that_a_lift_sees():
    """n of the bucket that a kernel gets after R came in a piece, as from in_backward."""
    from lowrank_kernels import backends
    from lowrank_kernels.backends import Bucket
    from lowrank_kernels.sharded import sharding_of
    from lowrank_kernels.sharded.step import overlapped, step

    mesh = init_device_mesh("cpu", (RANKS,))
    param = torch.nn.Parameter(runs.spread(torch.randn(16, 24), mesh, [Shard(0)]))
    optimizer = lrk.I3SAdamW([dict(params=[param], rank=RANK)])
    piece = [torch.randn(RANK, 24 // RANKS)]
    states = {name: [torch.zeros(RANK, 24 // RANKS)] for name in ("exp_avg", "exp_avg_sq")}
    bucket = Bucket([param.to_local().detach()], [torch.randn(8, RANK)], states, [torch.zeros(())], right=False, projected=piece)
    with mock.patch.object(backends, "lift", side_effect=backends.lift) as lift:
        overlapped([step(bucket, optimizer._hyper(optimizer.param_groups[0]), sharding_of(param), 24)])
    return lift.call_args.args[0].extents[1]


def loaded_from_another_mesh(weight):
    """A refused checkpoint leaves the optimizer as it was."""
    optimizers = []
    for mesh, placements in (
        (init_device_mesh("cpu", (RANKS,)), [Shard(0)]),
        (init_device_mesh("cpu", (1, RANKS)), [Replicate(), Shard(0)]),
    ):
        param = torch.nn.Parameter(runs.spread(weight, mesh, placements))
        optimizers.append(lrk.I3SAdamW([dict(params=[param], rank=2)]))
        param.grad = runs.spread(torch.randn(8, 6), mesh, placements)
        optimizers[-1].step()
    one, other = optimizers
    before = dict(other.state[param])
    said = message(lambda: other.load_state_dict(one.state_dict()))
    return said if all(other.state[param][key] is value for key, value in before.items()) else None


def message(function):
    try:
        function()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def process():
    return {
        "along n": sent((24, 16), Shard(0)),
        "along m": sent((16, 24), Shard(0)),
        "along m, uneven": sent((16, 25), Shard(0)),
        "along m, unsharded": sent((16, 24), Shard(0), proj_type="unsharded"),
        "random": sent((24, 16), Shard(0), selection="random"),
        "experts": sent((4, 16, 24), Shard(0), count=1),
        "columns": columns_that_a_lift_sees(),
        "fp32": fp32_is_exact(),
        "refusals": refusals(),
        **{f"simulated {method}": scale.counted(method) for method in ("AdamW", "std", "unsharded", "RSO")},
    }


@pytest.fixture
def found(two):
    return [each["messages"] for each in two]


@pytest.mark.parametrize("method", ["AdamW", "std", "unsharded", "RSO"])
def test_the_simulation_counts_what_fsdp2_and_the_optimizers_send(found, method):
    for each in found:
        assert each[f"simulated {method}"] == scale.expected(method, RANKS)


STEP, REFRESH = 0, 1
"""Which of the two steps that `sent` returns has no refresh, and which has one."""


def test_cut_along_n_a_step_sends_nothing(found):
    for case in ("along n", "along m, unsharded", "random", "experts"):
        assert found[0][case][STEP] == {}, case
    assert found[0]["random"][REFRESH] == found[0]["experts"][REFRESH] == {}


@pytest.mark.parametrize("case, n", [("along m", 24), ("along m, uneven", 25)])
def test_cut_along_m_a_step_sends_r_once_and_its_share_of_n(found, case, n):
    piece = -(-n // RANKS)
    expected = {"reduce_scatter": 4 * 3 * RANK * piece * RANKS, "all_gather": 4 * 3 * RANK * piece}
    assert found[0][case][STEP] == expected


def test_a_refresh_sends_each_piece_once_and_the_bases(found):
    """Three matrices go to two processes. Cut along n every process gets all bases; cut along m, its rows. A
    flag a matrix says whether it was chosen."""
    pieces, flags = 4 * 3 * 16 * 24 // RANKS, 4 * 2
    along_n, along_m = found[0]["along n"][REFRESH], dict(found[0]["along m"][REFRESH])
    assert sorted(other["along n"][REFRESH]["all_to_all"] - pieces for other in found) == [4 * 1 * 16 * RANK, 4 * 2 * 16 * RANK]
    assert along_n["all_gather"] == 4 * 3 * (16 // RANKS) * RANK + flags
    step = found[0]["along m"][STEP]
    along_m["all_gather"] -= step["all_gather"]
    assert along_m.pop("reduce_scatter") == step["reduce_scatter"]
    owned = [other["along m"][REFRESH]["all_to_all"] - pieces for other in found]
    assert sorted(owned) == [4 * 1 * 16 * RANK, 4 * 2 * 16 * RANK]
    assert along_m["all_gather"] == flags


def test_a_lift_moves_all_columns_of_its_rows(found):
    assert [each["columns"] for each in found] == [24, 24]


def test_fp32_steps_without_sums_between_processes_are_exact(found):
    assert all(each["fp32"] for each in found)


@pytest.mark.parametrize(
    "case, words",
    [
        ("two cuts", "two dimensions of the mesh"),
        ("FSDP2 over TP", "cut along one dimension, got _S"),
        ("convolution", "may be cut along the first alone"),
        ("flat", "fully_shard"),
        ("offload", "CPUOffloadPolicy"),
        ("mesh", "another mesh .*torch.distributed.checkpoint"),
        ("ZeRO-3", "DeepSpeed's ZeRO.*fully_shard"),
    ],
)
def test_what_cannot_be_projected_is_refused_in_words(found, case, words):
    assert re.search(words, found[0]["refusals"][case] or "")
