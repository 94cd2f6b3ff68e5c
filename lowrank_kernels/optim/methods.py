"""The methods, one class each: a rule, a selection, a lift."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..lifts.back_projection import BackProjection
from ..lifts.residual import Residual
from ..rules.adamw import AdamW
from ..storage import EightBit, Plain
from . import keys
from .optimizer import LowRankOptimizer, warn_without_rank

__all__ = ["FiraAdamW", "GaLoreAdamW", "I3SAdamW", "LowRankAdamW"]
LIFTS = {lift.name: lift for lift in (BackProjection(), Residual())}
STORAGES = {32: Plain(), 8: EightBit()}


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
        lr: step size; a float, or a one-element tensor, on the CPU unless `capturable`.
        betas: β1, β2 in [0, 1).
        eps: ε ≥ 0, added to the root of the bias-corrected second moment.
        weight_decay: wd ≥ 0, decoupled, applied before the update.
        capturable: step() may be part of a CUDA graph (False). state["step"] is then a tensor on the parameter's device, and lr may be
            one, which kernels read at each replay; an lr that is not, betas, eps, weight_decay and scale are in the graph as they were
            when it was captured, and so are the addresses of states, which load_state_dict replaces. `refresh` says how bases come
            into it.

    Keys of a low-rank group:
        rank: r ≥ 1, required; clamped to the shorter side of each matrix with one warning a shape.
        update_proj_gap: steps between refreshes of the basis (200).
        stagger: False, all matrices of the group refresh together (GaLore's rule, default), or True, they take turns: of k
            parameters, parameter i refreshes where step mod gap is ⌊i·gap / k⌋, at most ⌈k / gap⌉ of them at a step. The first
            step gives every one its first basis, so its first period is the shorter one.
        scale: α on the back-projected update (0.25).
        state_bits: 32, or 8 for moments as codes of one byte with an fp32 scale for each block of 64 (format: eight_bit.py): the state
            has exp_avg_scale and exp_avg_sq_scale besides, and takes 2·r·(n + 4·⌈n/64⌉) bytes and a basis. Codes are the nearest
            ones: an element of V whose share of its block's largest changes by less than half a code at each step, 0.8 % and more,
            keeps that share. Where gradients drift that is felt at β2 = 0.999, little at 0.99.
        rounding: of the weight when it is stored: "nearest" (default), or for bf16 parameters "stochastic", up or down at random so that
            the mean stays, as a function of (seed, the parameter, number of the update, element).
        proj_type: the projected side: "std" the shorter one, a square matrix's right (default); "reverse_std"; "left"; "right".
        selection: "importance" (I3S: sampled ∝ σ, default), "dominant" (GaLore: the top r), "random" (orthonormal, gradient-free).
        lift: how N moves the weight: "back_projection", by P·N (default), or "residual", by that and what the subspace leaves out of the
            gradient (Fira; lifts/residual.py has the formula).
        moments: what a refresh does to them: "keep" leaves them as they are (default); "rotate" turns them into the new basis, M by
            C = P_newᵀ·P_old and V by its squares (LDAdam, arXiv 2410.16103); "reset" starts them, and t, from zero.
        svd: "randomized" (range finder, default) or "exact" (full SVD: the papers' definition; slow, for checking).
        oversample, power_iters: accuracy of the range finder (8, 1).
        seed: all randomness is a function of (seed, the parameter, number of the refresh, or of the update where it is a rounding) (0). The
            parameter is known by its name, where the group has `param_names` or `param_groups` has seen the model, else by its index in
            the optimizer. A checkpoint keeps what it was made with.

    Where torch.distributed is initialised the first step compares seeds and other settings of all processes, in one small all-gather,
    and raises RuntimeError where they differ for the same parameters. A matrix whose gradients have been all zero waits with its basis for
    the first one that is not. Unknown keys of a group pass, as torch's optimizers let them, unless they nearly are one of these.

    Parameters of shape [experts, m, n] are batches of matrices, those with more dimensions are read as [out, -1].

    Raises:
        ValueError, TypeError: at construction (and add_param_group) for anything out of range, a mistyped key, what torch's AdamW
        knows and this one does not (amsgrad, maximize, …), a parameter that is no matrix; in step() for a sparse or complex gradient.
        The message names the group, the parameter and the remedy.

    Sources: GaLore, arXiv 2403.03507; I3S, arXiv 2502.05790. Unlike galore-torch, decay comes first and ε stands outside the bias
    correction, as in torch.optim.AdamW; with eps = 0 and weight_decay = 0 the two rules agree.
    """

    rule = AdamW()
    lifts = LIFTS
    storages = STORAGES

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        capturable: bool = False,
        **unsupported: Any,
    ) -> None:
        keys.check_arguments(
            type(self).__name__,
            unsupported,
            own=keys.names((*keys.ADAMW, keys.CAPTURABLE)),
            of_groups=keys.names(keys.LOW_RANK),
            remedy=f"a group: {type(self).__name__}(lowrank_kernels.param_groups(model, rank=…, …))",
        )
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, capturable=capturable))
        warn_without_rank(self)


class GaLoreAdamW(LowRankAdamW):
    """LowRankAdamW with selection="dominant": the r leading singular vectors of the gradient (GaLore, arXiv 2403.03507)."""

    fixed = {"selection": "dominant"}


class I3SAdamW(LowRankAdamW):
    """LowRankAdamW with selection="importance": r singular vectors sampled with probability ∝ σ (I3S, arXiv 2502.05790)."""

    fixed = {"selection": "importance"}


class FiraAdamW(LowRankAdamW):
    """LowRankAdamW with lift="residual": the rest of the gradient moves the weight as well, scaled like N (Fira, arXiv 2410.01623).

        W' = (1 − lr·wd)·W' − lr·α·(P·N + φ·(G' − P·R))          φ: of each column, ‖N‖ / ‖R‖; lifts/residual.py has the limiter

    selection is "dominant" unless the group says otherwise; "importance" gives I3S's bases under Fira. The state has `residual_norm`
    besides, one fp32 a matrix. No device has it in one go yet: it is composed of project, rule and lift.
    """

    fixed = {"lift": "residual"}
    preferred = {"selection": "dominant"}
