"""`install` puts this package in the place of galore_torch and apollo_torch, for imports and in Trainer."""

import importlib
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from tiny import arguments, difference, llama, losses, optimizer_of, trainer, weights
from transformers import Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import lowrank_kernels as lrk
from lowrank_kernels.integrations import galore_torch

TARGETS = dict(optim_target_modules=["attn", "mlp"])
OPTIONS = TARGETS | dict(optim_args="rank=8,update_proj_gap=3,scale=0.5", learning_rate=5e-3, max_steps=10)


@pytest.fixture(autouse=True)
def installed():
    galore_torch.install()
    yield
    galore_torch.uninstall()


def run(folder, optim, resume=None, seed=0, **options):
    built = trainer(folder, optim=optim, model=llama(seed), **(OPTIONS | options))
    built.train(resume_from_checkpoint=resume)
    return built


def test_imports_resolve_here():
    module = importlib.import_module("galore_torch")
    assert module.GaLoreAdamW is galore_torch.GaLoreAdamW
    from galore_torch import GaLoreAdafactor, GaLoreAdamW8bit

    assert issubclass(GaLoreAdamW8bit, lrk.GaLoreAdamW) and issubclass(GaLoreAdafactor, lrk.LowRankAdafactor)
    galore_torch.install()  # a second time changes nothing
    galore_torch.uninstall()
    assert getattr(sys.modules.get("galore_torch"), "GaLoreAdamW", None) is not galore_torch.GaLoreAdamW


CLASSES = {
    "galore_adamw": (lrk.GaLoreAdamW, dict(state_bits=32)),
    "galore_adamw_8bit": (lrk.GaLoreAdamW, dict(state_bits=8)),
    "galore_adafactor": (lrk.LowRankAdafactor, dict(selection="dominant", first_moment=False)),
    "apollo_adamw": (lrk.LowRankAdamW, dict(lift="channel_scaling", selection="gaussian")),
}


@pytest.mark.parametrize("optim", CLASSES)
def test_trainers_names_train_with_this_package(tmp_path, optim):
    trained = run(tmp_path, optim)
    kind, keys = CLASSES[optim]
    optimizer = optimizer_of(trained)
    dense, low_rank = optimizer.param_groups
    assert isinstance(optimizer, kind) and {key: low_rank[key] for key in keys} == keys
    assert low_rank["rank"] == 8 and low_rank["update_proj_gap"] == 3 and len(low_rank["params"]) == 14
    assert low_rank["scale"] == (0.5 if "galore" in optim else 0.5**0.5)
    assert losses(trained)[-1] < losses(trained)[0]


def test_apollo_mini(tmp_path):
    trained = run(tmp_path, "apollo_adamw", optim_args="rank=1,scale_type=tensor,scale=128", learning_rate=1e-3)
    low_rank = optimizer_of(trained).param_groups[1]
    assert low_rank["lift"] == "tensor_scaling" and low_rank["scale"] == 128**0.5
    with pytest.raises(ValueError, match="scale_type must be one of 'channel', 'tensor', got 'row'"):
        run(tmp_path, "apollo_adamw", optim_args="rank=1,scale_type=row")


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "apollo_adamw_layerwise"])
def test_layerwise_variants_train(tmp_path, optim):
    built = trainer(tmp_path, optim=optim, **OPTIONS)
    built.train()
    assert isinstance(optimizer_of(built), LayerWiseDummyOptimizer)
    kinds = {type(each) for each in optimizer_of(built).optimizer_dict.values()}
    assert all(issubclass(kind, lrk.LowRankAdamW) for kind in kinds)
    assert losses(built)[-1] < losses(built)[0]


def test_layerwise_adafactor_needs_no_further_options(tmp_path):
    with pytest.warns(UserWarning, match="pass scale_parameter=False"):
        assert len(losses(run(tmp_path, "galore_adafactor_layerwise"))) == 10


def test_the_scheduler_moves_the_rate_of_layerwise_optimizers_or_trainer_logs_it(tmp_path):
    trained = run(tmp_path, "galore_adamw", lr_scheduler_type="cosine", warmup_steps=2)
    rates = [row["learning_rate"] for row in trained.state.log_history if "learning_rate" in row]
    assert rates[0] < rates[2] > rates[-1] > 0
    trained = run(tmp_path, "galore_adamw_layerwise", lr_scheduler_type="cosine", warmup_steps=2)
    rates = [row["learning_rate"] for row in trained.state.log_history if "learning_rate" in row]
    assert max(rates) == OPTIONS["learning_rate"] and len(set(rates)) > 1


