"""OptimizerFactory in Hugging Face's Trainer: it trains as the same optimizer in a loop of one's own, and
works with what Trainer offers."""

import importlib.util
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from tiny import difference, llama, losses, optimizer_of, trainer, weights
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import get_linear_schedule_with_warmup

import lowrank_kernels as lrk
from lowrank_kernels.integrations.transformers import DiagnosticsCallback, OptimizerFactory
from lowrank_kernels.optim.named import NAMED

METHODS = [method for method in NAMED if method != "rso"]
SLOW = [method for method in METHODS if method not in ("galore", "i3s", "fira")]
EACH = pytest.mark.parametrize("method", [pytest.param(method, marks=[pytest.mark.slow] * (method in SLOW)) for method in NAMED])


def keys_of(method, **options):
    return dict(method=method, **options) | (dict(update_proj_gap=3) if method != "rso" else dict(inner_steps=3))


def run(folder, method="i3s", resume=None, model=None, keys=None, scaler=None, **options):
    keys = keys_of(method, **(keys or {}))
    built = trainer(folder, model=model, **options)
    if scaler is not None:  # accelerate itself scales and unscales with fp16 on a GPU alone
        built.accelerator.scaler = scaler
        built.accelerator.unscale_gradients = lambda: scaler.unscale_(optimizer_of(built))
    built.optimizer_cls_and_kwargs = OptimizerFactory, dict(rank=8) | keys
    built.train(resume_from_checkpoint=resume)
    return built


@EACH
def test_training_learns(tmp_path, method):
    trained = run(tmp_path, method, learning_rate=2e-3 if "apollo" in method or method == "rso" else 1e-2, max_steps=16)
    assert losses(trained)[-1] < 0.9 * losses(trained)[0]
    assert type(optimizer_of(trained)) is NAMED[method][0]


@pytest.mark.parametrize("method", ["i3s", "rso"])
def test_training_is_that_of_a_loop_of_ones_own(tmp_path, shows, method):
    """Bit for bit: the same optimizer, schedule, clipping, accumulation and order of batches."""
    options = dict(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, warmup_steps=2, gradient_accumulation_steps=2)
    trained = run(tmp_path, method, max_steps=4, **options)
    model = llama()
    if method == "rso":
        lrk.to_subspace(model, rank=8)
        coordinates = [param for name, param in model.named_parameters() if name.endswith("coordinates")]
        groups = [{"params": [param for param in model.parameters() if param.requires_grad and param not in set(coordinates)]}]
        groups.append({"params": coordinates})
    else:
        groups = lrk.param_groups(model, rank=8, update_proj_gap=3)
    norms = {param for name, param in model.named_parameters() if "norm" in name}
    split = []
    for group in reversed(groups):
        for decay in (0.1, 0.0):
            if params := [param for param in group["params"] if (param in norms) == (decay == 0)]:
                split.append({**group, "params": params, "weight_decay": decay})
    own = dict(inner_steps=3) if method == "rso" else {}
    optimizer = NAMED[method][0](split, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, **own)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 4)
    batches = list(trainer(tmp_path, **options).get_train_dataloader())
    for step in range(4):
        both = batches[2 * step : 2 * step + 2]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in both)
        for batch in both:
            model(**batch, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert difference(weights(trained), model.state_dict()) == 0
    assert difference(weights(trained), llama().state_dict()) > 1e-3
    shows("Trainer", method.upper(), "accumulation", "clipping")


def test_options_come_from_training_arguments_unless_they_are_given(tmp_path):
    options = dict(max_steps=1, weight_decay=0.1, adam_beta1=0.7, adam_epsilon=1e-5, lr_scheduler_type="constant")
    trained = run(tmp_path, keys=dict(state_bits=8, dense_lr=1e-3), **options)
    low_rank, decaying, rest = optimizer_of(trained).param_groups
    assert [group["weight_decay"] for group in (low_rank, decaying, rest)] == [0.1, 0.1, 0.0]
    assert [group["lr"] for group in (low_rank, decaying, rest)] == [1e-2, 1e-3, 1e-3]
    assert low_rank["betas"] == (0.7, 0.999) and low_rank["eps"] == 1e-5 and low_rank["state_bits"] == 8
    assert all("norm" in name for name in rest["param_names"])
    assert decaying["param_names"] == ["model.embed_tokens.weight", "lm_head.weight"]
    given = dict(lr=3e-3, betas=[0.6, 0.9], eps=1e-4, weight_decay=0.3)
    low_rank = optimizer_of(run(tmp_path, keys=given, **options)).param_groups[0]
    assert low_rank["betas"] == (0.6, 0.9)
    assert [low_rank[key] for key in ("lr", "eps", "weight_decay")] == [3e-3, 1e-4, 0.3]


@pytest.mark.parametrize(
    "targets, keys, expected",
    [
        (None, {}, 14),
        ("all-linear", {}, 14),
        ("all_linear", dict(head=True), 15),
        (["q_proj", "mlp"], {}, 8),
        (r".*layers\.0.*(q|k)_proj", {}, 2),
        (["q_proj"], dict(target_modules="all-linear"), 14),
    ],
    ids=str,
)
def test_targets_are_spelled_as_hugging_face_does(tmp_path, targets, keys, expected):
    trained = run(tmp_path, keys=keys, max_steps=1, optim_target_modules=targets)
    low_rank = [group for group in optimizer_of(trained).param_groups if "rank" in group]
    assert sum(len(group["params"]) for group in low_rank) == expected


@pytest.mark.parametrize("method", ["i3s", "rso"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, shows, method, precision):
    options = dict(save_strategy="steps", save_steps=4, bf16=precision == "bf16", max_steps=8)
    whole = run(tmp_path / "a", method, keys=dict() if method == "rso" else dict(state_bits=8), **options)
    keys = dict() if method == "rso" else dict(state_bits=8)
    again = run(tmp_path / "b", method, resume=str(tmp_path / "a" / "checkpoint-4"), keys=keys, model=llama(seed=1), **options)
    assert difference(weights(whole), weights(again)) == 0
    assert losses(whole)[-4:] == losses(again)[-4:]
    shows("Trainer", method.upper(), "resume")


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    for method in ("i3s", "rso"):
        options = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True)
        trained = run(tmp_path / method, method, learning_rate=0.3, **options)
        evaluated = [row["eval_loss"] for row in trained.state.log_history if "eval_loss" in row]
        assert trained.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)


