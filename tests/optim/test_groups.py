"""Bad input at construction, defaults, warnings, and which parameters `param_groups` projects."""

import warnings

import pytest
import torch
from torch import nn

import lowrank_kernels as lrk


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def group(**keys):
    return {"params": [parameter(8, 9)], "rank": 4, **keys}


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (dict(rank=0), ValueError, "rank must be a positive int, got 0"),
        (dict(rank=-3), ValueError, "rank must be a positive int, got -3"),
        (dict(rank=4.0), TypeError, "rank must be a positive int, got 4.0"),
        (dict(rank=True), TypeError, "rank must be a positive int, got True"),
        (dict(rank=None), TypeError, "rank must be a positive int, got None"),
        (dict(update_proj_gap=0), ValueError, "update_proj_gap must be a positive int, got 0"),
        (dict(update_proj_gap=-1), ValueError, "update_proj_gap must be a positive int, got -1"),
        (dict(update_proj_gap=2.5), TypeError, "update_proj_gap must be a positive int, got 2.5"),
        (dict(stagger=1), TypeError, "stagger must be True or False, got 1"),
        (dict(stagger="yes"), TypeError, "stagger must be True or False, got 'yes'"),
        (dict(stagger=None), TypeError, "stagger must be True or False, got None"),
        (
            dict(selection="importanse"),
            ValueError,
            "selection must be one of 'importance', 'dominant', 'random', 'gaussian', got 'importanse'",
        ),
        (dict(selection="importanse"), ValueError, "did you mean 'importance'"),
        (dict(svd="full"), ValueError, "svd must be one of 'randomized', 'exact', got 'full'"),
        (dict(svd=None), ValueError, "svd must be one of"),
        (dict(proj_type="rigth"), ValueError, "did you mean 'right'"),
        (dict(oversample=-1), ValueError, "oversample must be an int ≥ 0, got -1"),
        (dict(power_iters=1.5), TypeError, "power_iters must be an int ≥ 0, got 1.5"),
        (dict(seed="a"), TypeError, "seed must be an int, got 'a'"),
        (dict(scale="big"), TypeError, "scale must be a float, got 'big'"),
        (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
        (dict(lr=-1e-3), ValueError, "lr must be finite and ≥ 0, got -0.001"),
        (dict(lr=float("nan")), ValueError, "lr must be finite and ≥ 0, got nan"),
        (dict(lr="fast"), TypeError, "lr must be a float, got 'fast'"),
        (dict(lr=torch.ones(2)), ValueError, "lr must be a float or a one-element tensor"),
        (dict(eps=-1e-8), ValueError, "eps must be finite and ≥ 0, got -1e-08"),
        (dict(weight_decay=-0.1), ValueError, "weight_decay must be finite and ≥ 0, got -0.1"),
        (dict(betas=(0.9, 1.0)), ValueError, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        (dict(betas=(-0.1, 0.9)), ValueError, r"betas must lie in \[0, 1\)"),
        (dict(betas=0.9), TypeError, "betas must be two floats, got 0.9"),
        (dict(update_proj_gab=10), ValueError, "unknown key 'update_proj_gab' .* did you mean 'update_proj_gap'"),
    ],
)
def test_bad_low_rank_groups(bad, error, message):
    with pytest.raises(error, match=message) as caught:
        lrk.LowRankAdamW([{"params": [parameter(3)]}, group(**bad)])
    assert "group 1" in str(caught.value)


@pytest.mark.parametrize("bad", [dict(lr=-1.0), dict(eps=-1.0), dict(weight_decay=-1.0), dict(betas=(0.9, 1.5))])
def test_bad_hyperparameters_in_dense_groups_and_defaults(bad):
    with pytest.raises(ValueError, match="group 0"):
        lrk.LowRankAdamW([{"params": [parameter(3)], **bad}])
    with pytest.raises(ValueError, match="group 0"):
        lrk.LowRankAdamW([parameter(3)], **bad)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (parameter(7), ValueError, r"got a 1-D parameter \(group 1, parameter 1 of shape \(7,\)\); put it in a group without rank"),
        (parameter(), ValueError, r"got a 0-D parameter"),
        (parameter(0, 4), ValueError, "empty parameter"),
        (parameter(4, 4, dtype=torch.complex64), TypeError, "real floating-point parameters, got torch.complex64"),
    ],
)
def test_parameters_that_are_no_matrices(bad, error, message):
    with pytest.raises(error, match=message):
        lrk.LowRankAdamW([{"params": [parameter(3)]}, {"params": [parameter(8, 9), bad], "rank": 2}])


def test_low_rank_keys_without_rank():
    with pytest.raises(ValueError, match="update_proj_gap is set but rank is not .* add rank"):
        lrk.LowRankAdamW([{"params": [parameter(4, 4)], "update_proj_gap": 10}])


def test_the_selection_of_a_named_class_is_fixed():
    assert lrk.GaLoreAdamW([group()]).param_groups[0]["selection"] == "dominant"
    assert lrk.I3SAdamW([group()]).param_groups[0]["selection"] == "importance"
    assert lrk.GaLoreAdamW([group(selection="dominant")])
    with pytest.raises(ValueError, match="selection is 'importance' but this optimizer's is 'dominant'"):
        lrk.GaLoreAdamW([group(selection="importance")])


