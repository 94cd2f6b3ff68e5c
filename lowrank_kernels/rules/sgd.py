"""Gradient descent with momentum in the subspace, with torch.optim.SGD's conventions."""

from __future__ import annotations

from torch import Tensor

from .rule import Rule


class SGD(Rule):
    """M = momentum·M + R;  N = M."""

    name = "sgd"
    keys = ("momentum",)
    elementwise = True

    def state(self, rank: int, n: int) -> dict[str, tuple[int, int]]:
        return {"momentum_buffer": (rank, n)}

    def update(self, projected: Tensor, state: dict[str, Tensor], step: float | Tensor, *, momentum: float) -> Tensor:
        return state["momentum_buffer"].mul_(momentum).add_(projected)

    def rotate(self, state: dict[str, Tensor], turn: Tensor) -> None:
        state["momentum_buffer"].copy_(turn @ state["momentum_buffer"])
