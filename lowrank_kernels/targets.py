"""Finds the modules of a model that `target_modules` names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from torch import nn

OUTPUT_HEADS = ("lm_head", "embed_out")
ALL_LINEAR = ("all-linear", "all_linear")
"""The two spellings of "all linear layers"; the second one has an underscore, as Hugging Face writes it."""


def matching_modules(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """Name → module for all modules that `target_modules` matches, in the model's order.

    target_modules is one of three things:

    - "all-linear": every linear layer except PEFT's adapters and the output head, and every module that holds
      the weights of experts. The output head is `lm_head`, what `model.get_output_embeddings()` returns, and
      any layer that shares an embedding's weight.
    - A list of strings: every module whose name contains one of them, or matches one as a regular expression.
    - A regular expression: every module whose whole name it matches.

    Raises ValueError where nothing matches, and TypeError where `model` is no nn.Module.
    """
    check_is_module(model)
    matched = dict(_matches(model, target_modules))
    if not matched:
        names = [name for name, module in _named_modules(model) if is_linear(module)]
        raise ValueError(
            f"target_modules={target_modules!r} matches no module of {type(model).__name__}; "
            + (f"its linear layers have names like {', '.join(map(repr, names[:3]))}" if names else "it has no linear layer")
        )
    return matched


def check_is_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; pass the model itself, not its parameters")


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an nn.Linear or the Conv1D of transformers."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is the Conv1D of transformers, a linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is not None


def experts_of(name: str, module: nn.Module) -> list[nn.Parameter]:
    """The weights [experts, m, n] that a mixture-of-experts module holds, as Mixtral's do in transformers."""
    if "expert" not in f"{name}.{type(module).__name__}".lower() or type(module).__module__.startswith("torch.nn."):
        return []
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]


def without_wrappers(names: list[str]) -> list[str]:
    """Names of modules or parameters, without the prefixes that torch.compile and DistributedDataParallel add
    to them."""
    names = [name.replace("_orig_mod.", "") for name in names]
    if all(name in ("_orig_mod", "module") or name.startswith("module.") for name in names):  # else the model has a child called module
        names = [name.removeprefix("module.") for name in names]
    return names


def is_head_or_embedding(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """Returns a function of (name, module). It tells whether the module is the output head or an embedding,
    or shares an embedding's weight."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None

    def examine(name: str, module: nn.Module) -> bool:
        name = name.partition(".modules_to_save.")[0]  # PEFT's copy of a module has its own name after this
        is_head = module is head or name.rpartition(".")[2] in OUTPUT_HEADS
        return is_head or id(getattr(module, "weight", None)) in embeddings

    return examine


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of all modules but the model itself, without the prefixes of wrappers."""
    named = [(name, module) for name, module in model.named_modules() if name]
    return list(zip(without_wrappers([name for name, _ in named]), (module for _, module in named), strict=True))


def _matches(model: nn.Module, target_modules: str | Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    named = _named_modules(model)
    if target_modules in ALL_LINEAR:
        excluded, adapters = is_head_or_embedding(model), adapters_of(model)
        for name, module in named or [("", model)]:
            if (is_linear(module) or experts_of(name, module)) and id(module) not in adapters and not excluded(name, module):
                yield name, module
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is neither 'all-linear' nor a regular expression: {error}") from error
        yield from ((name, module) for name, module in named if pattern.fullmatch(name))
    else:
        parts = list(target_modules)
        if not parts or not all(isinstance(part, str) and part for part in parts):
            raise ValueError(f"target_modules must be 'all-linear', a regular expression or a list of non-empty strings, got {parts!r}")
        patterns = list(filter(None, map(_pattern, parts)))
        for name, module in named:
            if any(part in name for part in parts) or any(pattern.fullmatch(name) for pattern in patterns):
                yield name, module


def _pattern(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    except re.error:
        return None  # it is then only searched for as a part of names


def adapters_of(model: nn.Module) -> set[int]:
    """The ids of the modules that PEFT adds to layers (lora_A, lora_B, …), and of all modules inside them.
    Each of PEFT's layers lists its own. The copies of whole modules in `modules_to_save` are no adapters."""
    found = set()
    for layer in model.modules():
        for name in getattr(layer, "adapter_layer_names", ()):
            if name != "modules_to_save" and isinstance(added := getattr(layer, name, None), nn.Module):
                found |= {id(module) for module in added.modules()}
    return found
