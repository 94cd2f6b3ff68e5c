"""RSOAdamW under FSDP2 trains as in one process, and its checkpoints resume."""

import pytest
import test_fsdp
import torch
from test_fsdp import AFTER, BEFORE, CLOSE, LEAST, Net, batch, difference, restore, weights, whole_batch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lowrank_kernels as lrk
from benchmarks import scale

CASES = {
    "plain": {},
    "haar": dict(distribution="haar"),
    "proximal": dict(proximal=0.1),
    "carry": dict(moments="carry"),
    "principal": dict(distribution="principal", moments="carry"),
    "sgd": dict(inner="sgd"),
    "uneven": dict(width=37, placed=False),
    "converted when sharded": dict(late=True),
    "sharded after the optimizer was built": dict(switched=True),
    "converted when sharded, uneven": dict(late=True, width=37),
}
SLOW = ("haar", "proximal", "sgd", "carry", "converted when sharded, uneven")
"""Only with --all, as tests marked slow are."""
EACH = pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
OF_LAYERS = ("distribution",)


class Wide(Net):
    """Output features that two processes can share evenly."""

    def __init__(self, width=36):
        nn.Module.__init__(self)
        self.up = nn.Linear(12, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.down = nn.Linear(width, 10)
        self.to(torch.float64)


def convert(model, **options):
    return lrk.to_subspace(model, rank=5, target_modules=["up", "layers"], **options)


def converted(width=36, seed=0, **options):
    torch.manual_seed(seed)
    return convert(Wide(width), **options)


def build(spread, placed=True, width=36, seed=0, mp_policy=None, mesh=None, late=False, switched=False, **options):
    """late: whether the model is sharded when it is converted. switched: whether the optimizer gets sharded
    parameters in the place of others, as accelerate does it."""
    torch.manual_seed(seed)
    model, of_layers = Wide(width), {key: options.pop(key) for key in OF_LAYERS if key in options}
    how = {} if mp_policy is None else dict(mp_policy=mp_policy)
    how |= {} if mesh is None else dict(mesh=mesh)
    if spread and late:
        convert(fully_shard(model, **how), **of_layers)
    else:
        convert(model, **of_layers)
    options = dict(lr=1e-2, weight_decay=0.1, inner_steps=3) | options
    if spread and switched:
        names, optimizer = [name for name, _ in model.named_parameters()], lrk.RSOAdamW(model.parameters(), **options)
    if spread and not late:
        how |= dict(shard_placement_fn=lrk.distributed.shard_placement) if placed else {}
        for layer in model.layers:
            fully_shard(layer, **how)
        fully_shard(model, **how)
    if not (spread and switched):
        return model, lrk.RSOAdamW(model.parameters(), **options)
    sharded = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [sharded[name] for name in names]
    return model, optimizer


def train(model, optimizer, steps, start=0, get=batch, dtype=torch.float64):
    for step in range(start, start + steps):
        x, y = (value.to(dtype) for value in get(step))
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def one_process(case, steps):
    model, optimizer = build(False, **CASES[case])
    return train(model, optimizer, steps, get=whole_batch)


def saved(case, folder):
    model, optimizer = build(True, **CASES[case])
    train(model, optimizer, BEFORE)
    torch.distributed.checkpoint.save(test_fsdp.checkpoint(model, optimizer), checkpoint_id=folder)
    return train(model, optimizer, AFTER, start=BEFORE), resumed(case, folder)


def resumed(case, folder):
    model, optimizer = build(True, **CASES[case] | dict(seed=1))
    restore(model, optimizer, folder)
    return train(model, optimizer, AFTER, start=BEFORE)


def no_trace(case):
    found = []
    for ask in (False, True):
        model, optimizer = build(True, **CASES[case])
        if ask:
            dcp_state.get_optimizer_state_dict(model, optimizer)
        found.append(train(model, optimizer, BEFORE + AFTER))
    return all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def mixed_precision(late):
    model, optimizer = build(True, late=late, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    before = weights(model)
    after = train(model, optimizer, 5)
    return all(torch.isfinite(value).all() and not torch.equal(value, before[name]) for name, value in after.items())


def messages():
    """What a step sends where the layers are placed, where they are not, and where they were sharded
    already."""
    found = []
    for how in ({}, dict(placed=False), dict(late=True)):
        model, optimizer = build(True, **how)
        train(model, optimizer, 1)
        x, y = batch(1)
        (model(x) - y).square().mean().backward()
        with scale.Counted() as counted:
            optimizer.step()
        found.append(sum(counted.given.values()))
    return found


def refusals():
    found = {}

    def refused(name, function):
        try:
            function()
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = str(error)

    def late():
        model = fully_shard(Wide())
        model(batch(0)[0])
        lrk.to_subspace(model, rank=5)

    def itself():
        model = Wide()
        fully_shard(model.up)
        lrk.to_subspace(fully_shard(model), rank=5)

    def part():
        model = fully_shard(Wide())
        lrk.to_subspace(model.layers, rank=5)

    def tensor_parallel():
        model = parallelize_module(Wide(), init_device_mesh("cpu", (2,)), {"up": ColwiseParallel()})
        lrk.to_subspace(model, rank=5, target_modules=["up"])

    def dense():
        model, _ = build(True)
        lrk.to_dense(model)

    def other():
        model, _ = build(True)
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, 1)

    def whole():
        model, optimizer = build(True)
        model.set_reshard_after_backward(False)
        train(model, optimizer, 1)

    refused("late", late)
    refused("itself", itself)
    refused("part", part)
    refused("tensor parallel", tensor_parallel)
    refused("dense", dense)
    refused("other", other)
    refused("whole", whole)
    return found


def cases_of(everything):
    return [case for case in CASES if case not in SLOW or everything]


def process(folder, everything):
    found = {"mixed precision": mixed_precision(False) and mixed_precision(True), "messages": messages(), "refusals": refusals()}
    for case in cases_of(everything):
        model, optimizer = build(True, **CASES[case])
        found[f"trained {case}"] = train(model, optimizer, 8)
        found[f"saved {case}"] = saved(case, f"{folder}/RSO {case}")
        found[f"no trace {case}"] = no_trace(case)
    return found


def alone(folder, everything):
    return {case: resumed(case, f"{folder}/RSO {case}") for case in cases_of(everything)}


def copies_of_two():
    """Four processes: two copies of a model that two processes share."""
    model, optimizer = build(True, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))
    return train(model, optimizer, 8)


