"""A tiny LLaMA and a Trainer around it, for the tests of this folder. Nothing comes from a network."""

import random

import numpy
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowrank_kernels.integrations.transformers import OptimizerFactory

VOCABULARY = 64


class Tokens(torch.utils.data.Dataset):
    """Sequences of a few of the tokens, so that a model learns something in ten steps."""

    def __init__(self, count=32, length=16):
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randint(8, (count, 4), generator=generator)
        self.rows = patterns.repeat(1, length // 4)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def llama(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **(sizes | options)))


def arguments(folder, **options):
    defaults = dict(
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    return TrainingArguments(str(folder), **(defaults | options))


def trainer(folder, keys=None, model=None, callbacks=None, **options):
    """A Trainer with OptimizerFactory's `keys`, or with TrainingArguments' own `optim`."""
    random.seed(0), numpy.random.seed(0)
    model = llama() if model is None else model
    factory = {} if keys is None else dict(optimizer_cls_and_kwargs=(OptimizerFactory, dict(rank=8, update_proj_gap=3) | keys))
    return Trainer(model, arguments(folder, **options), train_dataset=Tokens(), eval_dataset=Tokens(8), callbacks=callbacks, **factory)


def of_rso(keys):
    """update_proj_gap is RSO's inner_steps."""
    return dict(method="rso", inner_steps=3) | keys


def losses(trained):
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


def weights(trained):
    return {name: value.clone() for name, value in trained.model.state_dict().items()}


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def optimizer_of(trained):
    return getattr(trained.optimizer, "optimizer", trained.optimizer)