def test_defaults_are_the_documented_ones():
    (found,) = lrk.LowRankAdamW([group()]).param_groups
    documented = dict(
        update_proj_gap=200,
        stagger=False,
        scale=0.25,
        proj_type="std",
        selection="importance",
        svd="randomized",
        oversample=8,
        power_iters=1,
        seed=0,
    )
    assert {key: found[key] for key in documented} == documented
    assert (found["lr"], found["betas"], found["eps"], found["weight_decay"]) == (1e-3, (0.9, 0.999), 1e-8, 0.0)


def test_foreign_keys_of_common_scripts_pass():
    lrk.LowRankAdamW([group(name="attention", initial_lr=0.1, lr_scale=1.0, swa_lr=0.1), {"params": [parameter(3)], "anything": 1}])


def test_rank_is_clamped_with_one_warning_a_shape():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = lrk.LowRankAdamW(
            [{"params": [parameter(8, 9), parameter(8, 9), parameter(5, 20), parameter(90, 90), parameter(16, 20)], "rank": 16}]
        )
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert "rank 16 is more than the shorter side of group 0, parameter 0 of shape (8, 9); rank 8 is used" in messages[0]
    assert caught[0].filename == __file__
    small = optimizer.param_groups[0]["params"][0]
    small.grad = torch.randn(8, 9)
    optimizer.step()
    assert optimizer.state[small]["basis"].shape == (8, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.mlp, self.norm = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.layers, self.lm_head = nn.Embedding(20, 8), nn.ModuleList([Block(), Block()]), nn.Linear(8, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


def names(model, groups, index=1):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in groups[index]["params"]]


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_out_the_head(tied):
    model = Model(tied)
    groups = lrk.param_groups(model, rank=4)
    expected = [f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("q_proj", "mlp.0", "mlp.1")]
    assert names(model, groups) == expected
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    lrk.LowRankAdamW(groups)


def test_an_output_head_of_another_name_is_left_out_where_the_model_tells():
    model = Model()
    model.get_output_embeddings = lambda: model.layers[1].q_proj
    assert "layers.1.q_proj.weight" not in names(model, lrk.param_groups(model, rank=4))


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["q_proj"], ["layers.0.q_proj.weight", "layers.1.q_proj.weight"]),
        (["layers.1", "lm_head"], ["layers.1.q_proj.weight", "layers.1.mlp.0.weight", "layers.1.mlp.1.weight", "lm_head.weight"]),
        (r"layers\.\d\.mlp\.1", ["layers.0.mlp.1.weight", "layers.1.mlp.1.weight"]),
        (r".*proj", ["layers.0.q_proj.weight", "layers.1.q_proj.weight"]),
    ],
)
def test_targets_by_name(targets, expected):
    model = Model()
    assert names(model, lrk.param_groups(model, rank=4, target_modules=targets)) == expected


def test_options_go_to_the_low_rank_group_only():
    dense, low_rank = lrk.param_groups(Model(), 4, update_proj_gap=10, scale=0.5, lr=0.1)
    assert set(dense) == {"params"} and low_rank["rank"] == 4 and low_rank["update_proj_gap"] == 10 and low_rank["lr"] == 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(target_modules=["qproj"]), r"target_modules=\['qproj'\] matches no module of Model; .* names like 'layers.0.q_proj'"),
        (dict(target_modules="mlp"), "matches no module"),
        (dict(target_modules=["norm", "embed"]), r"matches only modules without a linear weight of their own \(Embedding, LayerNorm\)"),
        (dict(target_modules="(unclosed"), "neither 'all-linear' nor a regular expression"),
        (dict(target_modules=[]), "must be 'all-linear', a regular expression or a list"),
        (dict(target_modules=[""]), "must be 'all-linear', a regular expression or a list"),
        (dict(update_proj_gab=3), "unknown option 'update_proj_gab' for param_groups; did you mean 'update_proj_gap'"),
    ],
)
def test_bad_targets(arguments, message):
    with pytest.raises(ValueError, match=message):
        lrk.param_groups(Model(), rank=4, **arguments)


def test_models_without_anything_to_project():
    with pytest.raises(ValueError, match="it has no linear layer"):
        lrk.param_groups(nn.Sequential(nn.LayerNorm(4)), rank=2)
    frozen = Model().requires_grad_(False)
    with pytest.raises(ValueError, match="matches only frozen parameters"):
        lrk.param_groups(frozen, rank=2)


def test_bare_linear_and_experts():
    assert len(lrk.param_groups(nn.Linear(4, 4), rank=2)[1]["params"]) == 1

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up, self.scale = nn.Parameter(torch.zeros(3, 8, 9)), nn.Parameter(torch.zeros(3))

    model = nn.ModuleDict({"experts": Experts(), "router": nn.Linear(8, 3)})
    assert names(model, lrk.param_groups(model, rank=2, target_modules=["experts"])) == ["experts.gate_up"]
    assert names(model, lrk.param_groups(model, rank=2)) == ["experts.gate_up", "router.weight"]


def test_convolutions_are_no_experts():
    model = nn.Sequential(nn.Conv1d(16, 16, 4))
    with pytest.raises(ValueError, match="matches only modules without a linear weight"):
        lrk.param_groups(model, rank=2, target_modules=["0"])


def test_parametrized_weights_are_refused_in_words():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="without a linear weight of their own"):
        lrk.param_groups(model, rank=2, target_modules=["0"])


def test_numbers_become_pythons_own():
    numpy = pytest.importorskip("numpy")
    (found,) = lrk.LowRankAdamW([group(rank=numpy.int64(3), scale=numpy.float64(0.5), lr=numpy.float64(0.1))]).param_groups
    assert [type(found[key]) for key in ("rank", "scale", "lr")] == [int, float, float]
