"""lowrank_kernels.report against what models and optimizers hold and do."""

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_kernels as lrk
from benchmarks.memory import tensor_bytes

ADAMW = {"low rank": lrk.LowRankAdamW, "GaLore": lrk.GaLoreAdamW, "Fira": lrk.FiraAdamW, "Adafactor": lrk.LowRankAdafactor}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 24) * 0.1)

    def forward(self, x):
        return x + torch.einsum("bi,eio->bo", x, self.up)[:, :16]


class Net(nn.Module):
    """Tall, wide and square linear layers, experts, a convolution, an embedding, a norm and a head."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(32, 16)
        self.up, self.square, self.down = nn.Linear(16, 40), nn.Linear(40, 40, bias=False), nn.Linear(40, 16)
        self.experts = Experts()
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.lm_head = nn.Linear(16, 32, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        x = self.norm(self.experts(x + self.down(torch.tanh(self.square(self.up(x))))))
        return self.lm_head(x + self.conv(x[:, None]).sum(1))


def step(model, *optimizers):
    generator = torch.Generator().manual_seed(1)
    model(torch.randint(32, (64,), generator=generator)).float().square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def quiet(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ranks that are clamped, and of little that is projected
        return function(*arguments, **options)


def low_rank(model, kind=lrk.GaLoreAdamW, rank=4, **options):
    return quiet(kind, quiet(lrk.param_groups, model, rank=rank, **options), lr=1e-3)


def named(report):
    return {each.name: each for each in report.parameters}


CASES = [
    ("GaLore", {}, None),
    ("GaLore", dict(state_bits=8), None),
    ("GaLore", dict(proj_type="left", target_modules=["up", "square", "down", "experts"]), None),
    ("low rank", dict(refresh_threshold=0.3, diagnostics=True), None),
    ("Fira", {}, None),
    ("Fira", {}, "immediately"),
    ("Adafactor", {}, None),
    ("GaLore", {}, "deferred"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method, options, in_backward", CASES, ids=str)
def test_bytes_before_the_first_step_are_those_after_it(method, options, in_backward, dtype):
    model = Net().to(dtype)
    optimizer = low_rank(model, ADAMW[method], **options)
    if in_backward:
        lrk.in_backward(model, optimizer, update=in_backward)
    before = lrk.report(model, optimizer)
    step(model)
    # A parameter in 16 bits has R in fp32.
    r = sum(each.nbytes for each in optimizer._in_backward.projected.values()) if in_backward else 0
    gradients = r + sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    after = lrk.report(model, optimizer)
    assert before.is_estimated and not after.is_estimated
    assert before.bytes == after.bytes and [each.bytes for each in before.parameters] == [each.bytes for each in after.parameters]
    assert after.bytes.weights == sum(param.nbytes for param in model.parameters()) and after.bytes.gradients == gradients
    assert after.bytes.states + after.bytes.bases == tensor_bytes(dict(optimizer.state))
    assert after.bytes.bases == sum(state["basis"].nbytes for state in optimizer.state.values() if "basis" in state) > 0


@pytest.mark.parametrize(
    "of_layers, of_optimizer", [({}, {}), ({}, dict(inner="sgd", proximal=0.1)), (dict(distribution="principal"), dict(moments="carry"))]
)
def test_bytes_of_rso(of_layers, of_optimizer):
    model = Net()
    lrk.to_subspace(model, rank=4, target_modules=["up", "square", "down"], share=None, **of_layers)
    optimizer = lrk.RSOAdamW(model.parameters(), **of_optimizer)
    before = lrk.report(model, optimizer)
    step(model, optimizer)
    after = lrk.report(model, optimizer)
    assert before.is_estimated and not after.is_estimated and before.bytes == after.bytes
    assert after.bytes.states == tensor_bytes(dict(optimizer.state))
    layers = [model.up, model.square, model.down]
    assert after.bytes.coordinates == sum(layer.coordinates.nbytes for layer in layers)
    assert after.bytes.bases == sum(layer.subspace.matrix(layer.weight.device, layer.weight.dtype).nbytes for layer in layers)
    assert after.bytes.gradients == sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
    assert after.bytes.weights + after.bytes.coordinates == sum(param.nbytes for param in model.parameters())


def test_layers_that_share_p_count_it_once():
    model = nn.ModuleDict({"q": nn.Linear(16, 8), "k": nn.Linear(16, 8), "other": nn.Linear(16, 8)})
    lrk.to_subspace(model, rank=4)
    (group,) = lrk.report(model, lrk.RSOAdamW(model.parameters())).groups
    assert group.bytes.bases == 2 * 16 * 4 * 4 and group.parameters == 3


def test_principal_directions_that_layers_share_count_once():
    model = nn.ModuleDict({"q": nn.Linear(16, 8), "k": nn.Linear(16, 8)})
    lrk.to_subspace(model, rank=4, distribution="principal")
    optimizer = lrk.RSOAdamW(model.parameters(), inner_steps=1)
    for _ in range(2):
        x = torch.randn(4, 16)
        (model["q"](x) * model["k"](x)).sum().backward()
        optimizer.step()
    first, second = (optimizer.state[layer.coordinates]["principal"] for layer in model.values())
    assert first is second and first.any()
    assert lrk.report(model, optimizer).bytes.states == tensor_bytes(dict(optimizer.state))


def test_names_are_without_those_of_wrappers():
    model = Net()
    optimizer = low_rank(model)
    assert named(lrk.report(torch.compile(model), optimizer)).keys() == named(lrk.report(model, optimizer)).keys()


def test_adamw_in_fp32_is_what_the_rest_is_compared_with():
    model = Net().to(torch.bfloat16)
    elements, tensors = sum(param.numel() for param in model.parameters()), len(list(model.parameters()))
    found = lrk.report(model, low_rank(model)).adamw
    assert (found.weights, found.gradients, found.states) == (2 * elements, 2 * elements, 8 * elements + 4 * tensors)
    lrk.to_subspace(model, rank=4, target_modules=["up"])  # its weight has no gradient any more
    assert lrk.report(model, lrk.RSOAdamW(model.parameters())).adamw == found


def test_a_group_says_side_rank_and_share():
    model = Net()
    found = lrk.report(model, low_rank(model, rank=20))
    (group,) = found.groups
    each = named(found)
    assert (group.optimizer, group.optimizer_index, group.group, group.parameters) == ("GaLoreAdamW", 0, 1, 4)
    assert group.side == "mixed" and group.ranks == (16, 20)
    assert (each["up.weight"].side, each["down.weight"].side) == ("right", "left")
    elements = 16 * 40 * 2 + 40 * 40 + 3 * 16 * 24
    assert group.elements == elements and group.share == elements / sum(param.numel() for param in model.parameters())
    assert group.share + sum(other.share for other in found.unprojected) == pytest.approx(1)
    assert lrk.report(model, low_rank(model, proj_type="left")).groups[0].side == "left"


def test_rso_projects_the_side_of_the_inputs():
    model = Net()
    lrk.to_subspace(model, rank=4, target_modules=["up", "down"])
    (group,) = lrk.report(model, lrk.RSOAdamW(model.parameters())).groups
    assert group.side == "right" and group.ranks == (4, 4) and group.parameters == 2


def adapted(model):
    model.up.lora_A = nn.Linear(16, 2, bias=False)
    model.up.adapter_layer_names = ("lora_A",)
    return model


REASONS = {
    "embed_tokens.weight": "embedding",
    "lm_head.weight": "output head",
    "up.bias": "norm, bias or other vector",
    "norm.weight": "norm, bias or other vector",
    "square.weight": "linear layer not targeted",
    "experts.up": "experts not targeted",
    "conv.weight": "weight of a Conv1d",
    "up.lora_A.weight": "adapter",
}


def only_up(model, rank):
    rest = [param for param in model.parameters() if param is not model.up.weight]
    return quiet(lrk.GaLoreAdamW, [{"params": [model.up.weight], "rank": rank}, {"params": rest}])


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_projected_has_a_reason(name):
    model = adapted(Net())
    found = named(lrk.report(model, only_up(model, rank=10)))
    assert found[name].reason == REASONS[name] and found["up.weight"].reason is None


def test_a_matrix_may_be_narrower_than_the_rank():
    model = Net()  # down.weight has 16 rows
    reasons = [named(lrk.report(model, only_up(model, rank)))["down.weight"].reason for rank in (16, 17)]
    assert reasons == ["linear layer not targeted", "a side shorter than the rank"]


def test_frozen_and_forgotten_parameters():
    model = Net()
    model.square.weight.requires_grad_(False)
    optimizer = lrk.GaLoreAdamW([{"params": [model.up.weight, model.square.weight], "rank": 4}, {"params": [model.norm.weight]}])
    found = named(lrk.report(model, optimizer))
    assert (found["square.weight"].reason, found["down.weight"].reason) == ("frozen", "in no optimizer")
    assert found["square.weight"].bytes.states == found["square.weight"].bytes.gradients == found["down.weight"].bytes.states == 0
    assert found["down.weight"].bytes.gradients == model.down.weight.nbytes and found["down.weight"].optimizer is None


def test_parameters_of_another_model_are_shown():
    """As after a conversion that has replaced the parameters."""
    model, other = Net(), Net()
    found = lrk.report(model, low_rank(other))
    assert found.groups == () and "Nothing is projected." in str(found)
    assert {each.reason: each.parameters for each in found.unprojected} == {
        "in no optimizer": len(list(model.parameters())),
        "not in the model": len(list(other.parameters())),
    }


def test_tied_parameters_count_once():
    model = Net(tied=True)
    found = lrk.report(model, low_rank(model))
    assert found.bytes.weights == sum(param.nbytes for param in model.parameters())
    assert named(found)["embed_tokens.weight = lm_head.weight"].reason == "embedding, tied to the head"


def test_several_optimizers():
    model = Net()
    rest = [param for name, param in model.named_parameters() if not name.startswith(("up", "square", "embed", "norm", "conv"))]
    optimizers = [
        lrk.GaLoreAdamW([{"params": [model.up.weight], "rank": 4}]),
        lrk.I3SAdamW([{"params": [model.square.weight], "rank": 8}]),
        torch.optim.AdamW([model.embed_tokens.weight, model.up.bias]),
        torch.optim.SGD(model.norm.parameters(), lr=0.1, momentum=0.9),
        torch.optim.RMSprop(model.conv.parameters()),
        torch.optim.Adam(rest, amsgrad=True),
    ]
    before = lrk.report(model, optimizers)
    assert [(each.optimizer, each.optimizer_index, each.ranks) for each in before.groups] == [
        ("GaLoreAdamW", 0, (4, 4)),
        ("I3SAdamW", 1, (8, 8)),
    ]
    assert before.unknown == ("RMSprop",) and "RMSprop are known after its first step" in str(before)
    assert named(before)["down.weight"].reason == "in Adam, which does not project"
    step(model, *optimizers)
    after = lrk.report(model, iter(optimizers))
    of_rmsprop = sum(tensor_bytes(state) for state in optimizers[4].state.values())
    assert after.unknown == () and after.bytes.states == before.bytes.states + of_rmsprop
    assert after.bytes.states + after.bytes.bases == tensor_bytes([dict(optimizer.state) for optimizer in optimizers])


# Refreshes.


@pytest.mark.parametrize(
    "options", [{}, dict(stagger=True), dict(refresh_threshold=0.0, max_update_proj_gap=12), dict(selection="random")], ids=str
)
def test_the_next_refresh_comes_when_it_says(options):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(8, 12)) for _ in range(4)]
    model = nn.ParameterList(weights)
    optimizer = lrk.LowRankAdamW([{"params": weights, "rank": 3, "update_proj_gap": 3, **options}])
    said, refreshed = [], []
    for number in range(40):
        said.append([each.next_refresh for each in lrk.report(model, optimizer).parameters])
        for weight in weights:
            weight.grad = torch.randn(8, 12)
        optimizer.step()
        refreshed.append([optimizer.state[weight]["refreshed_at"] == number for weight in weights])
    for place in range(4):
        for number in range(20):
            until = next(later for later in range(number, 40) if refreshed[later][place])
            assert said[number][place] == until - number + 1, (number, place)
    assert max(map(max, said)) == (12 if "refresh_threshold" in options else 3)


def test_the_next_subspace_comes_when_it_says():
    model = Net()
    lrk.to_subspace(model, rank=4, target_modules=["up"])
    optimizer = lrk.RSOAdamW(model.parameters(), inner_steps=3)
    said, drawn = [], []
    for _ in range(7):
        said.append(lrk.report(model, optimizer).groups[0].next_refresh)
        before = model.up.subspace.outer_step
        step(model, optimizer)
        drawn.append(model.up.subspace.outer_step > before)
    assert said == [3, 2, 1, 3, 2, 1, 3] and drawn == [said_now == 1 for said_now in said]


def test_the_overlap_is_that_of_diagnostics():
    model = Net()
    optimizer = low_rank(model, update_proj_gap=1, diagnostics=True)
    step(model, optimizer)
    first = lrk.report(model, optimizer)
    assert math.isnan(first.groups[0].overlap) and str(first).splitlines()[4].endswith(" -")
    step(model, optimizer)
    found, rows = lrk.report(model, optimizer), optimizer.diagnostics()
    of = {name: [row["overlap"] for row in rows if row["param"] == name] for name in {row["param"] for row in rows}}
    for name, values in of.items():
        assert named(found)[name].overlap == pytest.approx(sum(values) / len(values), rel=1e-5)
    means = [sum(values) / len(values) for values in of.values()]
    assert found.groups[0].overlap == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert str(found).splitlines()[4].endswith(f" {found.groups[0].overlap:.3f}")


# Words.


@pytest.mark.parametrize("has_rich", [True, False])
def test_the_tables_say_what_the_numbers_say(has_rich, monkeypatch):
    if has_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    model = Net(tied=True)
    lrk.to_subspace(model, rank=4, target_modules=["up", "square"])
    found = lrk.report(model, lrk.RSOAdamW(model.parameters(), inner_steps=7))
    text = str(found)
    assert ("─" in text) == has_rich and ("----" in text) != has_rich
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    by_first = {line[0]: line for line in lines if line}
    group = by_first["RSOAdamW, group 0"]
    assert group[1:5] == ["2", f"{100 * found.groups[0].share:.1f} %", "right", "4"] and group[-2:] == ["in 7 steps", "-"]
    assert by_first["embedding, tied to the head"][-1] == "embed_tokens.weight = lm_head.weight (32, 16)"
    assert by_first["here"][-1] == f"{100 * found.bytes.total / found.adamw.total:.1f} %"
    assert by_first["here"][1] == f"{found.bytes.weights / 2**10:#.3g} KiB"
    assert "States are those to come" in text


def test_markup_in_names_is_shown_as_it_is():
    pytest.importorskip("rich")
    model = nn.ModuleDict({"[bold]": nn.Linear(8, 8, bias=False)})
    assert "[bold].weight (8, 8)" in str(lrk.report(model, torch.optim.AdamW(model.parameters())))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (lambda model: (model.parameters(), low_rank(model)), TypeError, "pass the model itself"),
        (lambda model: (model, "adamw"), TypeError, "must be a torch.optim.Optimizer or several of them, got str"),
        (lambda model: (model, 3), TypeError, "got int"),
        (lambda model: (model, []), ValueError, "give the optimizers that train the model"),
        (lambda model: (model, [low_rank(model), torch.optim.SGD(model.parameters())]), ValueError, "of SGD is in GaLoreAdamW too"),
        (lambda model: (model, torch.optim.SGD([{"params": model.parameters(), "rank": 8}])), TypeError, "ZeroRedundancyOptimizer has it"),
    ],
)
def test_what_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        lrk.report(*arguments(Net()))


def test_nothing_changes_by_a_report():
    found = []
    for asks in (False, True):
        model = Net()
        optimizer = low_rank(model, lrk.I3SAdamW, update_proj_gap=2, refresh_threshold=0.1, diagnostics=True)
        for _ in range(5):
            if asks:
                lrk.report(model, optimizer)
            step(model, optimizer)
        found.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_page_shows_what_is_printed():
    pytest.importorskip("rich")
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128))
    optimizer = lrk.I3SAdamW(lrk.param_groups(model, rank=16, diagnostics=True), lr=1e-2)
    page = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    assert f"```\n{lrk.report(model, optimizer)}\n```" in page
