"""Layers that train in a random subspace (RSO): SubspaceLinear, and the conversion of a model to it and
back."""

from .convert import to_dense, to_subspace
from .linear import SubspaceLayer, SubspaceLinear
from .owner import layer_of
from .subspace import Subspace

__all__ = ["Subspace", "SubspaceLayer", "SubspaceLinear", "layer_of", "to_dense", "to_subspace"]
