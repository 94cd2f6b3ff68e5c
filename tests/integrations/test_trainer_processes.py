"""Trainer in two processes over gloo, by DistributedDataParallel and by FSDP2 through accelerate: the run is
that of one process, and a resumed run is the uninterrupted one."""

import functools
import os

import gloo
import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from tiny import difference, llama, losses, optimizer_of, trainer
from torch.distributed.tensor import DTensor

from lowrank_kernels.integrations.transformers import OptimizerFactory

pytestmark = pytest.mark.slow
FSDP2 = dict(
    fsdp=True,
    fsdp_config=dict(version=2, transformer_layer_cls_to_wrap=["LlamaDecoderLayer"], state_dict_type="SHARDED_STATE_DICT"),
)
RUNS = {
    "I3S": dict(method="i3s", update_proj_gap=3),
    "8 bits": dict(method="galore", update_proj_gap=3, state_bits=8),
    "RSO": dict(method="rso", inner_steps=3),
    "in_backward": dict(method="adam-mini", selection="random", update_proj_gap=3, in_backward="deferred"),
}
METHODS = {"I3S": "I3S", "8 bits": "GaLore, 8 bits", "RSO": "RSO", "in_backward": "Adam-mini"}
CLOSE = 2e-4
"""Of weights in fp32: two processes add gradients in another order, and N = M / √V magnifies that. Steps are
of size 1e-2."""


def run(folder, keys, batch, resume=None, seed=0, **options):
    built = trainer(folder, model=llama(seed), per_device_train_batch_size=batch, save_strategy="steps", save_steps=4, **options)
    built.optimizer_cls_and_kwargs = OptimizerFactory, dict(rank=8) | keys
    built.train(resume_from_checkpoint=resume)
    return built


def whole(built):
    values = {name: value for name, value in built.model.state_dict().items()}
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in values.items()}


def process(folder, parallel, rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}
    options = {}
    if parallel == "FSDP2":
        let_accelerate_shard_on_cpus()
        options = FSDP2
    found = {}
    for name, keys in RUNS.items():
        built = run(f"{folder}/{name}", keys, 2, **options)
        again = run(f"{folder}/{name} again", keys, 2, resume=f"{folder}/{name}/checkpoint-4", seed=1, **options)
        params = optimizer_of(built).param_groups[0]["params"]
        found[name] = {
            "weights": whole(built),
            "resumed": whole(again),
            "losses": losses(built),
            "sharded": isinstance(params[0], DTensor),
        }
    return found


def let_accelerate_shard_on_cpus():
    """accelerate takes FSDP2 for accelerators alone. What comes after that choice runs on a CPU too."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    make = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **options):
        make(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def ddp(folder, rank):
    return process(folder, "DDP", rank)


def fsdp2(folder, rank):
    return process(folder, "FSDP2", rank)


@pytest.fixture(scope="module", params=["DDP", "FSDP2"])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, gloo.results(functools.partial(ddp if request.param == "DDP" else fsdp2, str(folder)), folder)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(found, tmp_path, shows, name):
    parallel, each = found
    alone = run(tmp_path, RUNS[name], 4)
    both = [one[name] for one in each]
    assert all(one["sharded"] == (parallel == "FSDP2") for one in both)
    assert difference(both[0]["weights"], both[1]["weights"]) == 0
    assert both[0]["losses"] == pytest.approx(losses(alone), rel=1e-2 if name == "8 bits" else 1e-3)
    if name in ("RSO", "in_backward"):  # whose bases no last bit of a gradient turns
        assert difference(both[0]["weights"], whole(alone)) < CLOSE
    shows("Trainer", METHODS[name], parallel)
    if name == "in_backward":
        shows("Trainer", "Adam-mini", "in_backward")


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(found, shows, name):
    shows("Trainer", METHODS[name], "resume")
    for one in found[1]:
        assert difference(one[name]["weights"], one[name]["resumed"]) == 0
        assert difference(one[name]["weights"], llama().state_dict()) > 1e-3
