"""Storages: a storage says how the state of a rule is held in memory between steps."""

from .eight_bit import EightBit
from .plain import Plain
from .storage import Storage

__all__ = ["EightBit", "Plain", "Storage"]
