"""Update rules: R (r, n) and what the rule keeps → N (r, n). One file a rule, in plain PyTorch, which is its
definition."""

from .rule import Rule

__all__ = ["Rule"]
