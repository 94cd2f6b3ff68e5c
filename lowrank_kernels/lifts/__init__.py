"""Lifts: a lift says how N (r, n) moves W' (m, n). Each lift has one file, in plain PyTorch, which is its
definition."""

from .lift import Lift

__all__ = ["Lift"]
