"""Bounds on the rounding error of the step, element by element, each derived from the unit roundoff and the
length of a sum.

A bound is an fp64 tensor E with |computed − exact| ≤ E, to first order in the unit roundoffs. It holds for
every order of summation, so it is the same for a GPU, a CPU and Triton's interpreter. Notation: u unit
roundoff, |A| the matrix of absolute values, γ = length·u the relative error of a sum (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_kernels.rounding import round_stochastically

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, "tf32": 2.0**-11}
"""Half the distance from 1 to the next number: the relative error of rounding to nearest."""

ACCUMULATION_UNIT = 2.0**-23
"""Relative error of one fp32 addition inside a dot: tensor cores may cut where they should round, which
doubles it."""

TINY = 2.0**-148
"""Absolute error of an fp32 operation on subnormal numbers, twice the smallest."""


def store_unit(dtype: torch.dtype, truncates: bool) -> float:
    """Relative error of a store: u, or 2u where conversion to bf16 cuts instead of rounding, as Triton's
    interpreter does."""
    return UNIT[dtype] * (2 if truncates and dtype == torch.bfloat16 else 1)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str = "result") -> None:
    """‖actual − expected‖ ≤ ‖bound‖ and, since the bounds here are elementwise, |actual − expected| ≤ bound.
    A NaN fails."""
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

    Products of 16-bit operands are exact in fp32, products of fp32 ones are off by u; m of them take m − 1
    additions: |error| ≤ (m + 1)·u·|P|ᵀ|G'|. Operands rounded to a narrower format first (tf32) add
    `operand_unit` each.
    """
    terms = basis.shape[-2] + 1
    return (terms * ACCUMULATION_UNIT + 2 * operand_unit) * (basis.double().abs().mT @ grad.double().abs()) + terms * TINY


