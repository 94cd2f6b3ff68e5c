"""Trainer's layer-wise variants, whose checkpoints hold nothing of their optimizers.

Trainer builds an optimizer for each parameter, steps them in hooks, and hands a LayerWiseDummyOptimizer to
the rest of its loop. That one's state_dict() has no moments, and the schedules begin anew. A run that is
resumed would go on from zero moments at the first learning rate, without a word.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch.optim import Optimizer

from ..optim.optimizer import LowRankOptimizer

MARK = "has_stepped"
"""Key of the state_dict(): whether there were moments that it does not hold."""


class LayerWise:
    """Base of optimizers that Trainer may build one a parameter, of which most have no group with `rank`:
    that needs no warning."""

    def _begin(self, *arguments: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*has no group with rank")
            super()._begin(*arguments)
        refuse_to_resume()


def refuse_to_resume() -> None:
    """Makes LayerWiseDummyOptimizer refuse a checkpoint where its optimizers are of this package. Such an
    optimizer calls it when it is built, since transformers may be imported after `install`."""
    dummy = _dummy()
    if dummy is not None and "load_state_dict" not in vars(dummy):
        dummy.state_dict, dummy.load_state_dict = _state_dict, _load_state_dict


def undo() -> None:
    dummy = _dummy()
    if dummy is not None and vars(dummy).get("load_state_dict") is _load_state_dict:
        del dummy.state_dict, dummy.load_state_dict


def _dummy() -> Any:
    return getattr(sys.modules.get("transformers.trainer_pt_utils"), "LayerWiseDummyOptimizer", None)


def _ours(dummy: Any) -> list[LowRankOptimizer]:
    return [each for each in (dummy.optimizer_dict or {}).values() if isinstance(each, LowRankOptimizer)]


def _state_dict(self: Any) -> dict[str, Any]:
    packed = Optimizer.state_dict(self)
    return packed | {MARK: any(each.state for each in ours)} if (ours := _ours(self)) else packed


def _load_state_dict(self: Any, packed: dict[str, Any]) -> None:
    # accelerate loads what a new optimizer has just given it, to move it to a device
    if _ours(self) and packed.get(MARK, True):
        raise RuntimeError(
            "Trainer saves no moments of layer-wise optimizers, so that this run cannot be resumed. Train with "
            "lowrank_kernels.integrations.transformers.OptimizerFactory and in_backward='immediately', which is layer-wise and can, or "
            "start from the checkpoint's weights"
        )
    Optimizer.load_state_dict(self, packed)
