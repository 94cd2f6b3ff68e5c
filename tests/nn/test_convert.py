"""to_subspace and to_dense: which layers are converted, which share P, what is refused, and the way back."""

import copy
import re

import pytest
import torch
from nn.layers import Block, Model, projection
from torch import nn
from torch.nn.utils import prune

import lowrank_kernels as lrk
from lowrank_kernels.nn import layer_of


def converted(model):
    return [name for name, module in model.named_modules() if isinstance(module, lrk.SubspaceLinear)]


def photograph(model):
    """Everything that a conversion might change."""
    parameters = {name: (id(p), p.requires_grad, p.detach().clone(), p.grad) for name, p in model.named_parameters(remove_duplicate=False)}
    return [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()], parameters


def check_untouched(model, before):
    now = photograph(model)
    assert now[0] == before[0] and now[1].keys() == before[1].keys()
    for old, new in zip(before[1].values(), now[1].values(), strict=True):
        assert old[:2] == new[:2] and torch.equal(old[2], new[2]) and old[3] is new[3]


LINEAR = [f"layers.{i}.{name}_proj" for i in range(2) for name in "qkvo"]


@pytest.mark.parametrize(
    "target_modules, expected",
    [
        ("all-linear", LINEAR),
        (["q_proj", "v_proj"], [name for name in LINEAR if name[-6] in "qv"]),
        (["layers.1"], LINEAR[4:]),
        (["lm_head"], ["lm_head"]),
        (("o_proj", "lm"), [LINEAR[3], LINEAR[7], "lm_head"]),
        (r"layers\.0\..*", LINEAR[:4]),
        (r".*\.[qk]_proj", [name for name in LINEAR if name[-6] in "qk"]),
    ],
)
def test_targets(target_modules, expected):
    model = Model()
    assert lrk.to_subspace(model, rank=4, target_modules=target_modules) is model
    assert converted(model) == expected
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    everything = {name for name, _ in Model().named_parameters()}
    assert names == everything - {f"{name}.weight" for name in expected} | {f"{name}.coordinates" for name in expected}


def test_all_linear_leaves_out_what_is_tied_to_an_embedding():
    model = Model(tied=True)
    model.decoder, model.lm_head = model.lm_head, nn.Identity()
    lrk.to_subspace(model, rank=4)
    assert converted(model) == LINEAR and type(model.decoder) is nn.Linear


def test_a_linear_layer_itself():
    layer = nn.Linear(6, 4)
    assert type(lrk.to_subspace(layer, rank=2)) is lrk.SubspaceLinear


class MyLinear(nn.Linear):
    pass


