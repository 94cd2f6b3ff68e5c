"""estimate_memory against what optimizers hold, and against the allocator."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lrk
from benchmarks.memory import tensor_bytes
from benchmarks.process_memory import in_fresh_process
from lowrank_kernels.estimate import METHODS

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import llama

SIZE = llama.Size(64, 176, 2, 2)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def build(size=SIZE, dtype=torch.float32, vocabulary=256, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        return llama.Llama(size, vocabulary, False, False).to(dtype)


def tokens(length=32, device="cpu"):
    return torch.zeros(2, length + 1, dtype=torch.int64, device=device)


def trained(method, model, rank=8, in_backward=None, **options):
    """The optimizer after two steps, and the bytes of gradients and of R before the last."""
    kind = METHODS[method]
    if method == "adamw":
        optimizer = kind(model.parameters())
    elif method == "rso":
        optimizer = kind(lrk.to_subspace(model, rank=rank).parameters())
    else:
        optimizer = kind(lrk.param_groups(model, rank=rank, **options))
    if in_backward:
        lrk.in_backward(model, optimizer, update=in_backward)
    llama.loss(model, tokens()).backward()
    optimizer.step()
    optimizer.zero_grad()
    llama.loss(model, tokens()).backward()
    gradients = sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
    held = sum(tensor.nbytes for tensor in optimizer._in_backward.projected.values()) if in_backward else 0
    optimizer.step()
    return optimizer, gradients, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method, options",
    [(method, {}) for method in METHODS]
    + [("galore", dict(state_bits=8)), ("i3s", dict(proj_type="left")), ("galore", dict(in_backward="deferred"))]
    + [("fira", dict(in_backward="immediately")), ("i3s", dict(refresh_threshold=0.3, diagnostics=True, update_proj_gap=1))],
    ids=str,
)
def test_what_is_held_is_exact(method, options, dtype):
    rank = None if method == "adamw" else 1 if method == "apollo-mini" else 8
    estimate = lrk.estimate_memory(build(device="meta"), method, rank, dtype=dtype, **options)
    model = build(dtype=dtype)
    optimizer, gradients, held = trained(method, model, rank, **options)
    bases = {id(layer.subspace): layer for layer in model.modules() if isinstance(layer, lrk.SubspaceLinear)}.values()
    of_layers = sum(layer.subspace.matrix(layer.weight.device, layer.weight.dtype).nbytes for layer in bases)
    coordinates = sum(layer.coordinates.nbytes for layer in model.modules() if isinstance(layer, lrk.SubspaceLinear))
    states = tensor_bytes(dict(optimizer.state))
    assert estimate.states + estimate.dense_states + estimate.bases == states + of_layers
    assert estimate.weights + estimate.coordinates == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert estimate.coordinates == coordinates
    assert estimate.gradients == gradients and estimate.accumulators == held


def test_a_model_on_the_cpu_is_left_alone_and_gives_the_same():
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert lrk.estimate_memory(model, "rso", 8) == lrk.estimate_memory(build(device="meta"), "rso", 8)
    assert all(param.device.type == "cpu" for param in model.parameters()) and not hasattr(model.layers[0].mlp.up_proj, "subspace")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shapes_give_what_the_model_gives():
    model = build(device="meta")
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert lrk.estimate_memory(shapes, "i3s", 8) == lrk.estimate_memory(model, "i3s", 8)
    assert lrk.estimate_memory(shapes, "adamw") == lrk.estimate_memory(model, "adamw")


def test_activations_are_those_that_live_at_the_peak():
    """Of two linear layers with h between them. Its gradient joins it in the backward pass, unless x·P was
    saved in its place."""
    x = torch.randn(1000, 100, device="meta")
    model = nn.Sequential(nn.Linear(100, 400, bias=False), nn.Linear(400, 100, bias=False))
    hidden, out, gradients = 1000 * 400 * 4, 1000 * 100 * 4, 2 * 400 * 100 * 4
    full = lrk.estimate_memory(model, "adamw", loss=lambda model: model(x).sum())
    assert 2 * hidden <= full.activations + full.gradients <= 2 * hidden + 2 * out + gradients + 8
    thin = lrk.estimate_memory(model, "rso", 10, loss=lambda model: model(x).sum())
    assert hidden <= thin.activations + thin.gradients <= hidden + 2 * out + gradients + 8 + 2 * 1000 * 10 * 4


def test_gradients_vanish_in_backward():
    """Of a model of 300 million parameters."""
    model = build(llama.SIZES["350m"], torch.bfloat16, device="meta")
    x = tokens(256, "meta")
    found = {
        way: lrk.estimate_memory(model, "galore", 256, in_backward=way, accumulate=1 + (way == "deferred"), loss=lambda m: llama.loss(m, x))
        for way in (None, "deferred", "immediately")
    }
    full = sum(param.nbytes for param in model.parameters())
    assert found[None].gradients == full
    assert found["deferred"].gradients < full / 50 and found["deferred"].accumulators < full
    assert found["immediately"].gradients < full / 50 and found["immediately"].accumulators == 0
    assert found[None].peak > found["deferred"].peak > found["immediately"].peak
    largest = max(param.nbytes for param in model.layers.parameters())
    assert found["immediately"].one_gradient == found["deferred"].one_gradient == largest and found[None].one_gradient == 0
    half = lrk.estimate_memory(model, "galore", 256, in_backward="deferred", accumulator_dtype=torch.bfloat16)
    assert half.accumulators == found["deferred"].accumulators / 2


OF_THE_PAGE = {
    "`torch.optim.AdamW`": dict(method="adamw"),
    "GaLore, 8-bit states": dict(method="galore", rank=1024, state_bits=8),
    'the same, `"deferred"`': dict(method="galore", rank=1024, state_bits=8, in_backward="deferred"),
    "the same, R in bf16": dict(method="galore", rank=1024, state_bits=8, in_backward="deferred", accumulator_dtype=torch.bfloat16),
    'the same, `"immediately"`': dict(method="galore", rank=1024, state_bits=8, in_backward="immediately"),
    'APOLLO-Mini, `"immediately"`': dict(method="apollo-mini", rank=1, in_backward="immediately"),
    "RSO": dict(method="rso", rank=1024),
}
"""The lines of docs/gradients.md on LLaMA 7B."""


@pytest.mark.parametrize("line", OF_THE_PAGE)
def test_seven_billion_parameters_take_what_the_page_says(line):
    """bf16, one sequence of 256 tokens, checkpointing. GaLore with immediate updates stays within 22 GB."""
    model = build(llama.Size(4096, 11008, 32, 32), torch.bfloat16, vocabulary=32000, device="meta")
    x = torch.zeros(1, 257, dtype=torch.int64, device="meta")

    def loss(model):
        for layer in model.layers:
            forward = type(layer).forward.__get__(layer)
            layer.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)
        return llama.loss(model, x)

    found = lrk.estimate_memory(model, loss=loss, **OF_THE_PAGE[line])
    states = found.states + found.bases + found.dense_states + found.coordinates
    peak = f"{found.peak / 1e9:.1f}"
    table = (Path(__file__).parents[1] / "docs" / "gradients.md").read_text().partition("## How much it takes")[2]
    cells = next(text for text in table.splitlines() if text.startswith(f"| {line} |")).split("|")[2:-1]
    printed = [f"{found.weights / 1e9:.1f}", f"{states / 1e9:.1f}", f"{(found.gradients + found.accumulators) / 1e9:.1f}"]
    assert [cell.strip() for cell in cells[:3]] == printed and cells[-1].strip() == peak
    assert found.peak < 22e9 or "immediately" not in line
    if line in ("`torch.optim.AdamW`", 'the same, `"immediately"`'):
        assert peak in (Path(__file__).parents[1] / "README.md").read_text()


def test_experts_of_one_parameter_move_together():
    class Experts(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(count, 64, 96, device="meta"))

    one, eight = (
        lrk.estimate_memory(nn.Sequential(Experts(count)), "galore", 8, in_backward="immediately", target_modules=["0"]) for count in (1, 8)
    )
    assert eight.refresh == 8 * one.refresh and eight.states > 7 * one.states


def test_a_table():
    text = str(lrk.estimate_memory(build(llama.SIZES["60m"], device="meta"), "galore", 128))
    assert [line.split("  ")[0].strip() for line in text.splitlines()] == [
        "weights", "states", "bases", "dense states", "gradients", "step", "refresh", "between steps", "peak",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(method="galor", rank=8), "method must be one of"),
        (dict(method="galore"), "rank must be given for method='galore'"),
        (dict(method="adamw", rank=8), "rank must be left out of method='adamw'"),
        (dict(method="galore", rank=8, in_backward="now"), "in_backward must be None or one of deferred, immediately"),
        (dict(method="rso", rank=8, in_backward="deferred"), "in_backward is for methods that project gradients"),
        (dict(method="galore", rank=8, device="tpu"), "device must be 'cuda' or 'cpu'"),
        (dict(method="fira", rank=8, in_backward="deferred"), "use update='immediately'"),
        (dict(method="galore", rank=8, in_backward="immediately", accumulate=4), "one backward pass a step"),
        (dict(method="galore", rank=8, in_backward="deferred", accumulator_dtype=torch.int8), "torch.float32 or torch.bfloat16"),
        (dict(method="galore", rank=8, state_bit=8), "did you mean 'state_bits'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        lrk.estimate_memory(build(device="meta"), **arguments)


CASES = [
    "--method adamw",
    "--method galore",
    "--method galore --in-backward deferred",
    "--method galore --in-backward immediately",
    "--method galore --dtype bfloat16",
    "--method i3s --state-bits 8 --in-backward deferred",
    "--method fira",
    "--method adafactor",
    "--method rso",
]


@LINUX
@pytest.mark.parametrize(
    "case", [case if "deferred" in case and "8" not in case else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_peak_of_a_fresh_process(case):
    """A LLaMA of 85 million parameters, two steps."""
    found = in_fresh_process("--model", "768x2048x12", *case.split())
    assert found["measured"] == pytest.approx(found["estimated"], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU's allocator counts its bytes")
@pytest.mark.parametrize("options", [{}, dict(state_bits=8), dict(in_backward="deferred"), dict(in_backward="immediately")], ids=str)
def test_the_peak_of_a_gpus_allocator(options):
    """A first run, of one layer, loads what stays: cuBLAS's workspace and the kernels."""
    sizes = llama.Size(768, 2048, 1, 12), llama.Size(768, 2048, 12, 12)
    estimate = lrk.estimate_memory(
        build(sizes[1], torch.bfloat16, device="meta"), "galore", 128, loss=lambda m: llama.loss(m, tokens(32, "meta")), **options
    )
    keys = {key: value for key, value in options.items() if key != "in_backward"}
    for size in sizes:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = build(size, torch.bfloat16, device="cuda")
        optimizer = lrk.GaLoreAdamW(lrk.param_groups(model, rank=128, **keys))
        if "in_backward" in options:
            lrk.in_backward(model, optimizer, update=options["in_backward"])
        for _ in range(2):
            llama.loss(model, tokens(32, "cuda")).backward()
            optimizer.step()
            optimizer.zero_grad()
        held, most = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        del model, optimizer
    assert held == pytest.approx(estimate.held, rel=0.02) and most == pytest.approx(estimate.peak, rel=0.1)


def test_temporaries_of_shards():
    """A step sends R and N where the cut goes along m, and nothing along n. A refresh brings some matrices
    together, and each process has its share of them."""
    wide = {f"{number}.weight": (1024, 4096) for number in range(8)}
    whole = lrk.estimate_memory(wide, "galore", 64)
    std, unsharded = (lrk.estimate_memory(wide, "galore", 64, shards=4, proj_type=side) for side in ("std", "unsharded"))
    r = 4 * 64 * 4096
    assert unsharded.step == 2 * 8 * (4 * 64 * 1024 // 4) and std.step >= 8 * r > unsharded.step
    assert std.refresh == unsharded.refresh == whole.refresh / 4 + 2 * 2 * 4 * 1024 * 4096
    assert lrk.estimate_memory(wide, "galore", 64, shards=1) == whole


@pytest.mark.parametrize("shards", [0, 2.0, True])
def test_shards_are_a_positive_int(shards):
    with pytest.raises(ValueError, match="shards must be a positive int"):
        lrk.estimate_memory(build(device="meta"), "galore", 8, shards=shards)
