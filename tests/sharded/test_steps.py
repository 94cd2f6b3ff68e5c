"""Steps and refreshes of sharded parameters are those of whole ones, in two and in four processes."""

import functools
from unittest import mock

import pytest
import runs
import torch
import torch.distributed as dist

from lowrank_kernels.sharded import step as sharded_step

UNIT = 2.0**-53


def compare(method, kind):
    """Differences between a sharded run and a whole one, for each parameter: of the weights, as a multiple of
    the bound; of the bases. And whether all processes have equal bits."""
    mesh, placements = runs.mesh_of(kind)
    plain, alone, start = whole_run(method, "left" if "Shard(1)" in kind else "right")
    spread, together, _ = runs.run(method, dtype_of(method), (mesh, placements))
    rows = []
    for p, s, w in zip(plain, spread, start, strict=True):
        basis, mine = alone.state[p]["basis"], together.state[s]["basis"]
        rows.append(
            {
                "shape": tuple(p.shape),
                "weights": (p - s.full_tensor()).abs().max().item() / bound(p),
                "relative": ((p - s.full_tensor()).norm() / (p - w).norm()).item(),
                "bases": (basis - mine.full_tensor()).abs().max().item(),
                "same bits": equal_everywhere(mine, mesh) and equal_everywhere(s, mesh),
                "states": states_agree(alone.state[p], together.state[s]),
            }
        )
    return rows


def dtype_of(method):
    return {"8 bits": torch.float32, "bf16, stochastic": torch.bfloat16}.get(method, torch.float64)


@functools.cache
def whole_run(method, side):
    """proj_type="unsharded" projects a side that a plain parameter does not know of."""
    return runs.run(method, dtype_of(method), **({"proj_type": side} if method == "unsharded" else {}))


def bound(param):
    """Of the rounding errors of a run in fp64. A weight of size |W| is rounded once a step. R is a sum of at
    most m products, in another order, and N = M / (√V + ε) magnifies its error by at most 1/√(1 − β2) = 32.
    """
    terms = sum(param.shape) + 16
    return 4 * runs.STEPS * UNIT * (param.detach().abs().max().item() + runs.LR * 32 * terms)


def equal_everywhere(tensor, mesh):
    """Whether processes that hold the same part of a DTensor hold the same bits."""
    copies = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
    piece = tensor.to_local().detach().contiguous()
    for dim in copies:
        everyones = [torch.empty_like(piece) for _ in range(mesh.size(dim))]
        dist.all_gather(everyones, piece, group=mesh.get_group(dim))
        if not all(torch.equal(piece, other) for other in everyones):
            return False
    return True


def states_agree(alone, together):
    """The largest difference of a state, relative to its largest element, and whether shapes and scalars are
    the same."""
    worst, same = 0.0, alone.keys() == together.keys()
    for key in sorted(alone.keys() & together.keys()):
        a, b = alone[key], runs.whole(together[key])
        if isinstance(a, torch.Tensor) and a.shape == b.shape and a.is_floating_point():
            scale = a.nan_to_num().abs().max().clamp_min(1e-30)
            worst = max(worst, ((a - b).nan_to_num().abs().max() / scale).item())
        elif isinstance(a, torch.Tensor):
            same = same and a.shape == b.shape
        else:
            same = same and a == b
    return {"worst": worst, "same": same}


METHODS = ("GaLore", "I3S", "Fira", "8 bits", "stagger", "Adafactor", "unsharded", "convolution", "bf16, stochastic")
OF_FOUR = ("GaLore", "I3S", "Fira", "8 bits", "stagger", "bf16, stochastic")
"""The methods that two and four processes try without --all. With it, both try all."""


def process(everything):
    methods = tuple(runs.METHODS) if everything else METHODS if runs.processes() == 2 else OF_FOUR
    kinds = ["Shard(0)", "Shard(1)"]
    kinds += ["HSDP, Shard(0)", "HSDP, Shard(1)"] if runs.processes() == 4 else []
    cases = [(method, kind) for method in methods for kind in kinds if (method, kind[-8:]) != ("convolution", "Shard(1)")]
    cases += [(method, "replicated") for method in ("GaLore", "Fira") if runs.processes() == 2]
    found = {f"{method} | {kind}": compare(method, kind) for method, kind in cases}
    with mock.patch.object(sharded_step, "PART_ELEMENTS", 1):  # each matrix in messages of its own
        found |= {f"{method}, apart | Shard(0)": compare(method, "Shard(0)") for method in ("I3S", "Fira")}
    return found


@pytest.fixture(params=["two", "four"])
def found(request):
    return [each["steps"] for each in request.getfixturevalue(request.param)]


def cases(found):
    for name, rows in found[0].items():
        for row in rows:
            yield name, row


def test_weights_are_those_of_the_whole_run(found):
    for name, row in cases(found):
        if "8 bits" in name:  # blocks and phases of the codes begin at a process's first column
            assert row["relative"] < 0.03, (name, row)
        elif "stochastic" not in name:  # parts round apart
            assert row["weights"] < 1, (name, row)


def test_bases_are_those_of_the_whole_run_bit_for_bit(found):
    for name, row in cases(found):
        assert row["bases"] == 0, (name, row)


def test_all_processes_have_the_same_bits(found):
    for name, row in cases(found):
        assert row["same bits"], (name, row)


def test_states_are_those_of_the_whole_run(found):
    for name, row in cases(found):
        if "8 bits" not in name:
            assert row["states"]["same"], (name, row)
            close = 0.02 if "bf16" in name else 1e-10  # of products in bf16
            nothing_left = "Fira" in name and row["shape"] == (3, 40)  # the norm of a residual that is zero is noise
            assert nothing_left or row["states"]["worst"] < close, (name, row)


def test_the_other_processes_saw_the_same(found):
    for other in found[1:]:
        assert [[row["weights"] for row in rows] for rows in other.values()] == [
            [row["weights"] for row in rows] for rows in found[0].values()
        ]


def test_while_a_message_is_under_way_other_buckets_work():
    done = []

    def step(name):
        for part in ("R", "N"):
            done.append(f"{name} {part}")
            yield
        done.append(name)

    sharded_step.overlapped(map(step, "abc"))
    assert done == ["a R", "b R", "a N", "c R", "a", "b N", "b", "c N", "c"]
