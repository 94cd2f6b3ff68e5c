"""AdamW in the subspace, with torch.optim.AdamW's conventions (Loshchilov and Hutter, arXiv 1711.05101)."""

from __future__ import annotations

from torch import Tensor

from .rule import Rule


class AdamW(Rule):
    """M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·R²;  N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε)."""

    name = "adamw"
    keys = ("betas", "eps")
    elementwise = True

    def state(self, rank: int, n: int) -> dict[str, tuple[int, int]]:
        return {"exp_avg": (rank, n), "exp_avg_sq": (rank, n)}

    def update(
        self, projected: Tensor, state: dict[str, Tensor], step: float | Tensor, *, betas: tuple[float, float], eps: float
    ) -> Tensor:
        (beta1, beta2), m, v = betas, state["exp_avg"], state["exp_avg_sq"]
        m.mul_(beta1).add_(projected, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
        return (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)

    def rotate(self, state: dict[str, Tensor], turn: Tensor) -> None:
        """M ← C·M and V ← C²·V, where C = `turn` and C² squares each element. V is turned as if its
        directions were independent (LDAdam, arXiv 2410.16103)."""
        state["exp_avg"].copy_(turn @ state["exp_avg"])
        state["exp_avg_sq"].copy_(turn.square() @ state["exp_avg_sq"])