@pytest.mark.parametrize("method", ["i3s", "rso"])
@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_checkpointing=True),
        dict(torch_compile=True, torch_compile_backend="eager"),
        dict(lr_scheduler_type="cosine", warmup_steps=2),
        dict(max_grad_norm=0.0),
        dict(optim_target_modules=["q_proj", "v_proj"]),
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_trainer_offers_works(tmp_path, method, options):
    trained = run(tmp_path, method, max_steps=8, **options)
    assert losses(trained)[-1] < losses(trained)[0]


def test_checkpointing_changes_nothing(tmp_path):
    runs = [weights(run(tmp_path, gradient_checkpointing=on)) for on in (False, True)]
    assert difference(*runs) == 0


class Scaled(torch.amp.GradScaler):
    """A GradScaler of the CPU. Trainer makes one for GPUs alone."""

    def __init__(self):
        super().__init__("cpu", init_scale=2.0**10, growth_interval=1000)


@pytest.mark.parametrize("method", ["i3s", "rso"])
def test_a_scaler_changes_nothing_but_the_range(tmp_path, method):
    """The scale is a power of two."""
    plain, scaled = run(tmp_path, method), run(tmp_path, method, scaler=Scaled())
    assert difference(weights(plain), weights(scaled)) == 0


class TestInBackward:
    def test_projected_gradients_train_alike(self, tmp_path, shows):
        plain = run(tmp_path, max_grad_norm=0.0)
        for update in ("deferred", "immediately"):
            other = run(tmp_path, keys=dict(in_backward=update), max_grad_norm=0.0)
            assert difference(weights(plain), weights(other)) == 0
            assert optimizer_of(other)._in_backward is None  # it ends with the training
        shows("Trainer", "I3S", "in_backward")

    def test_the_norm_that_trainer_logs_is_that_of_r(self, tmp_path):
        """‖R‖ ≤ ‖G‖ of the projected parameters."""

        def norms(built):
            return [row["grad_norm"] for row in built.state.log_history if "grad_norm" in row]

        plain, inside = run(tmp_path, max_grad_norm=1e9), run(tmp_path, keys=dict(in_backward="deferred"), max_grad_norm=1e9)
        assert all(0.1 * whole < of_r < whole for whole, of_r in zip(norms(plain), norms(inside), strict=True))

    def test_a_second_training_goes_on(self, tmp_path):
        built = run(tmp_path, keys=dict(in_backward="deferred"))
        built.args.max_steps, optimizer = 8, optimizer_of(built)
        built.train()
        assert optimizer_of(built) is optimizer and optimizer._in_backward is None

    def test_accumulation_and_clipping(self, tmp_path):
        options = dict(max_grad_norm=0.0, gradient_accumulation_steps=2)
        blind = dict(selection="random")  # bases that no last bit of a gradient turns
        free = run(tmp_path, "adam-mini", keys=dict(in_backward="deferred") | blind, **options)
        clipped = run(tmp_path, "adam-mini", keys=dict(in_backward="deferred") | blind, **(options | dict(max_grad_norm=1e-3)))
        assert difference(weights(free), weights(run(tmp_path, "adam-mini", keys=blind, **options))) < 1e-4
        assert difference(weights(free), weights(clipped)) > 1e-3

    def test_with_a_scaler(self, tmp_path):
        options = dict(keys=dict(in_backward="deferred"), max_grad_norm=0.5)
        assert difference(weights(run(tmp_path, **options)), weights(run(tmp_path, scaler=Scaled(), **options))) == 0

    @pytest.mark.parametrize(
        "keys, options, words",
        [
            (dict(in_backward="immediately"), {}, r"set TrainingArguments\(max_grad_norm=0\), or use 'deferred'"),
            (dict(in_backward="later"), dict(max_grad_norm=0.0), "one of deferred, immediately, got 'later'"),
            (dict(in_backward="immediately"), dict(max_grad_norm=0.0, gradient_accumulation_steps=2), "one backward pass a step"),
        ],
        ids=str,
    )
    def test_what_does_not_go_together_is_refused(self, tmp_path, keys, options, words):
        with pytest.raises(ValueError, match=words):
            run(tmp_path, keys=keys, **options)


