"""The methods by the names that users type: for `estimate_memory`, Hugging Face's Trainer and commands."""

from __future__ import annotations

from typing import Any

from . import methods
from .optimizer import LowRankOptimizer
from .rso import RSOAdamW

DOMINANT, IMPORTANCE = {"selection": "dominant"}, {"selection": "importance"}
NAMED: dict[str, tuple[type[LowRankOptimizer], dict[str, Any]]] = {
    "galore": (methods.GaLoreAdamW, {}),
    "i3s": (methods.I3SAdamW, {}),
    "fira": (methods.FiraAdamW, {}),
    "fira-i3s": (methods.FiraAdamW, IMPORTANCE),
    "apollo": (methods.ApolloAdamW, {}),
    "apollo-mini": (methods.ApolloMiniAdamW, {}),
    "adafactor": (methods.LowRankAdafactor, DOMINANT),
    "adafactor-i3s": (methods.LowRankAdafactor, IMPORTANCE),
    "adam-mini": (methods.LowRankAdamMini, DOMINANT),
    "adam-mini-i3s": (methods.LowRankAdamMini, IMPORTANCE),
    "rso": (RSOAdamW, {}),
}
"""Name → the class, and the keys of its low-rank groups that the name stands for."""


def named(method: str) -> tuple[type[LowRankOptimizer], dict[str, Any]]:
    """The class of a method, and the keys that its name stands for. Raises ValueError for a name that does
    not exist."""
    if method not in NAMED:
        raise ValueError(f"method must be one of {', '.join(NAMED)}, got {method!r}")
    return NAMED[method]
