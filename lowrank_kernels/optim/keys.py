"""Declares every key of a parameter group once: its default, its allowed values and its meaning.

Checks, error messages, the lists in the docstrings and docs/group-keys.md come from these declarations.
"""

from __future__ import annotations

import difflib
import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..subspaces import SELECTIONS, SVDS

REQUIRED = object()
"""Stands as the default of a key that has no default."""


@dataclass(frozen=True)
class Key:
    """One key of a parameter group.

    `checked` returns the value as one of Python's own types, so that checkpoints hold only those. It raises
    TypeError for a value of the wrong type and ValueError for a value out of range. Both errors name the key,
    the value and where it was found.
    """

    name: str
    default: Any
    meaning: str

    def checked(self, value: Any, where: str) -> Any:
        raise NotImplementedError

    def fail(self, error: type[Exception], wanted: str, value: Any, where: str) -> None:
        raise error(f"{self.name} must {wanted}, got {value!r} ({where})")


@dataclass(frozen=True)
class Whole(Key):
    """An int ≥ `least`, or any int where `least` is None."""

    least: int | None = None

    def checked(self, value: Any, where: str) -> int:
        wanted = {None: "be an int", 1: "be a positive int"}.get(self.least, f"be an int ≥ {self.least}")
        if not _is_number(value, Integral):
            self.fail(TypeError, wanted, value, where)
        if self.least is not None and value < self.least:
            self.fail(ValueError, wanted, value, where)
        return int(value)


@dataclass(frozen=True)
class Number(Key):
    """A finite float with least ≤ value < below, or with value > 0."""

    least: float = -math.inf
    below: float = math.inf
    positive: bool = False

    def checked(self, value: Any, where: str) -> float:
        if not _is_number(value):
            self.fail(TypeError, "be a float", value, where)
        value = float(value)
        if self.positive and not 0 < value < math.inf:
            self.fail(ValueError, "be finite and > 0", value, where)
        if not (self.least <= value < self.below and math.isfinite(value)):
            bound = {-math.inf: "be finite", 0.0: "be finite and ≥ 0"}[self.least]
            self.fail(ValueError, bound if math.isinf(self.below) else f"lie in [{self.least:g}, {self.below:g})", value, where)
        return value


@dataclass(frozen=True)
class Rate(Key):
    """A finite float ≥ 0, or a one-element tensor that holds one. The tensor is on the CPU; with `capturable`
    it may be on a GPU."""

    def checked(self, value: Any, where: str, capturable: bool | None = None) -> float | Tensor:
        """capturable: the group's value, or None where the optimizer has no such key."""
        if not isinstance(value, Tensor):
            return Number(self.name, self.default, self.meaning, least=0.0).checked(value, where)
        on_gpu = value.device.type != "cpu"
        if value.numel() != 1 or not value.is_floating_point() or (on_gpu and not capturable):
            elsewhere = "" if capturable is None else "; with capturable=True it may be on the GPU, where kernels read it"
            raise ValueError(
                f"{self.name} must be a float or a one-element tensor on the CPU, got {tuple(value.shape)}, {value.dtype} on "
                f"{value.device} ({where}), since reading it here would stall every step{elsewhere}"
            )
        if not on_gpu:
            Number(self.name, self.default, self.meaning, least=0.0).checked(value.item(), where)
        return value


@dataclass(frozen=True)
class Betas(Key):
    """Two floats in [0, 1)."""

    def checked(self, value: Any, where: str) -> tuple[float, float]:
        if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(_is_number, value)):
            self.fail(TypeError, "be two floats", value, where)
        if not all(0 <= beta < 1 for beta in value):
            self.fail(ValueError, "lie in [0, 1)", tuple(value), where)
        return float(value[0]), float(value[1])


@dataclass(frozen=True)
class Flag(Key):
    def checked(self, value: Any, where: str) -> bool:
        if not isinstance(value, bool):
            self.fail(TypeError, "be True or False", value, where)
        return value