def test_copies_of_shared_models(four):
    each = [found["rso"] for found in four]
    assert difference(each[0], one_process("plain", 8)) < CLOSE
    assert all(torch.equal(each[0][name], other[name]) for other in each for name in other)


@pytest.fixture
def found(two, one):
    return [each["rso"] for each in two], one["rso"]


def close(case):
    """The sketches from which principal directions come are sums in fp32."""
    return 1e-6 if case == "principal" else CLOSE


@EACH
def test_training_is_that_of_one_process(found, case):
    (two, other), _ = found
    expected = one_process(case, 8)
    assert all(torch.equal(value, other[f"trained {case}"][name]) for name, value in two[f"trained {case}"].items())
    assert difference(expected, weights(converted(CASES[case].get("width", 36)))) > LEAST
    assert difference(two[f"trained {case}"], expected) < close(case)


@EACH
def test_checkpoints(found, case):
    (two, _), one = found
    uninterrupted, again = two[f"saved {case}"]
    assert all(torch.equal(uninterrupted[name], again[name]) for name in again)
    assert two[f"no trace {case}"]
    assert difference(one[case], uninterrupted) < close(case)


def test_mixed_precision(found):
    assert found[0][0]["mixed precision"]


def test_a_step_sends_nothing_where_the_layers_are_placed(found):
    placed, elsewhere, late = found[0][0]["messages"]
    assert placed == late == 0 and elsewhere == 8 * 3 * (3 * 36)  # R of three layers in fp64, 3 of 5 rows


@pytest.mark.parametrize(
    "case, words",
    [
        ("late", "after the first forward pass"),
        ("itself", "was called on 'up' itself"),
        ("part", "no module of FSDP2 holds it"),
        ("tensor parallel", "no module of FSDP2 holds it"),
        ("dense", "parameters are sharded"),
        ("other", "only RSOAdamW moves"),
        ("whole", "reshard"),
    ],
)
def test_refusals(found, case, words):
    assert words in found[0][0]["refusals"].get(case, "")
