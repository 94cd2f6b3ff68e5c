"""Why a parameter is not projected."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, nn

from ..optim import groups
from ..targets import adapters_of, experts_of, is_head_or_embedding, is_linear

FROZEN = "frozen"
IN_NO_OPTIMIZER = "in no optimizer"
NOT_IN_THE_MODEL = "not in the model"
VECTOR = "norm, bias or other vector"
EMBEDDING = "embedding"
TIED = "embedding, tied to the head"
HEAD = "output head"
ADAPTER = "adapter"
EXPERTS = "experts not targeted"
NARROW = "a side shorter than the rank"
LINEAR = "linear layer not targeted"


class Reasons:
    """Where the parameters of a model stand in it, as far as `param_groups` and `to_subspace` care."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
        for name, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                self._owners[id(parameter)].append((name, module, key))
        self._is_excluded, self._adapters = is_head_or_embedding(model), adapters_of(model)

    def why(self, param: Tensor, rank: int | None) -> str:
        """Why a trained parameter of the model is not projected. rank: the largest that its optimizer
        projects others to, or None."""
        owners = self._owners[id(param)]
        if any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for _, module, _ in owners):
            return EMBEDDING if len(owners) == 1 else TIED
        if param.dim() < 2:
            return ADAPTER if self._is_adapter(owners) else VECTOR
        if self._is_adapter(owners):
            return ADAPTER
        name, module, key = owners[0]
        if self._is_excluded(name, module):
            return HEAD
        if any(param is expert for expert in experts_of(name, module)):
            return EXPERTS
        if not is_linear(module) or key != "weight":
            return f"weight of {_kind(module)}"
        return NARROW if rank is not None and min(groups.matrix_shape(param)) < rank else LINEAR

    def _is_adapter(self, owners: list[tuple[str, nn.Module, str]]) -> bool:
        return any(id(module) in self._adapters for _, module, _ in owners)


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