OTHERS = {
    "MyLinear": lambda: MyLinear(6, 6),
    "NonDynamicallyQuantizableLinear": lambda: nn.MultiheadAttention(6, 2),
    "ParametrizedLinear": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "linear.Linear": lambda: prune.identity(nn.Linear(6, 6), "weight"),
    "torch.nn.modules.linear.Linear": lambda: nn.Linear(6, 6, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_only_resembles_linear_is_left_alone(kind):
    with_linear = nn.ModuleList([OTHERS[kind](), nn.Linear(6, 4)])
    before = photograph(with_linear[0])
    lrk.to_subspace(with_linear, rank=2)
    assert converted(with_linear) == ["1"]
    check_untouched(with_linear[0], before)
    alone = nn.ModuleList([OTHERS[kind]()])
    with pytest.raises(ValueError, match=rf"no nn\.Linear or Conv1D with a real weight of its own, only .*{re.escape(kind)}, which cannot"):
        lrk.to_subspace(alone, rank=2)


def test_frozen_layers_are_left_alone():
    model = Block()
    model.q_proj.weight.requires_grad_(False)
    lrk.to_subspace(model, rank=2)
    assert converted(model) == ["k_proj", "v_proj", "o_proj"] and model.k_proj.subspace.layers == 2
    model = Block()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"only layers with a frozen weight \('q_proj' and others"):
        lrk.to_subspace(model, rank=2)


def test_a_frozen_bias_stays_frozen():
    layer = nn.Linear(6, 4)
    layer.bias.requires_grad_(False)
    lrk.to_subspace(layer, rank=2)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.bias.grad is None and layer.coordinates.grad is not None


def test_a_module_with_two_names():
    model = nn.Module()
    model.first = nn.Linear(6, 6)
    model.second = nn.ModuleDict({"inner": model.first})
    lrk.to_subspace(model, rank=2)
    assert model.second["inner"] is model.first and model.first.subspace.layers == 1
    assert type(lrk.to_dense(model).first) is nn.Linear


def tied(embedding):
    model = nn.ModuleDict({"a": nn.Embedding(6, 6) if embedding else nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    return model


def with_forward_replaced():
    model = Block()
    model.o_proj.forward = model.o_proj.forward
    return model


def sharded():
    model = Block()
    model.o_proj.weight.device_mesh = object()  # what a DTensor has
    return model


def with_own_parameter():
    model = Block()
    model.own = model.o_proj.weight
    return model


@pytest.mark.parametrize(
    "model, options, error, message",
    [
        (Block, dict(rank=0), ValueError, r"from 1 to in_features = 12, got 0 \(layer 'q_proj' of shape \(12, 12\); target_modules may"),
        (Block, dict(rank=13), ValueError, "got 13"),
        (Block, dict(rank=-1), ValueError, "got -1"),
        (Block, dict(rank=True), ValueError, "got True"),
        (Block, dict(rank=2.0), ValueError, r"got 2\.0"),
        (lambda: nn.Sequential(nn.Linear(9, 9), nn.Linear(3, 9)), dict(rank=10), ValueError, r"9, got 10 \(layer '0' of shape \(9, 9\)"),
        (Block, dict(distribution="normal"), ValueError, "one of 'gaussian', 'haar', 'rademacher', 'principal', got 'normal'"),
        (Block, dict(seed="0"), TypeError, "seed must be an int, got '0'"),
        (Block, dict(seed=True), TypeError, "seed must be an int, got True"),
        (Block, dict(target_modules="w_proj"), ValueError, "matches no module of Block; its linear layers have names like 'q_proj'"),
        (Block, dict(target_modules=[]), ValueError, "list of non-empty strings"),
        (Block, dict(target_modules="("), ValueError, "nor a regular expression"),
        (lambda: nn.ReLU(), {}, ValueError, "it has no linear layer"),
        (lambda: nn.Sequential(nn.ReLU()), dict(target_modules=["0"]), ValueError, "no nn.Linear .* only torch.nn.modules.activation.ReLU"),
        (lambda: tied(False), {}, ValueError, r"'a\.weight' and 'b\.weight' are one parameter"),
        (lambda: tied(True), dict(target_modules=["b"]), ValueError, r"'a\.weight' and 'b\.weight' are one parameter"),
        (with_own_parameter, {}, ValueError, r"'own' and 'o_proj\.weight' are one parameter"),
        (sharded, {}, TypeError, "'o_proj' has a sharded weight, and no module of FSDP2"),
        (with_forward_replaced, {}, ValueError, "the forward method of 'o_proj' has been replaced"),
        (Block, dict(share="q_proj"), ValueError, "share must be 'auto', None or lists of names .* got 'q_proj'"),
        (Block, dict(share=""), ValueError, "share must be"),
        (Block, dict(share=["q_proj", "k_proj"]), ValueError, "share must be"),
        (Block, dict(share=[["q_proj", 1]]), ValueError, "share must be"),
        (Block, dict(share=True), ValueError, "share must be"),
        (Block, dict(share=7), ValueError, "share must be"),
        (Block, dict(share=[["q_proj", "w_proj"]]), ValueError, "share names 'w_proj', which no converted layer is called"),
        (Block, dict(share=[["q_proj", "k_proj"]], target_modules=["k_proj"]), ValueError, "share names 'q_proj'"),
        (
            lambda: nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(8, 4)}),
            dict(share=[["a", "b"]]),
            ValueError,
            "share puts 'a' and 'b' together, whose in_features are 6 and 8",
        ),
        (Model, dict(share=[["layers.0.q_proj"]]), ValueError, "use the last part of its name"),
    ],
)
def test_what_is_refused_leaves_the_model_untouched(model, options, error, message):
    model = model()
    before = photograph(model)
    with pytest.raises(error, match=message):
        lrk.to_subspace(model, **({"rank": 2} | options))
    check_untouched(model, before)


def test_converting_twice():
    model = lrk.to_subspace(Model(), rank=4, target_modules=["q_proj"])
    before = photograph(model)
    with pytest.raises(ValueError, match=r"'layers\.0\.q_proj' is a SubspaceLinear of rank 4 already; .*to_dense\(model\) first"):
        lrk.to_subspace(model, rank=2)
    check_untouched(model, before)
    lrk.to_subspace(model, rank=2, target_modules=["o_proj"])
    assert [model.layers[0].q_proj.subspace.rank, model.layers[0].o_proj.subspace.rank] == [4, 2]


# Who shares P.


def sharing(model):
    """Sets of names of layers with one Subspace."""
    groups = {}
    for name in converted(model):
        groups.setdefault(model.get_submodule(name).subspace, set()).add(name)
    assert all(subspace.layers == len(names) for subspace, names in groups.items())
    return sorted(map(sorted, groups.values()))


@pytest.mark.parametrize(
    "share, expected",
    [
        ("auto", [["k_proj", "q_proj", "v_proj"], ["o_proj"]]),
        (None, [["k_proj"], ["o_proj"], ["q_proj"], ["v_proj"]]),
        ([], [["k_proj"], ["o_proj"], ["q_proj"], ["v_proj"]]),
        ([["q_proj", "o_proj"]], [["k_proj"], ["o_proj", "q_proj"], ["v_proj"]]),
        ((("q_proj", "o_proj"), ["k_proj", "v_proj"]), [["k_proj", "v_proj"], ["o_proj", "q_proj"]]),
    ],
)
def test_sharing(share, expected):
    assert sharing(lrk.to_subspace(Block(), rank=4, share=share)) == expected


def test_layers_that_cannot_share_do_not():
    """Another dtype or parent."""
    model = nn.ModuleDict(
        {"a": nn.Linear(6, 4), "b": nn.Linear(6, 4), "c": nn.Linear(8, 4), "d": nn.Linear(6, 4).double(), "e": nn.ModuleDict()}
    )
    model["e"]["a"] = nn.Linear(6, 4)
    lrk.to_subspace(model, rank=2, share=[["a", "b", "d"]])
    assert sharing(model) == [["a", "b"], ["c"], ["d"], ["e.a"]]


# P.


def test_p_is_a_function_of_the_seed_and_the_name():
    whole, part, other = Model(), Model(blocks=1), Model()
    lrk.to_subspace(whole, rank=4, share=None)
    lrk.to_subspace(part, rank=4, share=None, target_modules=["v_proj"])
    lrk.to_subspace(other, rank=4, share=None, seed=1)
    assert torch.equal(projection(whole.layers[0].v_proj), projection(part.layers[0].v_proj))
    drawn = [projection(model.get_submodule(name)) for model in (whole, other) for name in converted(model)]
    for index, P in enumerate(drawn):
        assert not any(torch.equal(P, earlier) for earlier in drawn[:index])


class Wrapper(nn.Module):
    """Puts `module.` in front of names, as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile, lambda m: Wrapper(torch.compile(m)), lambda m: torch.compile(Wrapper(m))])
def test_prefixes_of_wrappers_are_no_part_of_a_name(wrap):
    plain, wrapped = Model(), Model()
    lrk.to_subspace(plain, rank=4)
    lrk.to_subspace(wrap(wrapped), rank=4, target_modules=r"layers\.\d\.._proj")
    assert converted(wrapped) == converted(plain) == LINEAR
    for name in LINEAR:
        assert torch.equal(projection(plain.get_submodule(name)), projection(wrapped.get_submodule(name)))


def test_a_child_called_module_is_no_wrapper():
    model = Wrapper(nn.Sequential(nn.Linear(6, 4)))
    model.add_module("0", nn.Linear(6, 4))
    lrk.to_subspace(model, rank=2)
    assert converted(model) == ["module.0", "0"]
    assert not torch.equal(projection(model.module[0]), projection(model.get_submodule("0")))


# The way back.


def test_to_dense():
    model = Model()
    identities = {name: id(module) for name, module in model.named_modules()}
    calls = []
    model.layers[0].q_proj.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    lrk.to_subspace(model, rank=4)
    model(torch.arange(4)).sum().backward()
    assert lrk.to_dense(model) is model
    assert {name: id(module) for name, module in model.named_modules()} == identities
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad
        assert layer_of(p) is None
    assert all(type(model.get_submodule(name)) is nn.Linear for name in LINEAR)
    model(torch.arange(4)).sum().backward()
    assert len(calls) == 2 and model.layers[0].q_proj.weight.grad is not None
    assert lrk.to_dense(model) is model, "there may be nothing to do"


def test_round_trips_to_other_ranks():
    model = Block()
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = model(x)
    for rank, share in ((4, "auto"), (12, None), (1, "auto")):
        lrk.to_subspace(model, rank=rank, share=share)
        assert model.q_proj.coordinates.shape == (rank, 12) and torch.equal(model(x), expected)
        model(x).sum().backward()
        lrk.to_dense(model)
    assert torch.equal(model(x), expected)


def test_a_part_of_those_that_share_goes_back():
    model = lrk.to_subspace(Block(), rank=4)
    lrk.to_dense(model.k_proj)
    assert model.q_proj.subspace.layers == 2 and model.q_proj.subspace is model.v_proj.subspace
    lrk.to_dense(model)
    assert not converted(model)


def test_old_gradients_of_a_weight_are_gone():
    layer = nn.Linear(6, 4)
    layer(torch.randn(3, 6)).sum().backward()
    lrk.to_subspace(layer, rank=2)
    assert layer.weight.grad is None and layer.bias.grad is not None
