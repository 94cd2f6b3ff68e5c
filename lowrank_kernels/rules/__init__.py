"""Update rules: R (r, n) and what the rule keeps → N (r, n). One file a rule, in plain PyTorch, which is its definition."""

from .adamw import AdamW
from .rule import Rule
from .sgd import SGD

__all__ = ["SGD", "AdamW", "Rule"]
