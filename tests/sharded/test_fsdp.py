"""Training under FSDP2 is training in one process, and checkpoints go from any number of processes to any
other."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lowrank_kernels as lrk

RANKS = 2
BEFORE, AFTER, GAP = 4, 5, 3


class Net(nn.Module):
    """Tall, wide and square matrices, some of them uneven, with biases that stay dense."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.up = nn.Linear(12, 37)
        self.layers = nn.ModuleList(nn.Linear(37, 37) for _ in range(2))
        self.down = nn.Linear(37, 10)
        self.to(dtype)

    def forward(self, x):
        x = torch.tanh(self.up(x))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.down(x)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Net(dtype)


def batch(step, dtype=torch.float64):
    """This process's part of a batch."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 12, generator=generator, dtype=torch.float64), torch.randn(16, 10, generator=generator, dtype=torch.float64)
    parts = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if parts > 1 else 0
    return x.chunk(parts)[rank].to(dtype), y.chunk(parts)[rank].to(dtype)


def shard(model, **options):
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


METHODS = {
    "I3S": (lrk.I3SAdamW, {}),
    "GaLore, 8 bits": (lrk.GaLoreAdamW, dict(state_bits=8)),
    "Fira": (lrk.FiraAdamW, {}),
    "random, stagger": (lrk.LowRankAdamW, dict(selection="random", stagger=True)),
    "unsharded": (lrk.I3SAdamW, dict(proj_type="unsharded")),
    "Adafactor, diagnostics": (lrk.LowRankAdafactor, dict(diagnostics=True, refresh_threshold=0.5)),
}


SLOW = ("unsharded", "Adafactor, diagnostics")
"""Only with --all, as tests marked slow are."""
EACH = pytest.mark.parametrize("method", [pytest.param(method, marks=[pytest.mark.slow] * (method in SLOW)) for method in METHODS])


def methods_of(everything):
    return [method for method in METHODS if method not in SLOW or everything]


def optimizer_of(model, method, **options):
    cls, own = METHODS[method]
    return cls(lrk.param_groups(model, rank=5, target_modules=["up", "layers", "down"], update_proj_gap=GAP, **(own | options)), lr=1e-2)


def train(model, optimizer, steps, start=0, clip=None, accumulate=1, dtype=torch.float64):
    for step in range(start, start + steps):
        for micro in range(accumulate):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(micro == accumulate - 1)
            x, y = batch(step * accumulate + micro, dtype)
            ((model(x) - y).square().mean() / accumulate).backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def one_process(method, steps, **options):
    """What a process alone gets from the whole batches."""
    model = network()
    optimizer = optimizer_of(model, method)
    accumulate = options.get("accumulate", 1)
    for step in range(steps):
        for micro in range(accumulate):
            x, y = whole_batch(step * accumulate + micro)
            ((model(x) - y).square().mean() / accumulate).backward()
        if options.get("clip") is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip"])
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def whole_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 12, generator=generator, dtype=torch.float64), torch.randn(16, 10, generator=generator, dtype=torch.float64)


def fsdp(method, steps, **options):
    model = shard(network())
    optimizer = optimizer_of(model, method)
    train(model, optimizer, steps, **options)
    return weights(model)


def in_backward(method, steps, scaled=False, clip=None, accumulate=1, single=False, **options):
    """Gradients that are projected, or used, when FSDP2 has reduced them. single: weights in fp32."""
    dtype = torch.float32 if scaled or single else torch.float64
    model = shard(network(dtype))
    optimizer = optimizer_of(model, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000) if scaled else None
    lrk.in_backward(model, optimizer, accumulate=accumulate, scaler=scaler, **options)
    moved = []
    for step in range(steps):
        before = weights(model)
        for micro in range(accumulate):
            x, y = batch(step * accumulate + micro, dtype)
            x = x * torch.inf if scaled and step in (0, 3, 5) and dist.get_rank() == 0 else x
            loss = (model(x) - y).square().mean() / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
        assert all(param.grad is None for param in optimizer.param_groups[1]["params"])
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        (optimizer if scaler is None else scaler).step(*([] if scaler is None else [optimizer]))
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
        after = weights(model)
        moved.append(any(not torch.equal(before[name], value) for name, value in after.items()))
    return moved if scaled else after


def tensor_parallel():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 36, dtype=torch.float64), nn.Tanh(), nn.Linear(36, 10, dtype=torch.float64))
    plain = copy.deepcopy(model)
    plain.append(nn.LayerNorm(10, dtype=torch.float64))  # its parameters stay plain tensors
    model.append(nn.LayerNorm(10, dtype=torch.float64))
    model = parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    found = []
    for each in (plain, model):
        groups = [
            {"params": [each[0].weight, each[2].weight], "rank": 4, "update_proj_gap": GAP},
            {"params": [each[0].bias, each[2].bias, *each[3].parameters()]},
        ]
        optimizer = lrk.I3SAdamW(groups, lr=1e-2)
        for step in range(8):
            x, y = whole_batch(step)
            (each(x) - y).square().mean().backward()
            optimizer.clip_grad_norm_(0.05)
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights(each))
    return difference(*found)


# Checkpoints.


def checkpoint(model, optimizer):
    return {"model": dcp_state.get_model_state_dict(model), "optimizer": dcp_state.get_optimizer_state_dict(model, optimizer)}


def restore(model, optimizer, folder):
    held = checkpoint(model, optimizer)
    dcp.load(held, checkpoint_id=folder)
    dcp_state.set_model_state_dict(model, held["model"])
    dcp_state.set_optimizer_state_dict(model, optimizer, held["optimizer"])


def save_and_go_on(method, folder):
    """Weights where nothing was saved; and where the run was saved after BEFORE steps, and loaded into a new
    model."""
    model = shard(network())
    optimizer = optimizer_of(model, method)
    train(model, optimizer, BEFORE)
    dcp.save(checkpoint(model, optimizer), checkpoint_id=folder)
    train(model, optimizer, AFTER, start=BEFORE)
    return weights(model), resumed(method, folder)


def resumed(method, folder, spread=True, **options):
    torch.manual_seed(1)
    model = Net(torch.float64)
    model = shard(model, **options) if spread else model
    optimizer = optimizer_of(model, method)
    restore(model, optimizer, folder)
    train(model, optimizer, AFTER, start=BEFORE)
    return weights(model)


def initialising_leaves_no_trace(method):
    found = []
    for ask in (False, True):
        model = shard(network())
        optimizer = optimizer_of(model, method)
        if ask:
            dcp_state.get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, BEFORE + AFTER)
        found.append(weights(model))
    return all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def by_torch_save(method):
    """A resumed run by optimizer.state_dict() and torch.save, each process its own file."""
    model = shard(network())
    optimizer = optimizer_of(model, method)
    train(model, optimizer, BEFORE)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, AFTER, start=BEFORE)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = shard(network())
    again = optimizer_of(other, method)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(other, again, AFTER, start=BEFORE)
    a, b = weights(model), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


def full_state(method, from_rank0=False):
    """A whole state dict, as rank 0 would save it, loaded into a new run: by every process, or by rank 0,
    which broadcasts it, as accelerate does."""
    whole = dcp_state.StateDictOptions(full_state_dict=True)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank0)
    model = shard(network())
    optimizer = optimizer_of(model, method)
    train(model, optimizer, BEFORE)
    held = copy.deepcopy(dcp_state.get_optimizer_state_dict(model, optimizer, options=whole))
    of_model = copy.deepcopy(dcp_state.get_model_state_dict(model, options=whole))
    if from_rank0 and dist.get_rank():
        held, of_model = {}, {}
    train(model, optimizer, AFTER, start=BEFORE)
    other = shard(network())
    again = optimizer_of(other, method)
    dcp_state.set_model_state_dict(other, of_model, options=options)
    dcp_state.set_optimizer_state_dict(other, again, held, options=options)
    train(other, again, AFTER, start=BEFORE)
    a, b = weights(model), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


def mixed_precision():
    """Weights in fp32, products in bf16: finite, moved, and the same in all processes."""
    model = shard(network(torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = optimizer_of(model, "I3S")
    before = weights(model)
    train(model, optimizer, 6, dtype=torch.float32)
    after = weights(model)
    return all(torch.isfinite(value).all() and not torch.equal(before[name], value) for name, value in after.items())


def scaled():
    """A GradScaler, which meets an infinite gradient in one process's part."""
    model = shard(network(torch.float32))
    optimizer = optimizer_of(model, "I3S")
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    moved = []
    for step in range(5):
        x, y = batch(step, torch.float32)
        scaler.scale((model(x) - y).square().mean()).backward()
        if step == 3 and dist.get_rank() == 0:
            model.layers[0].weight.grad.to_local()[0, 0] = torch.inf
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(any(not torch.equal(before[name], value) for name, value in weights(model).items()))
    return moved


