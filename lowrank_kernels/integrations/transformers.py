"""Low-rank optimizers in Hugging Face's Trainer."""

from __future__ import annotations

import re
import sys
from typing import Any

from torch import Tensor, nn

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_optimizer import is_optimizer_factory  # noqa: F401  Older ones call a factory as if it were an optimizer.
except ImportError as error:
    raise ImportError(
        "this module needs transformers of version 5.2 or newer, and accelerate; pip install -U transformers accelerate"
    ) from error

from .. import InBackward, param_groups, to_dense, to_subspace
from .. import in_backward as _in_backward
from ..nn import SubspaceLayer
from ..optim.in_backward import UPDATES
from ..optim.named import named
from ..optim.optimizer import LowRankOptimizer
from ..targets import ALL_LINEAR, matching_modules

OF_LAYERS = ("distribution", "seed", "share", "principal_rank")
"""Options of method="rso" that go to `to_subspace`. The others go to RSOAdamW."""


class OptimizerFactory:
    """Makes the optimizer of a Trainer, from a method's name and the Trainer's own arguments.

        trainer = Trainer(
            model,
            TrainingArguments(learning_rate=1e-2, weight_decay=0.1, …),
            optimizer_cls_and_kwargs=(OptimizerFactory, dict(method="i3s", rank=128, state_bits=8)),
            …,
        )

    lr, betas, eps and weight_decay are those of TrainingArguments unless they are given. Biases and the
    weights of norms do not decay, by Trainer's own rule. Trainer hands a factory the model alone, so the
    factory looks up the Trainer that calls it.

    Keys:
        method: "galore", "i3s", "fira", "fira-i3s", "apollo", "apollo-mini", "adafactor", "adafactor-i3s",
            "adam-mini", "adam-mini-i3s", or "rso", which converts the model by `to_subspace` first.
        rank: r.
        target_modules: as in `param_groups`; by default TrainingArguments' optim_target_modules, or
            "all-linear" where there are none. The spellings of Hugging Face work: parts of names, regular
            expressions, "all-linear" and "all_linear".
        head: whether "all-linear" means the output head as well (False). Hugging Face's own does.
        lr, betas, eps, weight_decay: in place of TrainingArguments' learning_rate, adam_beta1 and adam_beta2,
            adam_epsilon, weight_decay.
        dense_lr: of the parameters that are not projected (lr). The scheduler scales both.
        in_backward: None, "deferred" or "immediately": `in_backward` projects gradients while the backward
            pass runs. Trainer clips then by optimizer.clip_grad_norm_, and logs that norm. "immediately"
            knows no norm: set TrainingArguments(max_grad_norm=0).
        options: any other key of a low-rank group, as of `param_groups`; of "rso" those of `to_subspace` and
            RSOAdamW.

    Raises:
        ValueError, TypeError: for methods and options that do not exist, and where options and
            TrainingArguments do not go together.
        RuntimeError: where no Trainer calls it.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        method: str,
        rank: int,
        target_modules: Any = None,
        head: bool = False,
        lr: float | None = None,
        dense_lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        in_backward: str | None = None,
        **options: Any,
    ) -> LowRankOptimizer:
        kind, preset = named(method)
        trainer = _calling_trainer()
        args = trainer.args
        _refuse_flat_pieces(model, trainer)
        if args.optim_args:
            raise ValueError(
                f"TrainingArguments' optim_args={args.optim_args!r} are for Trainer's own optimizers, and would be lost; pass them as keys "
                "beside method, in optimizer_cls_and_kwargs"
            )
        if in_backward not in (None, *UPDATES):
            raise ValueError(f"in_backward must be None or one of {', '.join(UPDATES)}, got {in_backward!r}")
        if in_backward == "immediately" and args.max_grad_norm:
            raise ValueError(
                f"in_backward='immediately' uses gradients up before their norm is known, and max_grad_norm is {args.max_grad_norm:g}; set "
                "TrainingArguments(max_grad_norm=0), or use 'deferred'"
            )
        if target_modules is None:
            target_modules = "all-linear" if args.optim_target_modules is None else args.optim_target_modules
        if head:
            target_modules = _with_head(model, target_modules)
        adamw = dict(
            lr=args.learning_rate if lr is None else lr,
            betas=(args.adam_beta1, args.adam_beta2) if betas is None else tuple(betas),
            eps=args.adam_epsilon if eps is None else eps,
        )
        weight_decay = args.weight_decay if weight_decay is None else weight_decay
        converts = method == "rso" and not any(isinstance(module, SubspaceLayer) for module in model.modules())
        if method == "rso":
            of_layers = {key: options.pop(key) for key in OF_LAYERS if key in options}
            low_rank, dense = _coordinates(model, rank, target_modules, of_layers, converts), {"params": _others(model)}
            adamw |= options
        else:
            dense, low_rank = param_groups(model, rank, target_modules, **(preset | options))
        if dense_lr is not None:
            dense["lr"] = dense_lr
        decaying = set(trainer.get_decay_parameter_names(model))
        try:  # the low-rank group comes first, since Trainer logs the rate of the first one
            optimizer = kind(_by_decay(model, [low_rank, dense], decaying, weight_decay), **adamw)
        except BaseException:
            if converts:
                to_dense(model)
            raise
        if in_backward is not None:
            trainer.add_callback(_InBackward(trainer, in_backward))
        return optimizer


def _calling_trainer() -> Trainer:
    frame = sys._getframe(2)
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), Trainer):
            return caller
        frame = frame.f_back
    raise RuntimeError(
        "no Trainer calls this OptimizerFactory, which takes its TrainingArguments; pass Trainer(optimizer_cls_and_kwargs="
        "(OptimizerFactory, dict(method=…, rank=…))), or build the optimizer from lowrank_kernels.param_groups"
    )


def _refuse_flat_pieces(model: nn.Module, trainer: Trainer) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    by = "DeepSpeed" if trainer.is_deepspeed_enabled else None
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        by = "FSDP1"
    if by is not None:
        raise ValueError(f"{by} keeps flat pieces of matrices, which cannot be projected; use FSDP2, or DistributedDataParallel")


def _coordinates(model: nn.Module, rank: int, target_modules: Any, of_layers: dict[str, Any], converts: bool) -> dict[str, Any]:
    """The group of the coordinates of a model that is converted here, or was before."""
    if converts:
        to_subspace(model, rank, target_modules, **of_layers)
    layers = [module for module in model.modules() if isinstance(module, SubspaceLayer)]
    if not converts and (of_layers or {layer.subspace.rank for layer in layers} != {rank}):
        ranks = sorted({layer.subspace.rank for layer in layers})
        raise ValueError(
            f"the model was converted with rank {', '.join(map(str, ranks))} before, and got rank={rank}"
            + "".join(f", {key}={value!r}" for key, value in of_layers.items())
            + "; leave the conversion to OptimizerFactory, or name that rank alone"
        )
    return {"params": [layer.coordinates for layer in layers if layer.coordinates.requires_grad]}


def _others(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters that are no coordinates."""
    coordinates = {module.coordinates for module in model.modules() if isinstance(module, SubspaceLayer)}
    return [param for param in model.parameters() if param.requires_grad and param not in coordinates]


