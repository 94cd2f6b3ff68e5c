"""Accelerate, Lightning, PEFT, TRL and torchtitan: a resumed run is the uninterrupted one, and accumulation
and clipping are those of a loop of one's own."""

import copy

import pytest
import torch

import lowrank_kernels as lrk

pytestmark = pytest.mark.slow
METHODS = ("I3S", "RSO")
EACH = pytest.mark.parametrize("method", METHODS)
STEPS, ACCUMULATE, CLIP = 6, 2, 0.05


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 24))


def optimizer_of(model, method):
    """Also converts the model for RSO."""
    if method == "RSO":
        return lrk.RSOAdamW(lrk.to_subspace(model, rank=6).parameters(), lr=1e-2, inner_steps=2)
    return lrk.I3SAdamW(lrk.param_groups(model, rank=6, update_proj_gap=2), lr=1e-2)


def data():
    return torch.randn(STEPS * ACCUMULATE * 8, 24, generator=torch.Generator().manual_seed(1))


def loss_of(model, x):
    return (model(x) - x.roll(1, -1)).square().mean()


def own_loop(method, batches, by_group=False):
    """by_group: whether clipping adds up the norms in the order of the optimizer's groups, as Lightning's."""
    model = network()
    optimizer = optimizer_of(model, method)
    clipped = [param for group in optimizer.param_groups for param in group["params"]] if by_group else list(model.parameters())
    for both in batches:
        for x in both.split(8):
            (loss_of(model, x) / ACCUMULATE).backward()
        torch.nn.utils.clip_grad_norm_(clipped, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestAccelerate:
    def build(self, method, seed=0):
        accelerate = pytest.importorskip("accelerate")
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=ACCUMULATE, cpu=True)
        model = network(seed)
        return accelerator, *accelerator.prepare(model, optimizer_of(model, method))

    def train(self, accelerator, model, optimizer, batches):
        for x in batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()

    @EACH
    def test_it_trains_and_resumes(self, tmp_path, shows, method):
        batches = data().split(8)
        built = self.build(method)
        self.train(*built, batches[:6])
        built[0].save_state(tmp_path)
        self.train(*built, batches[6:])
        assert same(built[1].state_dict(), own_loop(method, data().split(8 * ACCUMULATE)))
        again = self.build(method, seed=1)
        again[0].load_state(tmp_path)
        self.train(*again, batches[6:])
        assert same(built[1].state_dict(), again[1].state_dict())
        shows("Accelerate", method, "accumulation", "clipping", "resume")


class TestLightning:
    @EACH
    def test_it_trains_and_resumes(self, tmp_path, shows, method):
        lightning = pytest.importorskip("lightning")
        from lowrank_kernels.integrations.lightning import DiagnosticsCallback

        class Module(lightning.LightningModule):
            def __init__(self, seed=0):
                super().__init__()
                self.model = network(seed)
                self.own = optimizer_of(self.model, method)

            def training_step(self, x):
                return loss_of(self.model, x)

            def configure_optimizers(self):
                return self.own

        batches = data()[: 3 * ACCUMULATE * 8]

        def fit(module, epochs, folder, **options):
            saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_last=True)
            quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
            trainer = lightning.Trainer(
                max_epochs=epochs,
                accelerator="cpu",
                gradient_clip_val=CLIP,
                accumulate_grad_batches=ACCUMULATE,
                callbacks=[saving, DiagnosticsCallback()],
                default_root_dir=folder,
                **quiet,
            )
            trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=8), **options)
            return module.model.state_dict()

        whole = copy.deepcopy(fit(Module(), 2, tmp_path / "whole"))
        assert same(whole, own_loop(method, 2 * batches.split(8 * ACCUMULATE), by_group=True))
        fit(Module(), 1, tmp_path / "half")  # in the middle of an epoch Lightning itself begins the data anew
        assert same(whole, fit(Module(seed=1), 2, tmp_path / "rest", ckpt_path=tmp_path / "half" / "last.ckpt", weights_only=True))
        shows("Lightning", method, "accumulation", "clipping", "resume")


class TestPeft:
    def test_modules_that_are_trained_as_a_whole_in_trainer(self, tmp_path, shows):
        peft, _ = pytest.importorskip("peft"), pytest.importorskip("transformers")
        from tiny import difference, llama, trainer

        def model(seed):
            return peft.get_peft_model(llama(seed), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["mlp"]))

        def weights(built):
            return {name: param.detach().clone() for name, param in built.model.named_parameters() if param.requires_grad}

        options = dict(gradient_accumulation_steps=2, save_strategy="steps", save_steps=3)
        whole = trainer(tmp_path / "a", dict(method="i3s"), model=model(0), **options)
        start = weights(whole)
        whole.train()
        assert len(whole.optimizer.param_groups[0]["params"]) == 6
        again = trainer(tmp_path / "b", dict(method="i3s"), model=model(0), **options)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
        assert difference(weights(whole), weights(again)) == 0 and difference(weights(whole), start) > 1e-3
        shows("PEFT", "I3S", "accumulation", "clipping", "resume")


class TestTrl:
    @EACH
    def test_it_trains_and_resumes(self, tmp_path, shows, method):
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        from tiny import Tokens, difference, llama, losses, weights
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        from lowrank_kernels.integrations.transformers import OptimizerFactory

        tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")

        def build(folder, seed):
            options = dict(
                max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-2
            )
            keys = dict(method="i3s", update_proj_gap=2) if method == "I3S" else dict(method="rso", inner_steps=2)
            return trl.SFTTrainer(
                llama(seed),
                trl.SFTConfig(str(folder), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=4, **options),
                train_dataset=datasets.Dataset.from_dict({"input_ids": Tokens().rows.tolist()}),
                processing_class=tokenizer,
                optimizer_cls_and_kwargs=(OptimizerFactory, dict(rank=8) | keys),
            )

        whole = build(tmp_path / "a", 0)
        whole.train()
        assert losses(whole)[-1] < losses(whole)[0]
        again = build(tmp_path / "b", 1)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
        assert difference(weights(whole), weights(again)) == 0
        shows("TRL", method, "accumulation", "clipping", "resume")


class TestTorchtitan:
    def build(self, seed=0):
        titan = pytest.importorskip("torchtitan.components.optimizer")

        class Container(titan.OptimizersContainer):
            @staticmethod
            def _resolve_optimizer_factory(name):
                return getattr(lrk, name)

        model = network(seed)
        every = dict(lr=1e-2, fused=None, foreach=None)
        low_rank = every | dict(rank=6, update_proj_gap=2)
        groups = [
            titan.ParamGroupConfig(pattern="weight", optimizer_name="I3SAdamW", optimizer_kwargs=low_rank),
            titan.ParamGroupConfig(pattern=".*", optimizer_name="I3SAdamW", optimizer_kwargs=every),
        ]
        return model, Container(titan.OptimizersContainer.Config(param_groups=groups), model_parts=[model])

    def train(self, model, optimizers, batches):
        for both in batches:
            for x in both.split(8):
                (loss_of(model, x) / ACCUMULATE).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizers.step()
            optimizers.zero_grad()

    def test_it_trains_and_resumes(self, shows):
        batches = data().split(8 * ACCUMULATE)
        model, optimizers = self.build()
        self.train(model, optimizers, batches[:3])
        saved = copy.deepcopy((model.state_dict(), optimizers.state_dict()))
        self.train(model, optimizers, batches[3:])
        other, again = self.build(seed=1)
        other.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
        self.train(other, again, batches[3:])
        assert same(model.state_dict(), other.state_dict())
        shows("torchtitan", "I3S", "accumulation", "clipping", "resume")