def moments_error(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    projected: Tensor,
    beta1: float,
    beta2: float,
    projected_error: Tensor | float = 0.0,
    state_errors: tuple[Tensor | float, Tensor | float] = (0.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """E of M and V after the update, for states M, V before it known to `state_errors`, and R known to
    `projected_error`.

    M: β1 and 1 − β1 rounded to fp32 (u), two products (u), one sum (u): 3u·(β1|M| + (1 − β1)|R|). V: R² (u)
    besides: 4u·V, all its terms being positive. An error of R enters M times 1 − β1 and V times (1 −
    β2)·(2|R| + error), one of a state times its β.
    """
    unit, r = UNIT[torch.float32], projected.double().abs()
    of_m = 3 * unit * (beta1 * exp_avg.double().abs() + (1 - beta1) * r) + (1 - beta1) * projected_error + 3 * TINY
    of_v = 4 * unit * (beta2 * exp_avg_sq.double() + (1 - beta2) * r**2) + (1 - beta2) * (2 * r + projected_error) * projected_error
    return of_m + beta1 * state_errors[0], of_v + beta2 * state_errors[1] + 4 * TINY


BIAS_CORRECTION_ERROR = 8 * UNIT[torch.float32]
"""Relative error of 1 − βᵗ = −expm1(x), x = t·ln β, on the device: ln β and the product are rounded (2u,
times |x·eˣ/(eˣ − 1)| ≤ 1).

For −1 < x: each step of Horner's rule, s ← c + x·s, leaves |x| of the error so far, and rounds a product and
a sum. The last sum lies in [0.63, 1], so together 2.4u, relative to it 4u, and the product with x rounds once
more. For x ≤ −1: exp(x) ≤ 0.37 is off by 4u (2⁻²², the device's exp2) and 2u·|x| (the product with log2 e),
together at most 2.3u, relative to 1 − exp(x) ≥ 0.63 with its own rounding 5u.
"""


def decoded_error(exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
    """E of M and V decoded in fp32 from 8-bit codes, for their exact values.

    M: c − 128 is exact, 1/127 rounded (u), two products (u each, one of them squaring what came before: 2·2u
    + u), s: 6u. V: 1/255 and product (2u), squared twice (2·(2·2u + u) + u = 11u), s: 12u.
    """
    unit = UNIT[torch.float32]
    return 6 * unit * exp_avg.double().abs() + TINY, 12 * unit * exp_avg_sq.double() + TINY


def exact_codes(exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """128 + 127·sign(m)·√(|m|/s) and 255·(v/s)^¼ in fp64, of which the codes are neighbours; and the scales s
    of each block of 64."""
    m, v = exp_avg.double(), exp_avg_sq.double()
    (m_peak, v_peak), (m_spread, v_spread) = zip(_block_peaks(m), _block_peaks(v), strict=True)
    m_share, v_share = (x.abs() / spread.clamp_min(1e-300) for x, spread in ((m, m_spread), (v, v_spread)))  # 0 in a block of zeros
    return 128 + 127 * m.sign() * m_share.sqrt(), 255 * v_share.sqrt().sqrt(), m_peak, v_peak


def codes_error(exp_avg: Tensor, exp_avg_sq: Tensor, errors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E of exact_codes, for moments known to `errors`: a code may be ½ further away from the real number, a
    scale not at all.

    A block's largest value is off by no more than its largest error. With δ = (E + |m|/s·E(s)) / (s − E(s)),
    the error of a share |m|/s, a root of it is off by δ/√(|m|/s) while the sign is certain (|m| > E) and
    √(2δ) else, a fourth root by min(δ/(v/s)^¾, δ^¼). In fp32: 1/s (4u, the device's division), two products
    (2u, one being exact), roots (2u each, the device's): at most 7u of the code, and one of 256·u in the sum
    that rounds it. A code of V compares 255⁴·v/s, off by 8u (1/s, two products, 255⁴), with a threshold. Of
    that, b⁴ is off by 1u, and the random part of (b + 1)⁴ − b⁴, its product and the sum by 6u. Together this
    is 15u·(b + 1)⁴, or 4u·(b + 1)·(1 + 1/b)³ in the fourth root, which is less than the two.
    """
    found = []
    for values, error, levels in zip((exp_avg, exp_avg_sq), errors, (127, 255), strict=True):
        values, error = values.double().abs(), error.double()
        (_, peak), (of_peak, of_spread) = _block_peaks(values), _block_peaks(error)
        share = values / peak.clamp_min(1e-300)
        delta = (error + share * of_spread) / (peak - of_spread).clamp_min(1e-300)
        if levels == 127:
            size = share.sqrt()
            of_root = torch.where(values > error, delta / size, (2 * delta).sqrt())
        else:
            size = share**0.25
            of_root = torch.where(size > 0, torch.minimum(delta / size**3, delta**0.25), delta**0.25)
        found.append((levels * (of_root + 7 * UNIT[torch.float32] * size) + 256 * UNIT[torch.float32], of_peak))
    (of_m, of_m_scale), (of_v, of_v_scale) = found
    return of_m, of_v, of_m_scale, of_v_scale


def _block_peaks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest |value| of each block of 64 neighbours, and the same for each of its elements."""
    n = values.shape[-1]
    peaks = torch.nn.functional.pad(values.abs(), (0, -n % 64)).unflatten(-1, (-1, 64)).amax(-1)
    return peaks, peaks.repeat_interleave(64, -1)[..., :n]


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
    correction: float = UNIT[torch.float32],
) -> Tensor:
    """E of N, for the exact M and V after the update and the errors of the computed ones.

    M̂ = M / (1 − β1ᵗ): correction rounded (u), division (u). √V̂: the same two, halved by the root, and the
    root (u). Sum with ε: ε rounded (u), sum (u). Quotient (u), and `store` for a narrower output. Together 2
    + 2 + 2 + 1 = 7u·|N|. Corrections that are off by more than u, `correction`, add themselves, halved by the
    root in one of the two. Errors of M and V enter as E(M)/(D·c1) and |M̂|·E(√V̂)/D², where D = √V̂ + ε,
    E(√V̂) = min(E(V̂)/√V̂, √E(V̂)).
    """
    c1, c2 = 1 - beta1**step, 1 - beta2**step
    of_m, of_v = errors
    m_hat, root = exp_avg.double() / c1, (exp_avg_sq.double() / c2).sqrt()
    of_root = torch.minimum(of_v / c2 / root.clamp_min(1e-300), (of_v / c2).sqrt())
    denominator = root + eps
    smallest = torch.maximum(denominator - of_root, torch.full_like(root, eps))
    size = m_hat.abs() / denominator
    own = (7 * UNIT[torch.float32] + 1.5 * (correction - UNIT[torch.float32]) + store) * size
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
    device_lr: bool = False,
) -> Tensor:
    """E of W' after the update; weight is W' (m, n) before it, basis (m, r), normalised (r, n).

    The dot: r products and sums, (r + 1)·u·|P||N|. N rounded to the dtype of P (`operand_unit`) and both
    rounded to tf32 (`basis_unit` for P) add themselves. Coefficients rounded (u), two products (u), one
    difference (u): 3u of either term. Made from a learning rate on the device in fp32, 1 − lr·wd is off by
    2u·lr·wd more (wd, product), lr·α by u (α, product). The store adds its own of the result.
    """
    unit, terms = UNIT[torch.float32], basis.shape[-1] + 1
    p, n = basis.double(), normalised.double()
    of_n = normalised_error if isinstance(normalised_error, Tensor) else torch.full_like(n, normalised_error)
    size = p.abs() @ n.abs()
    of_dot = (terms * ACCUMULATION_UNIT + operand_unit + basis_unit) * size + p.abs() @ of_n * (1 + operand_unit) + terms * TINY
    kept = abs(1 - lr * weight_decay) * weight.double().abs()
    moved = abs(lr * scale)
    in_fp32 = 3 * unit * (kept + moved * size) + moved * of_dot
    if device_lr:
        in_fp32 += unit * (2 * abs(lr * weight_decay) * weight.double().abs() + moved * size)
    result = ((1 - lr * weight_decay) * weight.double() - lr * scale * (p @ n)).abs()
    smallest = {torch.float16: 2.0**-24}.get(weight.dtype, TINY)
    return in_fp32 + store * (result + in_fp32) + smallest


def rounded_between(exact: Tensor, error: Tensor, seed: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest bf16 that stochastic rounding, with the bits of (seed, step), makes of an
    fp32 within `error` of exact.

    exact, error: fp64, (rows, columns) as stored; error without a store. With its bits given, rounding is
    monotone in the value: so these are the results for the ends of the interval, each moved outwards to the
    next fp32.
    """
    least = torch.nextafter((exact - error).float(), exact.new_full((), -torch.inf).float())
    greatest = torch.nextafter((exact + error).float(), exact.new_full((), torch.inf).float())
    return round_stochastically(least, seed, step), round_stochastically(greatest, seed, step)