def _with_head(model: nn.Module, target_modules: Any) -> str:
    """A regular expression for all linear layers and the output head."""
    if target_modules not in ALL_LINEAR:
        raise ValueError(f"head=True is for target_modules='all-linear', got {target_modules!r}; name the head among them")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        raise ValueError(f"head=True, but {type(model).__name__} has no output head that get_output_embeddings() returns")
    wanted = {*matching_modules(model, target_modules).values(), output}
    return "|".join(re.escape(name) for name, module in model.named_modules() if module in wanted)


def _by_decay(model: nn.Module, groups: list[dict[str, Any]], decaying: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """The groups, each as one that decays and one that does not, with the parameters' names. They outlive
    that accelerate puts sharded parameters in the place of the model's."""
    names = {param: name for name, param in model.named_parameters()}
    found = []
    for group in groups:
        for decays in (True, False):
            params = [(names[param], param) for param in group["params"] if (names[param] in decaying) == decays]
            if params:
                found.append({**group, "params": params, "weight_decay": weight_decay if decays else 0.0})
    return found


class _InBackward(TrainerCallback):
    """Begins in_backward when Trainer has wrapped the model, and ends it with the training. Meanwhile Trainer
    clips what it has projected: accelerate, which Trainer asks, would see the parameters' gradients alone."""

    def __init__(self, trainer: Trainer, update: str) -> None:
        self._trainer, self._update = trainer, update
        self._held: InBackward | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if self._held is not None:  # the last training has raised
            _unwrapped(trainer.optimizer).zero_grad()
            self._end()
        options = dict(accumulate=args.gradient_accumulation_steps, update=self._update, scaler=trainer.accelerator.scaler)
        self._held = _in_backward(trainer.model_wrapped, _unwrapped(trainer.optimizer), **options)
        trainer.accelerator.clip_grad_norm_ = self._clip

    def _clip(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor | None:
        return None if self._update == "immediately" else _unwrapped(self._trainer.optimizer).clip_grad_norm_(float(max_norm))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()

    def _end(self) -> None:
        self._held.remove()
        self._held = None
        del self._trainer.accelerator.clip_grad_norm_  # the class's own is there again


class DiagnosticsCallback(TrainerCallback):
    """Logs `optimizer.diagnostics(flat=True)` wherever Trainer logs the loss: what the last refresh of each
    matrix has found, in groups with diagnostics=True.

        trainer.add_callback(DiagnosticsCallback(trainer))
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not any(group.get("diagnostics") for group in self._trainer.optimizer.param_groups):
            raise ValueError("no group of the optimizer has diagnostics=True; pass diagnostics=True to OptimizerFactory")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log:
            self._trainer.log(_unwrapped(self._trainer.optimizer).diagnostics(flat=True))
            control.should_log = True  # which log() has set back, and the loss is still to come


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer in an AcceleratedOptimizer."""
    return getattr(optimizer, "optimizer", optimizer)
