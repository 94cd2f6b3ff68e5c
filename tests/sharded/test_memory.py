"""What report counts, and what estimate_memory says of shards, is what two processes hold under FSDP2."""

import pytest
import torch
import torch.distributed as dist
from test_fsdp import GAP, METHODS, Net, shard
from test_sharded_rso import Wide
from torch import nn
from torch.distributed.fsdp import fully_shard

import lowrank_kernels as lrk

CASES = {
    "I3S": (lrk.I3SAdamW, {}),
    "GaLore, 8 bits": (lrk.GaLoreAdamW, dict(state_bits=8)),
    "Fira": (lrk.FiraAdamW, {}),
    "unsharded": (lrk.I3SAdamW, dict(proj_type="unsharded")),
    "Adafactor, diagnostics": METHODS["Adafactor, diagnostics"],
}
NAMES = {"I3S": "i3s", "GaLore, 8 bits": "galore", "Fira": "fira", "unsharded": "i3s", "Adafactor, diagnostics": "adafactor"}
"""The names of the methods in estimate_memory."""
TARGETS = ["up", "layers", "down", "experts"]
RANK = 5


class WithExperts(Net):
    """Lengths that two processes cannot share evenly, and three experts, which FSDP2 cuts apart."""

    def __init__(self):
        super().__init__(torch.float32)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 12, 10))

    def forward(self, x):
        return super().forward(x) + torch.einsum("bi,eio->bo", x, self.experts.up)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def of(state, *names):
    return sum(local(value).nbytes for name, value in state.items() if isinstance(value, torch.Tensor) and name in names)


def as_dict(memory):
    """The parts of an estimate that an optimizer and a model hold, as a report has them."""
    return {
        "weights": memory.weights,
        "gradients": memory.gradients + memory.accumulators,
        "bases": memory.bases,
        "states": memory.states + memory.dense_states,
        "coordinates": memory.coordinates,
    }


def compare(build, batch, in_backward=None):
    """What a process has, as its tensors are counted; and what a report says before and after the step."""
    model, optimizer = build()
    if in_backward:
        lrk.in_backward(model, optimizer, update=in_backward)
    before = vars(lrk.report(model, optimizer).bytes)
    model(batch).square().mean().backward()
    gradients = sum(local(param.grad).nbytes for param in model.parameters() if param.grad is not None)
    if in_backward:
        gradients += sum(local(each).nbytes for each in optimizer._in_backward.projected.values())
    optimizer.step()
    optimizer.zero_grad()
    found = lrk.report(model, optimizer)
    layers = [module for module in model.modules() if isinstance(module, lrk.SubspaceLinear)]
    drawn = {layer.subspace: layer.subspace.matrix(layer.weight.device, layer.weight.dtype).nbytes for layer in layers}
    coordinates = sum(local(layer.coordinates).nbytes for layer in layers)
    everything = [(name, value) for state in optimizer.state.values() for name, value in state.items() if isinstance(value, torch.Tensor)]
    counted = {
        "weights": sum(local(param).nbytes for param in model.parameters()) - coordinates,
        "gradients": gradients,
        "bases": sum(local(value).nbytes for name, value in everything if name == "basis") + sum(drawn.values()),
        "states": sum(local(value).nbytes for name, value in everything if name != "basis"),
        "coordinates": coordinates,
    }
    return {"counted": counted, "before": before, "after": vars(found.bytes), "says parts": "this process's parts" in str(found)}


def projected(case):
    def build():
        torch.manual_seed(0)
        kind, options = CASES[case]
        model = shard(WithExperts())
        return model, kind(lrk.param_groups(model, rank=RANK, target_modules=TARGETS, update_proj_gap=GAP, **options))

    return build


def converted(width):
    torch.manual_seed(0)
    model = Wide(width).float()
    return lrk.to_subspace(model, rank=RANK, target_modules=["up", "layers"])


def coordinates(width):
    def build():
        model = converted(width)
        how = {} if width % 2 else dict(shard_placement_fn=lrk.distributed.shard_placement)
        for layer in model.layers:
            fully_shard(layer, **how)
        fully_shard(model, **how)
        return model, lrk.RSOAdamW(model.parameters())

    return build


def refused():
    """What estimate_memory says to a model that is sharded already."""
    try:
        lrk.estimate_memory(shard(WithExperts()), "i3s", RANK)
    except TypeError as error:
        return str(error)
    return ""


def process():
    torch.manual_seed(dist.get_rank())
    batch = torch.randn(4, 12)
    found = {case: compare(projected(case), batch) for case in CASES}
    found["I3S, in backward"] = compare(projected("I3S"), batch, "deferred")
    found["unsharded, in backward"] = compare(projected("unsharded"), batch, "deferred")
    found["RSO"], found["RSO, uneven"] = compare(coordinates(36), batch), compare(coordinates(37), batch)
    return found | {"refused": refused()}


def estimated(case):
    options = dict(shards=2)
    if case.startswith("RSO"):
        torch.manual_seed(0)
        model = Wide(37 if "uneven" in case else 36).float()
        return lrk.estimate_memory(model, "rso", RANK, target_modules=["up", "layers"], **options)
    name, _, way = case.partition(", in backward")
    options |= dict(in_backward="deferred") if case != name else {}
    return lrk.estimate_memory(WithExperts(), NAMES[name], RANK, target_modules=TARGETS, update_proj_gap=GAP, **options, **CASES[name][1])


EACH = pytest.mark.parametrize("case", [*CASES, "I3S, in backward", "unsharded, in backward", "RSO", "RSO, uneven"])


@pytest.fixture
def found(two):
    return [each["memory"] for each in two]


@EACH
def test_a_report_counts_this_process_parts(found, case):
    for each in found:
        row = each[case]
        assert row["before"] == row["after"] == row["counted"] and row["says parts"]
    first, second = (each[case]["counted"]["weights"] for each in found)
    assert first > second or case == "RSO"  # whose parts are even


@pytest.mark.filterwarnings("ignore")
@EACH
def test_the_estimate_is_what_the_first_process_holds(found, case):
    assert as_dict(estimated(case)) == found[0][case]["counted"]


def test_a_sharded_model_is_refused_with_words(found):
    assert "before fully_shard, with shards=" in found[0]["refused"]
