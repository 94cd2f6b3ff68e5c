"""Which modules of a model `target_modules` names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

OUTPUT_HEADS = ("lm_head", "embed_out")


def matching_modules(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """Modules by name, in the model's order.

    target_modules: "all-linear", every linear layer but the output head (`lm_head`, what `model.get_output_embeddings()` returns, and
    any layer whose weight is an embedding's); a list of strings, a module being taken where its name contains one of them; or a
    regular expression that must match a module's whole name. Raises ValueError where nothing matches.
    """
    matched = dict(_matches(model, target_modules))
    if not matched:
        names = [name for name, module in _named_modules(model) if is_linear(module)]
        raise ValueError(
            f"target_modules={target_modules!r} matches no module of {type(model).__name__}; "
            + (f"its linear layers have names like {', '.join(map(repr, names[:3]))}" if names else "it has no linear layer")
        )
    return matched


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, and the Conv1D of transformers (a linear layer with a transposed weight)."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is not None)


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All but the model itself, without what torch.compile and DistributedDataParallel put in front of the names that a user knows."""
    named = [(name.replace("_orig_mod.", ""), module) for name, module in model.named_modules() if name]
    if all(name in ("_orig_mod", "module") or name.startswith("module.") for name, _ in named):  # else it is a child of that name
        named = [(name.removeprefix("module."), module) for name, module in named]
    return named


def _matches(model: nn.Module, target_modules: str | Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    named = _named_modules(model)
    if target_modules == "all-linear":
        embeddings = {id(module.weight) for _, module in named if isinstance(module, nn.Embedding)}
        head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
        for name, module in named or [("", model)]:
            is_head = module is head or name.rpartition(".")[2] in OUTPUT_HEADS
            if is_linear(module) and not is_head and id(module.weight) not in embeddings:
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
        yield from ((name, module) for name, module in named if any(part in name for part in parts))
