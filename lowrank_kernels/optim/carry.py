"""What becomes of a parameter's moments when it gets another basis: the group's key `moments`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..rules import Rule
from ..storage import Storage


def carry(moments: str, state: dict[str, Any], fresh: Tensor, rule: Rule, storage: Storage) -> None:
    """Before state["basis"] becomes `fresh`. "keep": they stay as they are, in the coordinates of the new basis (GaLore, I3S)."""
