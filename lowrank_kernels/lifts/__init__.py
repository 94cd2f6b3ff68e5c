"""Lifts: how N (r, n) moves W' (m, n). One file a lift, in plain PyTorch, which is its definition."""

from .lift import Lift

__all__ = ["Lift"]
