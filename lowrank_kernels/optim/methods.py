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


@keys.documented("Keys of a low-rank group", keys.LOW_RANK)
class LowRankAdamW(LowRankOptimizer):
    """AdamW on R = PᵀG; W moves by α·P·N.

        R = PᵀG';  M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·R²;  N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε)
        W' = (1 − lr·wd)·W' − lr·α·P·N          G' = G, W' = W on the left side, their transposes on the right

    With P = I and α = 1 this is torch.optim.AdamW. For a matrix (rows, columns), m is the projected side and
    n the other; P is (m, r) in the parameter's dtype, M and V are (r, n) in fp32 (fp64 for fp64 parameters),
    so the state takes 8·r·n bytes and a basis against AdamW's 8·m·n in fp32.

    Args:
        params: parameters, (name, parameter) pairs or groups. A group with `rank` is projected, one without
            is torch's own fused AdamW. `lowrank_kernels.param_groups` makes both from a model.
        lr: step size; a float, or a one-element tensor, on the CPU unless `capturable`.
        betas: β1, β2 in [0, 1).
        eps: ε ≥ 0, added to the root of the bias-corrected second moment.
        weight_decay: wd ≥ 0, decoupled, applied before the update.
        capturable: step() may be part of a CUDA graph (False). lr may then be a tensor on the GPU, which
            kernels read at each replay. A graph keeps betas, eps, weight_decay, scale and an lr that is a
            number as they were when it was captured, and the addresses of states, which load_state_dict
            replaces. `refresh` says how bases come into it.

    What a low-rank group holds besides is declared in optim/keys.py; help(LowRankAdamW) and
    docs/group-keys.md list it.

    Where torch.distributed is initialised the first step compares seeds and other settings of all processes,
    in one small all-gather, and raises RuntimeError where they differ for the same parameters. A matrix whose
    gradients have been all zero waits with its basis for the first one that is not. Unknown keys of a group
    pass, as torch's optimizers let them, unless they nearly are one of these.

    Parameters of shape [experts, m, n] are batches of matrices, those with more dimensions are read as [out,
    -1].

    Raises:
        ValueError, TypeError: at construction (and add_param_group) for anything out of range, a mistyped
        key, what torch's AdamW knows and this one does not (amsgrad, maximize, …), a parameter that is no
        matrix; in step() for a sparse or complex gradient. The message names the group, the parameter and the
        remedy.

    Sources: GaLore, arXiv 2403.03507; I3S, arXiv 2502.05790. Unlike galore-torch, decay comes first and ε
    stands outside the bias correction, as in torch.optim.AdamW; with eps = 0 and weight_decay = 0 the two
    rules agree.
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
    """LowRankAdamW with selection="dominant": the r leading singular vectors of the gradient (GaLore, arXiv
    2403.03507)."""

    fixed = {"selection": "dominant"}


class I3SAdamW(LowRankAdamW):
    """LowRankAdamW with selection="importance": r singular vectors sampled with probability ∝ σ (I3S, arXiv
    2502.05790)."""

    fixed = {"selection": "importance"}


class FiraAdamW(LowRankAdamW):
    """LowRankAdamW with lift="residual": the rest of the gradient moves the weight as well, scaled like N
    (Fira, arXiv 2410.01623).

        W' = (1 − lr·wd)·W' − lr·α·(P·N + φ·(G' − P·R)),     φ: of each column, ‖N‖ / ‖R‖

    lifts/residual.py has the limiter, which keeps the second part from growing by more than 1.01 a step.

    selection is "dominant" unless the group says otherwise; "importance" gives I3S's bases under Fira. The
    state has `residual_norm` besides, one fp32 a matrix. No device has it in one go yet: it is composed of
    project, rule and lift.
    """

    fixed = {"lift": "residual"}
    preferred = {"selection": "dominant"}
