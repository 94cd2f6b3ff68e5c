"""The methods, one class each. A method is a rule, a selection and a lift."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

from ..lifts.back_projection import BackProjection
from ..lifts.residual import Residual
from ..lifts.scaling import ChannelScaling, TensorScaling
from ..rules import Rule
from ..rules.adafactor import Adafactor, Factored
from ..rules.adam_mini import AdamMini
from ..rules.adamw import AdamW
from ..storage import EightBit, Plain
from . import groups, keys
from .optimizer import LowRankOptimizer

__all__ = [
    "ApolloAdamW",
    "ApolloMiniAdamW",
    "FiraAdamW",
    "GaLoreAdamW",
    "I3SAdamW",
    "LowRankAdafactor",
    "LowRankAdamMini",
    "LowRankAdamW",
]
LIFTS = {lift.name: lift for lift in (BackProjection(), Residual(), ChannelScaling(), TensorScaling())}
STORAGES = {32: Plain(), 8: EightBit()}


@keys.documented("Keys of a low-rank group", keys.LOW_RANK)
class LowRankAdamW(LowRankOptimizer):
    """AdamW on the projected gradient R = PᵀG; W moves by α·P·N.

        R = PᵀG';  M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·R²;  N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε)
        W' = (1 − lr·wd)·W' − lr·α·P·N          G' = G, W' = W on the left side, their transposes on the right

    With P = I and α = 1 this is torch.optim.AdamW. m is the length of the projected side of a matrix, n that
    of the other side. P is (m, r) in the parameter's dtype. M and V are (r, n) in fp32 (fp64 for fp64
    parameters). The fp32 state takes 8·r·n bytes plus the basis, where AdamW's takes 8·m·n.

    Args:
        params: parameters, (name, parameter) pairs or groups. A group with `rank` is projected. A group
            without `rank` is trained by torch's own fused AdamW. `lowrank_kernels.param_groups` makes both
            from a model.
        lr: step size; a float, or a one-element tensor, which must be on the CPU unless `capturable`.
        betas: β1, β2 in [0, 1).
        eps: ε ≥ 0, added to the root of the bias-corrected second moment.
        weight_decay: wd ≥ 0, decoupled, applied before the update.
        capturable: whether step() may be part of a CUDA graph (False). lr may then be a tensor on the GPU,
            which kernels read at each replay. A graph fixes betas, eps, weight_decay and scale when it is
            captured, and lr too if it is a number. It also fixes the addresses of the states, which
            load_state_dict replaces. `refresh` explains how a graph gets new bases.

    The other keys of a low-rank group are declared in optim/keys.py; help(LowRankAdamW) and
    docs/group-keys.md list them.

    Where torch.distributed is initialised, the first step compares the seeds and other settings of all
    processes in one small all-gather. It raises RuntimeError where they differ for the same parameters. A
    matrix gets its basis with its first gradient that is not all zero. Unknown keys of a group are accepted,
    as in torch's optimizers, unless they closely resemble a known key.

    A parameter of shape [experts, m, n] is a batch of matrices. A parameter with more dimensions is read as
    [out, -1].

    Raises:
        ValueError, TypeError: at construction (and add_param_group) for a value out of range, a mistyped key,
        an option of torch's AdamW that is not supported here (amsgrad, maximize, …), or a parameter that is
        no matrix; in step() for a sparse or complex gradient. The message names the group, the parameter and
        the remedy.

    Sources: GaLore, arXiv 2403.03507; I3S, arXiv 2502.05790. Two things differ from galore-torch and follow
    torch.optim.AdamW: decay comes first, and ε stands outside the bias correction. With eps = 0 and
    weight_decay = 0 the two rules agree.
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
        self._begin(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, capturable=capturable), unsupported)

    def _begin(self, params: Iterable[Any], arguments: dict[str, Any], unsupported: dict[str, Any]) -> None:
        keys.check_arguments(
            type(self).__name__,
            unsupported,
            own=tuple(arguments),
            of_groups=keys.names(keys.LOW_RANK),
            remedy=f"a group: {type(self).__name__}(lowrank_kernels.param_groups(model, rank=…, …))",
        )
        super().__init__(params, arguments)
        if type(self) is not LowRankAdamW and not any(map(groups.is_low_rank, self.param_groups)):
            warnings.warn(
                f"{type(self).__name__} has no group with rank and trains every parameter with AdamW; "
                "lowrank_kernels.param_groups(model, rank=…) makes groups that are projected",
                UserWarning,
                stacklevel=3,
            )


class GaLoreAdamW(LowRankAdamW):
    """LowRankAdamW with selection="dominant": the basis is the r leading singular vectors of the gradient
    (GaLore, arXiv 2403.03507)."""

    fixed = {"selection": "dominant"}


class I3SAdamW(LowRankAdamW):
    """LowRankAdamW with selection="importance": the basis is r singular vectors, sampled with probability ∝ σ
    (I3S, arXiv 2502.05790)."""

    fixed = {"selection": "importance"}