@pytest.mark.parametrize(
    "targets, count",
    [("all-linear", 15), ("all_linear", 15), (r".*layers\.1.*(gate|up)_proj", 2), (["q_proj", r".*mlp.*"], 8), (["mlp"], 6)],
    ids=str,
)
def test_targets_are_trainers(tmp_path, targets, count):
    """Its "all-linear" has the head among them."""
    trained = run(tmp_path, "galore_adamw", optim_target_modules=targets, max_steps=1)
    assert len(optimizer_of(trained).param_groups[1]["params"]) == count


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(optim_target_modules=None), ValueError, "optim_target_modules"),
        (dict(optim_target_modules=["nothing"]), ValueError, "No target modules found"),
        (dict(optim_args="rank=8,proj_type=full"), ValueError, "proj_type must be one of"),
        (dict(optim="galore_adamw_layerwise", gradient_accumulation_steps=2), ValueError, "gradient accumulation"),
    ],
    ids=str,
)
def test_what_trainer_or_this_package_refuses(tmp_path, options, error, words):
    options = dict(options)
    with pytest.raises(error, match=words):
        run(tmp_path, options.pop("optim", "galore_adamw"), **options)


def test_layerwise_variants_are_refused_in_several_processes(tmp_path, monkeypatch):
    from transformers.training_args import ParallelMode, TrainingArguments

    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(NotImplementedError, match="does not support DDP"):
        Trainer(llama(), arguments(tmp_path, optim="galore_adamw_layerwise", **TARGETS)).create_optimizer()


@pytest.mark.parametrize("optim", CLASSES)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, shows, optim):
    options = dict(save_strategy="steps", save_steps=5, gradient_accumulation_steps=2, max_grad_norm=0.5)
    whole = run(tmp_path / "a", optim, **options)
    again = run(tmp_path / "b", optim, resume=str(tmp_path / "a" / "checkpoint-5"), seed=1, **options)
    assert difference(weights(whole), weights(again)) == 0
    assert losses(whole)[-5:] == losses(again)[-5:]
    shows('Trainer, `optim="galore_adamw"` …', f"`{optim}`", "accumulation", "clipping", "resume")


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_a_layerwise_run_is_not_resumed(tmp_path, optim):
    """It would go on from zero moments, of which Trainer saves none."""
    run(tmp_path, optim, save_strategy="steps", save_steps=5)
    with pytest.raises(RuntimeError, match="no moments of layer-wise optimizers.*in_backward='immediately', which is layer-wise and can"):
        run(tmp_path, optim, resume=str(tmp_path / "checkpoint-5"))
    galore_torch.uninstall()
    assert "load_state_dict" not in vars(LayerWiseDummyOptimizer)


class TestArguments:
    """Those of galore_torch 1.0."""

    def groups(self):
        return [dict(params=[torch.nn.Parameter(torch.ones(12, 8))], rank=4)]

    def test_defaults(self):
        assert galore_torch.GaLoreAdamW(self.groups()).param_groups[0]["eps"] == 1e-6
        low_rank = galore_torch.GaLoreAdamW8bit(self.groups()).param_groups[0]
        assert (low_rank["weight_decay"], low_rank["eps"], low_rank["state_bits"]) == (1e-2, 1e-8, 8)
        low_rank = galore_torch.GaLoreAdafactor(self.groups(), lr=1e-2, beta1=0.8, scale_parameter=False).param_groups[0]
        assert low_rank["betas"][0] == 0.8 and low_rank["first_moment"]

    @pytest.mark.parametrize(
        "kind, options, words",
        [
            ("GaLoreAdamW", dict(correct_bias=False), "correct_bias"),
            ("GaLoreAdamW8bit", dict(is_paged=True), "is_paged"),
            ("GaLoreAdamW8bit", dict(percentile_clipping=5), "percentile_clipping"),
            ("GaLoreAdafactor", {}, "pass lr"),
            ("GaLoreAdafactor", dict(lr=1e-3, relative_step=True), "relative_step=False"),
            ("GaLoreAdafactor", dict(lr=1e-3, scale_parameter=True), "scale_parameter"),
            ("GaLoreAdafactor", dict(lr=1e-3, scale_parameter=False, eps=(1e-8, 1e-3)), r"eps\[0\]"),
        ],
        ids=str,
    )
    def test_what_has_no_counterpart_is_refused(self, kind, options, words):
        with pytest.raises(ValueError, match=words):
            getattr(galore_torch, kind)(self.groups(), **options)
