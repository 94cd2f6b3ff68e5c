"""Adafactor in the subspace (Shazeer and Stern, arXiv 1804.04235): the second moment as the product of a
column and a row.

Steps are external: the paper's relative step sizes and its scaling by the size of the weight are off, and lr
is the optimizer's. GaLore (arXiv 2403.03507) and I3S (arXiv 2502.05790) use it so, with the first moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import WHOLE, Across, Rule

EPS = 1e-30
"""ε₁, added to R²."""


class Factored(Rule):
    """A = β2ₜ·A + (1−β2ₜ)·(mean of R² + ε₁ over each row);    C likewise over each column;    β2ₜ = 1 − t^γ
    U = R / sqrt(A·C / mean(A));    N = U / max(1, RMS(U) / d)

    A is (r, 1) and C (1, n). γ = `beta2_decay` < 0, so the first update forgets the zeros that A and C start
    from, and no bias is left to correct. d = `clip_threshold`; RMS is the root of the mean square.
    """

    name = "factored"
    keys = ("beta2_decay", "clip_threshold")

    def state(self, rank: int, n: int) -> dict[str, tuple[int, int]]:
        return {"row_var": (rank, 1), "col_var": (1, n)}

    def update(
        self,
        projected: Tensor,
        state: dict[str, Tensor],
        step: float | Tensor,
        *,
        beta2_decay: float,
        clip_threshold: float,
        across: Across = WHOLE,
    ) -> Tensor:
        rows, columns, new = state["row_var"], state["col_var"], step**beta2_decay
        squares = projected.square() + EPS
        rows.mul_(1 - new).add_(new * across.mean(squares, (-1,)))
        columns.mul_(1 - new).add_(new * squares.mean(-2, keepdim=True))
        # Two roots, because the product may underflow. Where even the root does, R has always been zero.
        root = (rows / rows.mean(-2, keepdim=True)).sqrt() * columns.sqrt()
        update = projected / root.clamp_min(torch.finfo(root.dtype).tiny)
        size = across.mean(update.square(), (-2, -1)).sqrt()
        return update / (size / clip_threshold).clamp_min(1)

    def rotate(self, state: dict[str, Tensor], turn: Tensor) -> None:
        """As AdamW's V: A·C / mean(A) becomes C²·A·C / mean(A), where C² has the squares of `turn`."""
        rows, columns = state["row_var"], state["col_var"]
        mean = rows.mean(-2, keepdim=True)
        rows.copy_(turn.square() @ rows)
        columns.mul_((rows.mean(-2, keepdim=True) / mean).nan_to_num_(1))  # 0/0 before the first update


class Adafactor(Factored):
    """As Factored, and then M = β1·M + (1−β1)·N;  N = M."""

    name = "adafactor"
    keys = ("betas", "beta2_decay", "clip_threshold")

    def state(self, rank: int, n: int) -> dict[str, tuple[int, int]]:
        return {"exp_avg": (rank, n)} | super().state(rank, n)

    def update(self, projected: Tensor, state: dict[str, Tensor], step: float | Tensor, *, betas: tuple[float, float], **options) -> Tensor:
        m = state["exp_avg"]
        m.mul_(betas[0]).add_(super().update(projected, state, step, **options), alpha=1 - betas[0])
        return m

    def rotate(self, state: dict[str, Tensor], turn: Tensor) -> None:
        super().rotate(state, turn)
        state["exp_avg"].copy_(turn @ state["exp_avg"])
