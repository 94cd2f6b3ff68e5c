"""to_subspace converts a model's linear layers to SubspaceLinear; to_dense converts them back."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..sharded import is_sharded
from ..targets import check_is_module, is_conv1d, matching_modules
from .linear import SubspaceConv1D, SubspaceLayer, SubspaceLinear
from .sharding import check_can_shard, check_not_sharded_itself, shard_coordinates
from .subspace import Subspace

SHARED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
"""Names of sibling layers that usually read the same input: in LLaMA and models like it, BERT, Meta's own
LLaMA, T5."""


def to_subspace(
    model: nn.Module,
    rank: int,
    target_modules: str | Iterable[str] = "all-linear",
    distribution: str = "gaussian",
    seed: int = 0,
    share: Sequence[Sequence[str]] | str | None = "auto",
    principal_rank: int | None = None,
) -> nn.Module:
    """Turns linear layers into SubspaceLinear (a Conv1D of transformers into SubspaceConv1D), in place, and
    returns the model. `to_dense` is the inverse.

    Layers stay the same objects and keep their hooks, names and weights. Their weights no longer require a
    gradient; their new `coordinates` do. Build the optimizer after the conversion. Parameters that are not
    converted train as before. A model of FSDP2 is converted before fully_shard or after it, before the first
    forward pass; see docs/distributed.md.

    Args:
        model: any module, or an nn.Linear itself. Layers with a frozen weight are not converted.
        rank: r ≥ 1. A layer with fewer in_features is not converted; a warning names it.
        target_modules: as in `param_groups`: "all-linear" (all but the output head and layers tied to an
            embedding), a list of strings that names contain or match, or a regular expression for whole
            names. Only nn.Linear and Conv1D themselves are converted, not their subclasses.
        distribution: the distribution of P: "gaussian", "haar", "rademacher" or "principal"; see
            SubspaceLinear.
        seed: P is a function of (seed, the layer's name, outer step), and of "principal" of Q. It is the same
            on every rank of a data-parallel run. Two layers of the same name and seed have the same P, even
            in two models, or in parts of a model that are converted separately.
        share: lists of names of layers that share P, such as [["q_proj", "k_proj", "v_proj"], ["gate_proj",
            "up_proj"]]. The layers of a list are children of one module and have equal in_features. They also
            share Z = x·P where they read the same tensor, and compute different Zs where they read different
            tensors. A tensor counts as the same if it was changed between two layers in a way that autograd
            cannot see (`x.data`, memory shared with NumPy). "auto" (default): the names that the usual
            decoders use. None: no sharing.
        principal_rank: of "principal"; see SubspaceLinear.

    Raises:
        ValueError: a rank under 1 or above the in_features of all layers; an unknown distribution;
            target_modules that match nothing, or nothing that can be converted; a layer that is converted
            already; a weight that another module uses too; a model in DistributedDataParallel, which must
            wrap the model after the conversion.
        TypeError: a seed that is no int; a weight that is sharded by anything but FSDP2, or by a fully_shard
            of the layer itself.
        RuntimeError: a model of FSDP2 that has run already.
        The model is unchanged after an error.
    """
    check_is_module(model)
    _check_not_wrapped(model)
    layers = _convertible(model, target_modules)
    narrow = {}
    if isinstance(rank, int) and rank <= max(map(_in_features, layers.values())):
        narrow = {name: layer for name, layer in layers.items() if _in_features(layer) < rank}
        layers = {name: layer for name, layer in layers.items() if name not in narrow}
    _check_not_tied(model, layers)
    planned = []
    for members in _sharing(layers, share):
        first = members[0]
        place = int.from_bytes(hashlib.blake2b(first.encode(), digest_size=8).digest(), "little")
        try:
            planned.append((members, Subspace(_in_features(layers[first]), rank, distribution, seed, place, principal_rank=principal_rank)))
        except ValueError as error:
            shape = tuple(layers[first].weight.shape)
            raise ValueError(f"{error} (layer {first!r} of shape {shape}; target_modules may leave it out)") from None
    _warn_of_narrow(narrow, rank)
    for members, subspace in planned:
        for name in members:
            layer = layers[name]
            if is_conv1d(layer):
                original = type(layer)
                layer.__class__ = SubspaceConv1D
                layer._convert(subspace, original)
            else:
                layer.__class__ = SubspaceLinear
                layer._enter(subspace)
            if is_sharded(layer.weight):
                shard_coordinates(layer)
    return model


def _in_features(layer: nn.Module) -> int:
    return layer.weight.shape[0] if is_conv1d(layer) else layer.in_features


def _warn_of_narrow(narrow: dict[str, nn.Module], rank: int) -> None:
    if narrow:
        found = ", ".join(f"{name!r} ({_in_features(layer)})" for name, layer in list(narrow.items())[:3])
        more = f" and {len(narrow) - 3} more" if len(narrow) > 3 else ""
        warnings.warn(
            f"rank {rank} is more than the in_features of {found}{more}, which stay as they are and train as a whole; a lower rank, or a "
            "conversion of their own, would convert them",
            UserWarning,
            stacklevel=3,
        )


def to_dense(model: nn.Module) -> nn.Module:
    """Turns every converted layer back into its original class, in place, and returns the model. The layers
    keep their current weights, which require a gradient again. Raises ValueError for a model that is sharded
    or in DistributedDataParallel."""
    _check_not_wrapped(model)
    layers = [module for module in model.modules() if isinstance(module, SubspaceLayer)]
    if any(is_sharded(layer.weight) for layer in layers):
        raise ValueError(
            "the model's parameters are sharded, and FSDP2 would miss their coordinates; load its state_dict into a dense model"
        )
    for layer in layers:
        layer._leave()
    return model


def _check_not_wrapped(model: nn.Module) -> None:
    """Raises ValueError for a model in DistributedDataParallel, which reduces only the gradients of
    parameters that exist when it is built."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("the model is in DistributedDataParallel, which would not reduce the new parameters' gradients; convert it first")


def _convertible(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    matched = matching_modules(model, target_modules)
    for name, module in matched.items():
        if isinstance(module, SubspaceLayer):
            raise ValueError(
                f"{name!r} is a {type(module).__name__} of rank {module.subspace.rank} already; name other layers in "
                "target_modules, or call to_dense(model) first"
            )
        check_not_sharded_itself(name, module)
    linear = {name: module for name, module in matched.items() if _is_plain(module)}
    if not linear:
        kinds = sorted({f"{type(module).__module__}.{type(module).__qualname__}" for module in matched.values()})
        raise ValueError(
            f"target_modules={target_modules!r} matches no nn.Linear or Conv1D with a real weight of its own, only "
            f"{', '.join(kinds)}, which cannot be converted"
        )
    found = {name: layer for name, layer in linear.items() if layer.weight.requires_grad}
    if not found:
        raise ValueError(
            f"target_modules={target_modules!r} matches only layers with a frozen weight ({next(iter(linear))!r} and others have "
            "requires_grad=False); unfreeze them before they are converted"
        )
    check_can_shard(model, found)
    for name, layer in found.items():
        if "forward" in vars(layer):
            raise ValueError(
                f"the forward method of {name!r} has been replaced, as by accelerate's hooks, and would go on computing a linear layer; "
                "remove what replaced it, and put it in place again after the conversion"
            )
    return found


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is exactly an nn.Linear or Conv1D with an ordinary weight. The weight must not be
    complex, nor computed from other parameters, as by parametrizations and pruning."""
    return (
        (type(module) is nn.Linear or is_conv1d(module)) and isinstance(module.weight, nn.Parameter) and module.weight.is_floating_point()
    )


def _check_not_tied(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raises ValueError for a weight that another module uses too. That module's gradient would be lost,
    since it has no coordinates."""
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            users[id(parameter)].append(f"{name}.{key}".lstrip("."))
    for layer in layers.values():
        if len(tied := users[id(layer.weight)]) > 1:
            raise ValueError(
                f"{' and '.join(map(repr, tied))} are one parameter, and its gradient in all but one would be lost; untie them, or leave "
                "them out of target_modules"
            )


def _sharing(layers: dict[str, nn.Module], share: Sequence[Sequence[str]] | str | None) -> list[list[str]]:
    """The names of `layers`, in lists of those that share one P."""
    lists = SHARED if share == "auto" else () if share is None else share
    if not _is_sequence(lists) or not all(_is_sequence(names) and all(isinstance(name, str) for name in names) for names in lists):
        raise ValueError(f"share must be 'auto', None or lists of names such as [['q_proj', 'k_proj', 'v_proj']], got {share!r}")
    together: dict[object, list[str]] = defaultdict(list)
    used: set[str] = set()
    firsts: dict[tuple[str, int], str] = {}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        index = next((index for index, names in enumerate(lists) if child in names), None)
        if index is None:
            together[name].append(name)
        else:
            used.add(child)
            width = _in_features(layer)
            together[parent, index, width, layer.weight.dtype, layer.weight.device].append(name)
            if share != "auto" and (other := _in_features(layers[(first := firsts.setdefault((parent, index), name))])) != width:
                raise ValueError(f"share puts {first!r} and {name!r} together, whose in_features are {other} and {width}")
    unused = [name for names in lists for name in names if name not in used]
    if unused and share != "auto":
        raise ValueError(f"share names {', '.join(map(repr, unused))}, which no converted layer is called; use the last part of its name")
    return list(together.values())


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