@pytest.mark.parametrize(
    "keys, error, words",
    [
        (dict(method="adamw"), ValueError, "method must be one of galore, i3s, .*, got 'adamw'"),
        (dict(method="i3s", update_gap=3), ValueError, "unknown option 'update_gap'.*did you mean 'update_proj_gap'"),
        (dict(method="rso", update_proj_gap=3), (TypeError, ValueError), "update_proj_gap"),
        (dict(method="i3s", target_modules=["q_proj"], head=True), ValueError, "head=True is for target_modules='all-linear'"),
    ],
    ids=str,
)
def test_mistakes_are_refused_in_words(tmp_path, keys, error, words):
    built = trainer(tmp_path)
    built.optimizer_cls_and_kwargs = OptimizerFactory, dict(rank=8) | keys
    with pytest.raises(error, match=words):
        built.train()


def test_a_model_that_is_converted_already(tmp_path):
    def converted():
        return lrk.to_subspace(llama(), rank=8)

    assert difference(weights(run(tmp_path, "rso")), weights(run(tmp_path, "rso", model=converted()))) == 0
    built = trainer(tmp_path, model=converted())
    for keys, words in ((dict(rank=4), "with rank 8 before, and got rank=4"), (dict(rank=8, seed=1), "rank=8, seed=1")):
        built.optimizer_cls_and_kwargs = OptimizerFactory, dict(method="rso") | keys
        with pytest.raises(ValueError, match=words):
            built.train()


def test_a_refused_optimizer_leaves_the_model_as_it_was(tmp_path):
    built = trainer(tmp_path)
    built.optimizer_cls_and_kwargs = OptimizerFactory, dict(method="rso", rank=8, momentum=2.0)
    with pytest.raises(ValueError, match="momentum"):
        built.train()
    assert not any(isinstance(module, lrk.SubspaceLinear) for module in built.model.modules())


class Flat(FullyShardedDataParallel):
    """A model of FSDP1, without the processes that make one."""

    training_state = None

    def __init__(self, model):
        torch.nn.Module.__init__(self)
        self.model = model


def test_what_keeps_flat_pieces_is_refused(tmp_path):
    built = trainer(tmp_path, dict(method="i3s"))
    with pytest.raises(ValueError, match="FSDP1 keeps flat pieces of matrices.*use FSDP2"):
        built.create_optimizer(Flat(llama()))
    built.is_deepspeed_enabled = True  # as its file, or accelerate's launcher, makes it
    with pytest.raises(ValueError, match="DeepSpeed keeps flat pieces of matrices.*use FSDP2"):
        built.create_optimizer()


def test_optim_args_are_not_lost(tmp_path):
    with pytest.raises(ValueError, match="optim_args='rank=4' are for Trainer's own optimizers, and would be lost"):
        run(tmp_path, optim_args="rank=4")


def test_older_trainers_are_refused_by_their_version(monkeypatch):
    """They would call the factory with groups, as if it were an optimizer."""
    from lowrank_kernels.integrations import transformers as module

    monkeypatch.setitem(sys.modules, "transformers.trainer_optimizer", None)
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    with pytest.raises(ImportError, match="needs transformers of version 5.2 or newer"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_without_a_trainer_it_says_so():
    with pytest.raises(RuntimeError, match="no Trainer calls this OptimizerFactory"):
        OptimizerFactory()(llama(), method="i3s", rank=8)


def test_what_refreshes_have_found_is_logged(tmp_path):
    built = trainer(tmp_path, dict(method="galore", diagnostics=True))
    built.add_callback(DiagnosticsCallback(built))
    built.train()
    rows = [row for row in built.state.log_history if "captured_energy/mean" in row]
    assert len(rows) == 6 and len(losses(built)) == 6
    assert 0 < rows[-1]["overlap/mean"] <= 1.001
    assert "overlap/model.layers.0.mlp.up_proj.weight" in rows[-1] and "overlap/mean" not in rows[0]
    built = trainer(tmp_path, dict(method="galore"))
    built.add_callback(DiagnosticsCallback(built))
    with pytest.raises(ValueError, match="diagnostics=True"):
        built.train()
