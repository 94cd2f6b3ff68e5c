"""Bounds on the rounding error of the step, element by element, each derived from the unit roundoff and the length of a sum.

A bound is an fp64 tensor E with |computed − exact| ≤ E, to first order in the unit roundoffs. It holds for every order of summation,
so it is the same for a GPU, a CPU and Triton's interpreter. Notation: u unit roundoff, |A| the matrix of absolute values,
γ = length·u the relative error of a sum (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, "tf32": 2.0**-11}
"""Half the distance from 1 to the next number: the relative error of rounding to nearest."""

ACCUMULATION_UNIT = 2.0**-23
"""Relative error of one fp32 addition inside a dot: tensor cores may cut where they should round, which doubles it."""

TINY = 2.0**-148
"""Absolute error of an fp32 operation on subnormal numbers, twice the smallest."""


def store_unit(dtype: torch.dtype, truncates: bool) -> float:
    """Relative error of a store: u, or 2u where conversion to bf16 cuts instead of rounding, as Triton's interpreter does."""
    return UNIT[dtype] * (2 if truncates and dtype == torch.bfloat16 else 1)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str = "result") -> None:
    """‖actual − expected‖ ≤ ‖bound‖ and, since the bounds here are elementwise, |actual − expected| ≤ bound. A NaN fails."""
    actual, expected, bound = actual.double().cpu(), expected.double().cpu(), bound.double().cpu()
    error = (actual - expected).abs()
    norm = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements out of bounds, first at {wrong.nonzero()[0].tolist()}; "
        f"‖x − ref‖/‖ref‖ = {error.norm() / norm:.3g}, bound {bound.norm() / norm:.3g}"
    )


def project_error(basis: Tensor, grad: Tensor, operand_unit: float = 0.0) -> Tensor:
    """E of R = PᵀG', for exact P (m, r) and G' (m, n).

    Products of 16-bit operands are exact in fp32, products of fp32 ones are off by u; m of them take m − 1 additions:
    |error| ≤ (m + 1)·u·|P|ᵀ|G'|. Operands rounded to a narrower format first (tf32) add `operand_unit` each.
    """
    terms = basis.shape[-2] + 1
    return (terms * ACCUMULATION_UNIT + 2 * operand_unit) * (basis.double().abs().mT @ grad.double().abs()) + terms * TINY


def moments_error(
    exp_avg: Tensor, exp_avg_sq: Tensor, projected: Tensor, beta1: float, beta2: float, projected_error: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """E of M and V after the update, for states M, V before it and R known to `projected_error`.

    M: β1 and 1 − β1 rounded to fp32 (u), two products (u), one sum (u): 3u·(β1|M| + (1 − β1)|R|). V: R² (u) besides: 4u·V, all its
    terms being positive. An error of R enters M times 1 − β1 and V times (1 − β2)·(2|R| + error).
    """
    unit, r = UNIT[torch.float32], projected.double().abs()
    of_m = 3 * unit * (beta1 * exp_avg.double().abs() + (1 - beta1) * r) + (1 - beta1) * projected_error + 3 * TINY
    of_v = 4 * unit * (beta2 * exp_avg_sq.double() + (1 - beta2) * r**2) + (1 - beta2) * (2 * r + projected_error) * projected_error
    return of_m, of_v + 4 * TINY


def normalised_error(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    errors: tuple[Tensor, Tensor],
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    store: float = 0.0,
) -> Tensor:
    """E of N, for the exact M and V after the update and the errors of the computed ones.

    M̂ = M / (1 − β1ᵗ): correction rounded (u), division (u). √V̂: the same two, halved by the root, and the root (u). Sum with ε: ε
    rounded (u), sum (u). Quotient (u), and `store` for a narrower output. Together 2 + 2 + 2 + 1 = 7u·|N|. Errors of M and V enter as
    E(M)/(D·c1) and |M̂|·E(√V̂)/D², where D = √V̂ + ε, E(√V̂) = min(E(V̂)/√V̂, √E(V̂)).
    """
    c1, c2 = 1 - beta1**step, 1 - beta2**step
    of_m, of_v = errors
    m_hat, root = exp_avg.double() / c1, (exp_avg_sq.double() / c2).sqrt()
    of_root = torch.minimum(of_v / c2 / root.clamp_min(1e-300), (of_v / c2).sqrt())
    denominator = root + eps
    smallest = torch.maximum(denominator - of_root, torch.full_like(root, eps))
    size = m_hat.abs() / denominator
    own = (7 * UNIT[torch.float32] + store) * size
    return own + of_m / c1 / smallest + m_hat.abs() * of_root / (denominator * smallest) + 4 * TINY


def back_project_error(
    weight: Tensor,
    basis: Tensor,
    normalised: Tensor,
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    store: float,
    operand_unit: float = 0.0,
    basis_unit: float = 0.0,
    normalised_error: Tensor | float = 0.0,
) -> Tensor:
    """E of W' after the update; weight is W' (m, n) before it, basis (m, r), normalised (r, n).

    The dot: r products and sums, (r + 1)·u·|P||N|. N rounded to the dtype of P (`operand_unit`) and both rounded to tf32
    (`basis_unit` for P) add themselves. Coefficients rounded (u), two products (u), one difference (u): 3u of either term. The store
    adds its own of the result.
    """
    unit, terms = UNIT[torch.float32], basis.shape[-1] + 1
    p, n = basis.double(), normalised.double()
    of_n = normalised_error if isinstance(normalised_error, Tensor) else torch.full_like(n, normalised_error)
    size = p.abs() @ n.abs()
    of_dot = (terms * ACCUMULATION_UNIT + operand_unit + basis_unit) * size + p.abs() @ of_n * (1 + operand_unit) + terms * TINY
    kept = abs(1 - lr * weight_decay) * weight.double().abs()
    moved = abs(lr * scale)
    in_fp32 = 3 * unit * (kept + moved * size) + moved * of_dot
    result = ((1 - lr * weight_decay) * weight.double() - lr * scale * (p @ n)).abs()
    smallest = {torch.float16: 2.0**-24}.get(weight.dtype, TINY)
    return in_fp32 + store * (result + in_fp32) + smallest