@dataclass(frozen=True)
class Choice(Key):
    choices: tuple[Any, ...] = ()

    def checked(self, value: Any, where: str) -> Any:
        if value in self.choices and not isinstance(value, bool):
            return self.choices[self.choices.index(value)]
        nearest = difflib.get_close_matches(str(value), [choice for choice in self.choices if isinstance(choice, str)], n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{self.name} must be one of {', '.join(map(repr, self.choices))}, got {value!r} ({where}){hint}")


ROUNDING = Choice(
    "rounding",
    "nearest",
    '`"stochastic"`: bf16 weights go up or down at random so that the mean stays, and small updates are not lost',
    choices=("nearest", "stochastic"),
)
LOW_RANK = (
    Whole("rank", REQUIRED, "r; clamped to the shorter side, with a warning", least=1),
    Whole("update_proj_gap", 200, "steps between refreshes of P", least=1),
    Number(
        "refresh_threshold",
        1.0,
        "below 1: a matrix whose new basis overlaps the old one by more than this doubles its gap (Q-GaLore)",
        least=0.0,
    ),
    Whole("max_update_proj_gap", 1600, "the longest gap that `refresh_threshold` makes", least=1),
    Flag("diagnostics", False, "`True`: each refresh is measured, for `optimizer.diagnostics()`"),
    Flag(
        "stagger",
        False,
        "`True`: the k matrices of the group take turns, at most ⌈k / gap⌉ refresh at a step after the first, instead of all at once",
    ),
    Number("scale", 0.25, "factor on the update"),
    Choice(
        "state_bits",
        32,
        "`8`: moments as 8-bit codes, in blocks of 64 with an fp32 scale each",
        choices=(32, 8),
    ),
    ROUNDING,
    Choice(
        "proj_type",
        "std",
        "side: `std` projects the shorter one; `reverse_std`, `left`, `right`; `unsharded` the one by which a sharded weight's step sends "
        "nothing (elsewhere `std`)",
        choices=("std", "reverse_std", "left", "right", "unsharded"),
    ),
    Choice(
        "selection",
        "importance",
        'how the basis is chosen: I3S, GaLore (`"dominant"`), `"random"`; or `"gaussian"`, N(0, 1/r), which is not orthonormal (APOLLO)',
        choices=tuple(SELECTIONS),
    ),
    Choice(
        "lift",
        "back_projection",
        'how N moves the weight: by P·N; `"residual"` adds what the subspace leaves out of the gradient, scaled like N (Fira); '
        '`"channel_scaling"` and `"tensor_scaling"` move it by the gradient, scaled by ‖N‖ / ‖R‖ (APOLLO)',
        choices=("back_projection", "residual", "channel_scaling", "tensor_scaling"),
    ),
    Choice(
        "moments",
        "keep",
        'what a refresh does to them: `"rotate"` turns them into the new basis (LDAdam), `"reset"` starts them, and t, anew',
        choices=("keep", "rotate", "reset"),
    ),
    Choice(
        "svd",
        "randomized",
        'the range finder; `"exact"` for a full SVD, slow, for checking',
        choices=SVDS,
    ),
    Whole("oversample", 8, "columns that the range finder sketches beyond r: its accuracy", least=0),
    Whole("power_iters", 1, "power iterations of the range finder; 2 where r is small and spectra are flat", least=0),
    Whole(
        "seed",
        0,
        "all randomness is a function of (seed, the parameter's name, or its index where no name is known, number of the refresh, or of "
        "the update for rounding)",
    ),
)
"""Keys of a low-rank group, in addition to AdamW's."""
CALLS = Whole("calls", 0, "how many steps the group has behind it", least=0)
"""The position of a low-rank group in its schedule, which the group itself holds."""
RATE = Rate("lr", 1e-3, "step size")
ADAMW = (
    RATE,
    Betas("betas", (0.9, 0.999), "β1, β2"),
    Number("eps", 1e-8, "ε, added to the root of the bias-corrected second moment", least=0.0),
    Number("weight_decay", 0.0, "decoupled, applied before the update", least=0.0),
)
ADAFACTOR = (
    Number("beta2_decay", -0.8, "γ of β2ₜ = 1 − t^γ", below=0.0),
    Number("clip_threshold", 1.0, "d, the largest root mean square of an update", positive=True),
    Flag("first_moment", True, "`False`: no M, so that a matrix keeps r + n numbers"),
)
"""Keys of LowRankAdafactor's groups, in addition to AdamW's."""
CAPTURABLE = Flag("capturable", False, "whether step() may be a part of a CUDA graph")
RSO = (
    Whole("inner_steps", 200, "steps in one subspace", least=1),
    Number("scale", 1.0, "α, factor on the update of the layers"),
    Choice(
        "moments",
        "reset",
        'what the next P does to them: they start anew; with `"carry"` V becomes the mean of its rows and M starts anew',
        choices=("reset", "carry"),
    ),
    Number("proximal", 0.0, "adds proximal·B to dB", least=0.0),
    Choice("inner", "adamw", 'the inner optimizer; or `"sgd"`', choices=("adamw", "sgd")),
    Number("momentum", 0.9, 'of `"sgd"`', least=0.0, below=1.0),
    ROUNDING,
)
"""Keys of RSOAdamW's groups, in addition to AdamW's."""
POSITION = (
    Whole("outer_step", 0, "how many outer steps a group has behind it", least=0),
    Whole("inner_step", 0, "how many inner steps it has of the one under way", least=0),
)
"""The position of an RSOAdamW group in its schedule, which the group itself holds."""

UNSUPPORTED: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "differentiable": False,
    "foreach": None,
    "fused": None,
    "decoupled_weight_decay": True,
}
"""Options of torch.optim.AdamW that are not supported here. Each may only have the value given, which has no
effect."""
FOREIGN = ("params", "param_names", "initial_lr", "lr_scale", "base_momentum", "max_momentum")
"""Keys that torch, its schedulers and training scripts put into groups. They resemble our keys but are no
misspellings of them."""
NEAR_MISS = 0.8
"""A name with at least this ratio of difflib to a known key counts as a misspelling. `update_gap` for
update_proj_gap has 0.80, `maximise` for maximize 0.88, `keeps` for eps 0.75."""


