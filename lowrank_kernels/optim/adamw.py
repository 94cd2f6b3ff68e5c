"""LowRankAdamW and its two named forms: AdamW whose moments live in a subspace of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import ops
from .base import LowRankOptimizer
from .buckets import Bucket, Member, new_moments


class LowRankAdamW(LowRankOptimizer):
    """AdamW on R = PᵀG; W moves by α·P·N.

        R = PᵀG';  M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·R²;  N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε)
        W' = (1 − lr·wd)·W' − lr·α·P·N          G' = G, W' = W on the left side, their transposes on the right

    With P = I and α = 1 this is torch.optim.AdamW. For a matrix (rows, columns), m is the projected side and n the other; P is (m, r)
    in the parameter's dtype, M and V are (r, n) in fp32 (fp64 for fp64 parameters), so the state takes 8·r·n bytes and a basis
    against AdamW's 8·m·n in fp32.

    Args:
        params: parameters, (name, parameter) pairs or groups. A group with `rank` is projected, one without is torch's own fused
            AdamW. `lowrank_kernels.param_groups` makes both from a model.
        lr: step size; a float, or a one-element CPU tensor.
        betas: β1, β2 in [0, 1).
        eps: ε ≥ 0, added to the root of the bias-corrected second moment.
        weight_decay: wd ≥ 0, decoupled, applied before the update.

    Keys of a low-rank group:
        rank: r ≥ 1, required; clamped to the shorter side of each matrix with one warning a shape.
        update_proj_gap: steps between refreshes of the basis (200).
        stagger: False, all matrices of the group refresh together (GaLore's rule, default), or True, they take turns: of k
            parameters, parameter i refreshes where step mod gap is ⌊i·gap / k⌋, at most ⌈k / gap⌉ of them at a step. The first
            step gives every one its first basis, so its first period is the shorter one.
        scale: α on the back-projected update (0.25).
        proj_type: the projected side: "std" the shorter one, a square matrix's right (default); "reverse_std"; "left"; "right".
        selection: "importance" (I3S: sampled ∝ σ, default), "dominant" (GaLore: the top r), "random" (orthonormal, gradient-free).
        svd: "randomized" (range finder, default) or "exact" (full SVD: the papers' definition; slow, for checking).
        oversample, power_iters: accuracy of the range finder (8, 1).
        seed: all randomness is a function of (seed, index of the parameter in the optimizer, number of the refresh) (0).

    Parameters of shape [experts, m, n] are batches of matrices, those with more dimensions are read as [out, -1].

    Raises:
        ValueError, TypeError: at construction (and add_param_group) for anything out of range, an unknown key, a parameter that is
        no matrix; in step() for a sparse or complex gradient. The message names the group, the parameter and the remedy.

    Sources: GaLore, arXiv 2403.03507; I3S, arXiv 2502.05790. Unlike galore-torch, decay comes first and ε stands outside the bias
    correction, as in torch.optim.AdamW; with eps = 0 and weight_decay = 0 the two rules agree.
    """

    state_keys = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def new_state(self, member: Member, bucket: Bucket) -> dict[str, Tensor]:
        return {key: new_moments(member, bucket.rank, bucket.right) for key in self.state_keys}

    def step_bucket(self, bucket: Bucket, bases: list[Tensor], found_inf: Tensor | None) -> None:
        hyper = bucket.hyper
        ops.adamw_step_(
            bucket.weights,
            bucket.grads,
            bases,
            bucket.states("exp_avg"),
            bucket.states("exp_avg_sq"),
            lr=hyper["lr"],
            beta1=hyper["betas"][0],
            beta2=hyper["betas"][1],
            eps=hyper["eps"],
            weight_decay=hyper["weight_decay"],
            scale=hyper["scale"],
            step=bucket.step + 1,
            right=bucket.right,
            found_inf=found_inf,
        )


class GaLoreAdamW(LowRankAdamW):
    """LowRankAdamW with selection="dominant": the r leading singular vectors of the gradient (GaLore, arXiv 2403.03507)."""

    selection = "dominant"


class I3SAdamW(LowRankAdamW):
    """LowRankAdamW with selection="importance": r singular vectors sampled with probability ∝ σ (I3S, arXiv 2502.05790)."""

    selection = "importance"
