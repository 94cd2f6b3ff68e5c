"""How the states of a rule lie in memory between steps."""

from .eight_bit import EightBit
from .plain import Plain
from .storage import Storage

__all__ = ["EightBit", "Plain", "Storage"]
