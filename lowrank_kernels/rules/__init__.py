"""Update rules: a rule computes N (r, n) from R (r, n) and its own state. Each rule has one file, in plain
PyTorch, which is its definition."""

from .rule import Rule

__all__ = ["Rule"]
