"""What defines a run: one frozen record. It is saved beside the run's results and compared when the run is
resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama
from checkpoints import write_atomically
from methods import METHODS


class SettingsError(ValueError):
    """An argument is wrong. The message names it as the user types it."""


CHOICES: dict[str, tuple[Any, ...]] = {
    "model": tuple(llama.SIZES),
    "svd": ("randomized", "exact"),
    "state_bits": (32, 8),
    "rounding": ("nearest", "stochastic"),
    "distribution": ("gaussian", "haar", "rademacher", "principal"),
    "rso_moments": ("reset", "carry"),
    "dtype": ("fp32", "bf16"),
    "in_backward": ("off", "deferred", "immediately"),
    "parallel": ("ddp", "fsdp2"),
}


@dataclass(frozen=True)
class Settings:
    """Every field alters the numbers in the metrics, so a resumed run must have the same ones."""

    model: str = "tiny"
    tie_head: bool = False
    data: str | None = None  # None: the standard library
    data_digest: str = ""
    seed: int = 0

    steps: int = 600
    batch_size: int = 16  # sequences a step, over all micro-batches
    accumulate: int = 1  # micro-batches a step
    seq_len: int = 128  # bytes
    warmup: int = 60  # steps
    clip: float = 1.0  # norm of the whole gradient; 0: off
    weight_decay: float = 0.0
    dense_lr: float = 2e-2  # peak learning rate of embedding, head and norms, under every optimizer alike

    rank: int = 32
    update_proj_gap: int = 50  # steps
    scale: float = 0.25
    svd: str = "randomized"
    state_bits: int = 32  # of the low-rank optimizers' moments
    rounding: str = "nearest"

    rso_rank: int = 64
    inner_steps: int = 100
    distribution: str = "gaussian"
    principal_rank: int = 0  # of distribution="principal"; 0: half of rso_rank
    rso_scale: float = 1.0
    rso_moments: str = "reset"

    diagnostics: bool = False  # what each refresh finds: captured energy and effective rank
    in_backward: str = "off"  # or when the matrices move whose gradients are projected in the backward pass
    compress_gradients: bool = False  # what the processes exchange of projected gradients
    processes: int = 1  # the batch is shared by them
    parallel: str = "ddp"  # each process holds all parameters, or (fsdp2) its part of them

    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1  # CPU threads; the order of sums, and so the last bits, depend on it
    compile: bool = False
    lean: bool = False  # keeps less of the norms, attention and SwiGLU for the backward pass

    eval_every: int = 50  # steps
    eval_sequences: int = 256

    def check(self) -> Settings:
        """Raises SettingsError for settings that cannot run."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingsError(f"{flag(name)} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise SettingsError(f"{flag(name)} must be a positive integer, got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise SettingsError(f"{flag(name)} must be less than 2³¹, got {getattr(self, name)}")
        for name in ("clip", "weight_decay", "dense_lr", "scale", "rso_scale"):
            if not math.isfinite(getattr(self, name)):
                raise SettingsError(f"{flag(name)} must be finite, got {getattr(self, name)}")
        for name in ("warmup", "clip", "weight_decay", "seed", "principal_rank"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{flag(name)} must not be negative, got {getattr(self, name)}")
        for name in ("scale", "dense_lr", "rso_scale"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{flag(name)} must be positive, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise SettingsError(f"--seed must be less than 2⁶³, got {self.seed}")
        if self.rso_rank > (hidden := llama.SIZES[self.model].hidden):
            raise SettingsError(f"--rso-rank {self.rso_rank} is more than the width of {self.model}, {hidden}")
        if self.distribution == "principal" and self.rso_rank < 2:
            raise SettingsError(f"--distribution principal needs a --rso-rank of 2 at least, got {self.rso_rank}")
        if self.principal_rank >= self.rso_rank:
            raise SettingsError(f"--principal-rank {self.principal_rank} is not less than --rso-rank {self.rso_rank}")
        if self.eval_sequences < self.processes:
            raise SettingsError(f"--eval-sequences {self.eval_sequences} is less than one for each of {self.processes} processes")
        if self.batch_size % (self.accumulate * self.processes):
            among = f" among {self.processes} processes" if self.processes > 1 else ""
            raise SettingsError(f"--accumulate {self.accumulate}{among} does not divide --batch-size {self.batch_size}")
        if self.in_backward == "immediately" and (self.accumulate > 1 or self.clip):
            raise SettingsError("--in-backward immediately uses each gradient up at once: it needs --clip 0 and --accumulate 1")
        if self.compress_gradients and self.processes == 1:
            raise SettingsError("--compress-gradients needs several processes: torchrun --nproc-per-node 2 examples/pretrain.py …")
        if self.compress_gradients and self.parallel == "fsdp2":
            raise SettingsError("--compress-gradients is for --parallel ddp; FSDP2 reduces each gradient to the process that keeps it")
        if self.compress_gradients and self.in_backward != "off":
            raise SettingsError("--compress-gradients and --in-backward both choose what the processes exchange; leave one out")
        return self


_POSITIVE = (
    "steps",
    "batch_size",
    "accumulate",
    "seq_len",
    "rank",
    "update_proj_gap",
    "rso_rank",
    "inner_steps",
    "processes",
    "threads",
    "eval_every",
    "eval_sequences",
)

# Rank is a quarter of the width, as in GaLore's experiments. RSO's rank is half of the width, because its
# directions are random. Beyond "tiny" the schedule has the shape of GaLore's, but the length is ours. It is a
# start for your own runs, not a tuned recipe.
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"steps": 2000, "batch_size": 8, "rank": 64, "rso_rank": 128, "eval_every": 200},
    "9m": {"steps": 1000},
    "60m": {
        "dense_lr": 1e-2,
        "steps": 10_000,
        "batch_size": 128,
        "seq_len": 256,
        "rank": 128,
        "update_proj_gap": 200,
        "rso_rank": 256,
        "inner_steps": 200,
        "eval_every": 500,
    },
    "130m": {
        "dense_lr": 1e-2,
        "steps": 20_000,
        "batch_size": 128,
        "seq_len": 256,
        "rank": 192,
        "update_proj_gap": 200,
        "rso_rank": 384,
        "inner_steps": 200,
        "eval_every": 500,
    },
    "350m": {
        "dense_lr": 1e-2,
        "steps": 60_000,
        "batch_size": 128,
        "seq_len": 256,
        "rank": 256,
        "update_proj_gap": 200,
        "rso_rank": 512,
        "inner_steps": 200,
        "eval_every": 1000,
    },
    "1b": {
        "dense_lr": 1e-2,
        "steps": 100_000,
        "batch_size": 128,
        "seq_len": 256,
        "rank": 512,
        "update_proj_gap": 200,
        "rso_rank": 1024,
        "inner_steps": 200,
        "eval_every": 1000,
    },
}


ADDED = ("lean", "principal_rank", "rso_scale", "rso_moments", "diagnostics", "in_backward", "compress_gradients", "processes", "parallel")
"""Settings that runs of an earlier version do not have. Theirs are the defaults."""


def flag(name: str) -> str:
    """The argument that sets a field."""
    return "--" + name.replace("_", "-")


def defaults(model: str) -> Settings:
    settings = Settings(model=model, **MODEL_DEFAULTS[model])
    return dataclasses.replace(settings, warmup=settings.steps // 10)


@dataclass(frozen=True)
class Plan:
    """The plan of a run directory: the shared settings, and which optimizers run at which peak learning
    rate."""

    settings: Settings
    lr: dict[str, float]  # optimizer → learning rate, in the order they run

    def save(self, path: Path) -> None:
        record = {"settings": dataclasses.asdict(self.settings), "lr": self.lr}
        write_atomically(path, lambda file: file.write(json.dumps(record, indent=2).encode() + b"\n"))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises SettingsError, in one sentence, where the file is not what `save` writes."""
        try:
            record = json.loads(path.read_bytes())
            given, lr = record["settings"], record["lr"]
            kinds = typing.get_type_hints(Settings)
            given = {name: getattr(Settings(), name) for name in ADDED} | given
            if kinds.keys() - given.keys() == {"dense_lr"}:
                raise SettingsError(
                    f"{path} is of an earlier version, in which embedding, head and norms had no learning rate of their own (--dense-lr); "
                    "start a new run in another directory"
                )
            if kinds.keys() != given.keys():
                raise ValueError(f"missing or unknown settings: {', '.join(sorted(kinds.keys() ^ given.keys()))}")
            for name, kind in kinds.items():
                if not isinstance(given[name], (int, float) if kind is float else kind):
                    raise ValueError(f"{name} is {given[name]!r}")
            for method, rate in lr.items():
                if method not in METHODS or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
                    raise ValueError(f"lr {method}={rate!r}")
            return cls(Settings(**given).check(), lr)
        except SettingsError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SettingsError(f"{path} is damaged ({type(error).__name__}: {error}); start a new run in another directory") from None
