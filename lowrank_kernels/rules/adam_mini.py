"""Adam-mini in the subspace (Zhang et al., arXiv 2406.16793): one second moment for a block of elements that
are alike.

The blocks are the rows of R, one for each direction of the basis. A row's size is about the singular value of
its direction, and all of a row is of that size.
"""

from __future__ import annotations

from torch import Tensor

from .rule import WHOLE, Across, Rule


class AdamMini(Rule):
    """M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·(mean of R² over each row);
    N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε).  V is (r, 1)."""

    name = "adam_mini"
    keys = ("betas", "eps")

    def state(self, rank: int, n: int) -> dict[str, tuple[int, int]]:
        return {"exp_avg": (rank, n), "row_var": (rank, 1)}

    def update(
        self,
        projected: Tensor,
        state: dict[str, Tensor],
        step: float | Tensor,
        *,
        betas: tuple[float, float],
        eps: float,
        across: Across = WHOLE,
    ) -> Tensor:
        (beta1, beta2), m, v = betas, state["exp_avg"], state["row_var"]
        m.mul_(beta1).add_(projected, alpha=1 - beta1)
        v.mul_(beta2).add_(across.mean(projected.square(), (-1,)), alpha=1 - beta2)
        return m / ((1 - beta1**step) * ((v / (1 - beta2**step)).sqrt() + eps)).to(m.dtype)  # all but one division on (r, 1)

    def rotate(self, state: dict[str, Tensor], turn: Tensor) -> None:
        """As AdamW's, whose V has this one as the means of its rows."""
        state["exp_avg"].copy_(turn @ state["exp_avg"])
        state["row_var"].copy_(turn.square() @ state["row_var"])