def names(keys: Iterable[Key]) -> tuple[str, ...]:
    return tuple(key.name for key in keys)


def defaults(keys: Iterable[Key]) -> dict[str, Any]:
    return {key.name: key.default for key in keys if key.default is not REQUIRED}


def check_values(group: dict[str, Any], keys: Iterable[Key], where: str) -> None:
    """Checks the value of every key and puts the checked value into the group."""
    for key in keys:
        if isinstance(key, Rate):
            group[key.name] = key.checked(group[key.name], where, group.get("capturable"))
        else:
            group[key.name] = key.checked(group[key.name], where)


def check_names(group: dict[str, Any], own: Iterable[str], where: str) -> None:
    """Raises ValueError for an unsupported key of torch's AdamW that is not off, and for a key that closely
    resembles a known one.

    All other keys are accepted, as in torch's optimizers, because frameworks tag groups with them.
    """
    for name, value in group.items():
        if name in own or name in FOREIGN:
            continue
        if name in UNSUPPORTED:
            if value is not UNSUPPORTED[name]:
                raise ValueError(f"{name}={value!r} is not supported ({where}); leave it out")
        elif nearest := nearest_name(name, (*own, *UNSUPPORTED)):
            raise ValueError(f"unknown key {name!r} in a group ({where}); did you mean {nearest!r}?")


def check_arguments(optimizer: str, options: dict[str, Any], own: Iterable[str], of_groups: Iterable[str], remedy: str) -> None:
    """Raises TypeError for keyword arguments that an optimizer does not have. Unsupported options of torch's
    AdamW are accepted if they are off."""
    for name, value in options.items():
        if name in of_groups:
            raise TypeError(f"{optimizer}() takes no {name!r}, which belongs to {remedy}")
        if name in UNSUPPORTED:
            if value is not UNSUPPORTED[name]:
                raise TypeError(f"{optimizer}() does not support {name}={value!r}; leave it out")
        else:
            nearest = nearest_name(name, (*own, *of_groups))
            hint = f"; did you mean {nearest!r}?" if nearest else ""
            raise TypeError(f"{optimizer}() got an unexpected keyword argument {name!r}{hint}")


def nearest_name(name: Any, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=NEAR_MISS)), None)


def differing(group: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Those keys of a group that differ from their defaults: "rank=128, calls=40". Of a key that has no
    default, it is REQUIRED."""
    found = ((name, group[name]) for name in defaults if name in group)
    return ", ".join(f"{name}={_shown(value)}" for name, value in found if isinstance(value, Tensor) or value != defaults[name])


def table(keys: Iterable[Key]) -> str:
    """The keys as a Markdown table with the columns key, default and meaning."""
    rows = [f"| `{key.name}` | {'required' if key.default is REQUIRED else f'`{_shown(key.default)}`'} | {key.meaning} |" for key in keys]
    return "\n".join(("| key | default | meaning |", "|---|---|---|", *rows))


def documented(title: str, keys: Iterable[Key]) -> Callable[[type], type]:
    """Appends the keys to a class's docstring."""

    def append(cls: type) -> type:
        wrapper = textwrap.TextWrapper(100, initial_indent=8 * " ", subsequent_indent=12 * " ")
        default = {key.name: "required" if key.default is REQUIRED else _shown(key.default) for key in keys}
        entries = (wrapper.fill(f"{key.name} ({default[key.name]}): {key.meaning}") for key in keys)
        cls.__doc__ = "\n".join((cls.__doc__.rstrip(), "", f"    {title}:", *entries, "    "))
        return cls

    return append


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else repr(value)


def _is_number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, (bool, torch.Tensor))