class FiraAdamW(LowRankAdamW):
    """LowRankAdamW with lift="residual": the part of the gradient outside the subspace moves the weight as
    well, scaled like N (Fira, arXiv 2410.01623).

        W' = (1 − lr·wd)·W' − lr·α·(P·N + φ·(G' − P·R)),     φ = ‖N‖ / ‖R‖ of each column

    A limiter keeps the norm of the second part from growing by more than a factor of 1.01 a step; see
    lifts/residual.py.

    selection is "dominant" unless the group sets another one; "importance" combines I3S's bases with Fira.
    The state also has `residual_norm`, one fp32 for each matrix. On a GPU a step takes four launches a
    bucket. On a CPU it is composed of project, rule and lift.
    """

    fixed = {"lift": "residual"}
    preferred = {"selection": "dominant"}


class ApolloAdamW(LowRankAdamW):
    """LowRankAdamW with lift="channel_scaling": the subspace says by how much each column of the gradient is
    scaled, and the gradient itself moves the weight (APOLLO, arXiv 2412.05270).

        W' = (1 − lr·wd)·W' − lr·α·s·G',     s = ‖N‖ / ‖R‖ of each column

    A limiter keeps the norm of s·G' from growing by more than a factor of 1.01 a step; see lifts/scaling.py.

    selection is "gaussian" unless the group sets another one: P of N(0, 1/r), a new one every
    `update_proj_gap` steps. α, the group's `scale`, is 1 unless it sets another one. ‖N‖ is about √r where
    AdamW's is about √m, so α = √(m/r) gives updates of AdamW's size. The state keeps the basis, and
    `scaled_norm`, one fp32 for each matrix. On a GPU a step takes three launches a bucket.
    """

    fixed = {"lift": "channel_scaling"}
    preferred = {"selection": "gaussian", "scale": 1.0}


class ApolloMiniAdamW(LowRankAdamW):
    """LowRankAdamW with lift="tensor_scaling", for rank 1: one ratio scales the whole gradient (APOLLO-Mini,
    arXiv 2412.05270).

        W' = (1 − lr·wd)·W' − lr·α·s·G',     s = ‖N‖ / ‖R‖ of the whole matrix

    As ApolloAdamW. `scale` is √128 unless the group sets another one, as in the paper.
    """

    fixed = {"lift": "tensor_scaling"}
    preferred = {"selection": "gaussian", "scale": math.sqrt(128)}


class LowRankAdamMini(LowRankAdamW):
    """Adam-mini on the projected gradient: one second moment for each direction of the basis
    (arXiv 2406.16793; in a subspace, I3S, arXiv 2502.05790).

        R = PᵀG';  M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·(mean of R² over each row)
        N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε);  W' = (1 − lr·wd)·W' − lr·α·P·N

    M is (r, n), V is (r, 1), which is `row_var` in the state: half of AdamW's moments. Every key of
    LowRankAdamW's groups works here. state_bits=8 codes M. Groups without rank are trained by AdamW. On a GPU
    a step is composed of project, rule and lift.
    """

    rule = AdamMini()


@keys.documented("Keys that only this optimizer has", keys.ADAFACTOR)
class LowRankAdafactor(LowRankAdamW):
    """Adafactor on the projected gradient: the second moment is the product of a column and a row
    (arXiv 1804.04235; in a subspace, GaLore, arXiv 2403.03507, and I3S, arXiv 2502.05790).

        R = PᵀG';  A = β2ₜ·A + (1−β2ₜ)·(mean of R² + 1e-30 over each row);  C likewise over each column
        U = R / sqrt(A·C / mean(A));  U = U / max(1, RMS(U) / d);  M = β1·M + (1−β1)·U
        W' = (1 − lr·wd)·W' − lr·α·P·M          β2ₜ = 1 − t^γ

    A is (r, 1) and C (1, n): `row_var` and `col_var` in the state. M is (r, n), and is not corrected for its
    start from zero; without it (first_moment=False) the state of a matrix is r + n numbers and its basis. The
    paper's relative steps and its scaling by the size of the weight are off: lr is the step size, decay is
    decoupled. Every key of LowRankAdamW's groups works here. state_bits=8 codes M. Groups without rank are
    trained by AdamW, with all of `betas` and with `eps`. On a GPU a step is composed of project, rule and
    lift.
    """

    own_keys = keys.ADAFACTOR
    rules = {True: Adafactor(), False: Factored()}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        beta2_decay: float = -0.8,
        clip_threshold: float = 1.0,
        first_moment: bool = True,
        capturable: bool = False,
        **unsupported: Any,
    ) -> None:
        arguments = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, capturable=capturable)
        own = dict(beta2_decay=beta2_decay, clip_threshold=clip_threshold, first_moment=first_moment)
        self._begin(params, arguments | own, unsupported)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return self.rules[group["first_moment"]]