def on_columns():
    """Weights that FSDP2 cuts along their columns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 36, dtype=torch.float64), nn.Tanh(), nn.Linear(36, 10, dtype=torch.float64))
    plain = copy.deepcopy(model)
    fully_shard(model, shard_placement_fn=lambda param: Shard(1) if param.dim() == 2 else None)
    found = []
    for each, get in ((plain, whole_batch), (model, batch)):
        optimizer = lrk.I3SAdamW(lrk.param_groups(each, rank=4, target_modules=["0", "2"], update_proj_gap=GAP), lr=1e-2)
        for step in range(8):
            x, y = get(step)
            (each(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights(each))
    return difference(*found)


IN_BACKWARD = ("I3S", "unsharded", "random, stagger", "Adafactor, diagnostics")


def process(folder, everything):
    found, methods = {}, methods_of(everything)
    for method in methods:
        found[f"trained {method}"] = fsdp(method, 8)
        found[f"no trace {method}"] = initialising_leaves_no_trace(method)
        found[f"torch.save {method}"] = by_torch_save(method)
        found[f"full {method}"] = full_state(method)
        found[f"full, from rank 0, {method}"] = full_state(method, from_rank0=True)
        found[f"saved {method}"] = save_and_go_on(method, f"{folder}/two {method}")
    found["clipped"] = fsdp("I3S", 8, clip=0.05)
    found["accumulated"] = fsdp("I3S", 8, accumulate=3)
    found["placed on columns"] = on_columns()
    found["tensor parallel"] = tensor_parallel()
    found["mixed precision"] = mixed_precision()
    found["scaled"] = scaled()
    for method in (method for method in IN_BACKWARD if method in methods):
        found[f"in backward {method}"] = in_backward(method, 8)
    found["in backward, clipped"] = in_backward("I3S", 8, clip=1e-3)
    found["in backward, accumulated"] = in_backward("random, stagger", 8, accumulate=3)
    found["in backward, R in bf16"] = in_backward("random, stagger", 8, accumulate=2, single=True, dtype=torch.bfloat16)
    found["at once"] = in_backward("Fira", 8, update="immediately")
    found["in backward, scaled"] = in_backward("I3S", 7, scaled=True)
    return found


ONLY_SHARDED = ("GaLore, 8 bits", "unsharded")
"""Whose checkpoints differ from those of plain parameters: in their moments, and in the side."""


def alone(folder, everything):
    """In one process."""
    return {
        method: (
            resumed(method, f"{folder}/two {method}"),
            *save_and_go_on(method, f"{folder}/one {method}"),
            None if method in ONLY_SHARDED else resumed(method, f"{folder}/two {method}", spread=False),
        )
        for method in methods_of(everything)
    }


def together(folder, everything):
    found = {}
    for method in methods_of(everything):
        found[method] = resumed(method, f"{folder}/one {method}")
        found[f"HSDP {method}"] = resumed(method, f"{folder}/two {method}", mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b")))
    return found


@pytest.fixture
def found(two):
    return [each["fsdp"] for each in two]


CLOSE = 1e-10
"""Of weights of size 1 in fp64. A wrong step is off by 1e-4 at least; see LEAST."""
LEAST = 1e-4


@EACH
def test_training_is_that_of_one_process(found, method):
    reference = "I3S" if method == "unsharded" else method
    if method == "unsharded":  # another side is projected: another run
        assert difference(found[0][f"trained {method}"], one_process(reference, 8)) > LEAST
    elif "8 bits" in method:
        start, end = weights(network()), one_process(method, 8)
        moved = sum((end[name] - start[name]).norm() ** 2 for name in end) ** 0.5
        apart = sum((end[name] - found[0][f"trained {method}"][name]).norm() ** 2 for name in end) ** 0.5
        assert apart < 0.05 * moved
    else:
        assert difference(found[0][f"trained {method}"], one_process(method, 8)) < CLOSE


def test_clipping_and_accumulation_are_those_of_one_process(found):
    clipped, plain = one_process("I3S", 8, clip=0.05), one_process("I3S", 8)
    assert difference(clipped, plain) > LEAST
    assert difference(found[0]["clipped"], clipped) < CLOSE
    assert difference(found[0]["accumulated"], one_process("I3S", 8, accumulate=3)) < CLOSE


def test_gradients_that_are_projected_when_they_are_reduced(found):
    """With one pass a step nothing else changes. Clipping sees ‖R‖, in every process the same."""
    for method in (method for method in IN_BACKWARD if f"in backward {method}" in found[0]):
        assert difference(found[0][f"in backward {method}"], found[0][f"trained {method}"]) < CLOSE
    assert difference(found[0]["at once"], found[0]["trained Fira"]) < CLOSE
    assert difference(found[0]["in backward, accumulated"], one_process("random, stagger", 8, accumulate=3)) < CLOSE
    assert difference(found[0]["in backward, clipped"], found[0]["trained I3S"]) > LEAST
    assert difference(found[0]["in backward, clipped"], one_process_in_backward(clip=1e-3)) < CLOSE
    for each in found:
        assert each["in backward, scaled"] == [False, True, True, False, True, False, True]


def test_r_in_bf16_is_that_of_one_process(found):
    """But for roundings to bf16 that turn on the last bit of a sum in another order, about one in 2^16."""
    options = dict(method="random, stagger", accumulate=2, single=True)  # bases that no last bit of a gradient turns
    exact, rounded = (one_process_in_backward(dtype=dtype, **options) for dtype in (torch.float32, torch.bfloat16))
    apart = difference(found[0]["in backward, R in bf16"], rounded)
    assert apart < 0.1 * difference(exact, rounded)


def one_process_in_backward(method="I3S", clip=torch.inf, accumulate=1, single=False, **options):
    dtype = torch.float32 if single else torch.float64
    model = network(dtype)
    optimizer = optimizer_of(model, method)
    lrk.in_backward(model, optimizer, accumulate=accumulate, **options)
    for step in range(8):
        for micro in range(accumulate):
            x, y = (value.to(dtype) for value in whole_batch(step * accumulate + micro))
            ((model(x) - y).square().mean() / accumulate).backward()
        optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_other_ways_to_shard(found):
    assert found[0]["placed on columns"] < CLOSE
    assert found[0]["tensor parallel"] < CLOSE
    assert found[0]["mixed precision"]


def test_a_scaler_skips_the_step_in_all_processes(found):
    for each in found:
        assert each["scaled"] == [True, True, True, False, True]


def test_all_processes_end_with_the_same_weights(found):
    for name, value in found[0].items():
        if name.startswith("trained"):
            assert all(torch.equal(value[key], found[1][name][key]) for key in value)


@EACH
def test_a_resumed_run_is_the_uninterrupted_one(found, method):
    uninterrupted, again = found[0][f"saved {method}"]
    assert all(torch.equal(uninterrupted[name], again[name]) for name in again)
    assert found[0][f"torch.save {method}"]
    for each in found:
        assert each[f"full {method}"] and each[f"full, from rank 0, {method}"]


@EACH
def test_the_initialising_step_leaves_no_trace(found, method):
    assert found[0][f"no trace {method}"]


@EACH
def test_checkpoints_go_to_another_number_of_processes(found, one, two_again, method):
    close = 1e-3 if "8 bits" in method else CLOSE
    of_two, _ = found[0][f"saved {method}"]
    from_two, of_one, again, plain = one["fsdp"][method]
    assert all(torch.equal(of_one[name], again[name]) for name in again)
    assert difference(of_two, from_two) < close
    if plain is not None:
        assert difference(of_two, plain) < close
    assert difference(of_one, two_again[method]) < close
    assert difference(of_two, two_again[f"HSDP {method}"]) < close
