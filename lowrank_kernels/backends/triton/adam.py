"""AdamW's arithmetic on tiles and its scalars, for every kernel that updates moments or weights.

    M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·R²;  N = (M / c1) / (sqrt(V / c2) + ε);  c = 1 − βᵗ

t is the matrix's count of updates plus one. The count is an fp32 number on the device. The learning rate
comes from the host, or from the device where the host must not know it (CUDA graphs, capturable optimizers).
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..bucket import Hyper
from . import pointers


def moment_scalars(hyper: Hyper) -> tuple[float, ...]:
    """β1, 1 − β1, β2, 1 − β2, ln β1, ln β2, ε, as the kernels take them. ln 0 is −∞.

    1 − β is computed in double: fp32(0.999) subtracted from 1 in fp32 has a relative error of 2e-5.
    """
    (beta1, beta2), eps = hyper.options["betas"], hyper.options["eps"]
    first, second = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    return float(beta1), 1.0 - beta1, float(beta2), 1.0 - beta2, first, second, float(eps)


def rates(hyper: Hyper) -> tuple[Tensor | None, float, float]:
    """(device_lr, first, second), which `coefficients` turns into 1 − lr·wd and lr·α."""
    if isinstance(hyper.lr, Tensor):
        return hyper.lr, float(hyper.weight_decay), float(hyper.scale)
    return None, 1.0 - hyper.lr * hyper.weight_decay, float(hyper.lr * hyper.scale)


@triton.jit
def bias_correction(t, log_beta):
    """1 − βᵗ = −expm1(t·ln β) in fp32, for t ≥ 1 and ln β < 0. ln β may be −∞ (β = 0).

    x = t·ln β is off by 2u, and −expm1 does not magnify that. 1 − exp(x) would cancel near 0, so there the
    result is x times a Taylor polynomial. The first term left out is 1/12! at x = −1.
    """
    x = t * log_beta
    near = tl.maximum(x, -1.0)
    series = 1.0 / 39916800
    series = series * near + 1.0 / 3628800
    series = series * near + 1.0 / 362880
    series = series * near + 1.0 / 40320
    series = series * near + 1.0 / 5040
    series = series * near + 1.0 / 720
    series = series * near + 1.0 / 120
    series = series * near + 1.0 / 24
    series = series * near + 1.0 / 6
    series = series * near + 0.5
    series = series * near + 1.0
    return tl.where(x > -1.0, -near * series, 1.0 - tl.exp(x))


@triton.jit
def step_number(steps_at, matrix):
    """t as int32. steps_at: a row of addresses of fp32 counters. Each counts the updates that a matrix has
    had before this one."""
    return tl.load(pointers.matrix_at(steps_at, matrix, tl.float32)).to(tl.int32) + 1


@triton.jit
def bias_corrections(steps_at, matrix, log_beta1, log_beta2):
    """(1 − β1ᵗ, 1 − β2ᵗ) in fp32."""
    t = tl.load(pointers.matrix_at(steps_at, matrix, tl.float32)) + 1.0
    return bias_correction(t, tl.cast(log_beta1, tl.float32)), bias_correction(t, tl.cast(log_beta2, tl.float32))


@triton.jit
def coefficients(device_lr, first, second):
    """(decay, step size) = (1 − lr·wd, lr·α) in fp32.

    If device_lr is None, `first` and `second` are these two already, computed by the host in double.
    Otherwise they are wd and α, and device_lr is lr, one fp32 on the device.
    """
    first = tl.cast(first, tl.float32)
    second = tl.cast(second, tl.float32)
    if device_lr is not None:
        lr = tl.load(device_lr)
        first = 1.0 - lr * first
        second = lr * second
    return first, second


@triton.jit
def update(m, v, r, beta1, one_minus_beta1, beta2, one_minus_beta2):
    """The new M and V, fp32."""
    m = tl.cast(beta1, tl.float32) * m + tl.cast(one_minus_beta1, tl.float32) * r
    v = tl.cast(beta2, tl.float32) * v + tl.cast(one_minus_beta2, tl.float32) * (r * r)
    return m, v


@triton.jit
def divide_by_scalar(x, divisor, reciprocal):
    """x / divisor for a tile x and one number, in three instructions where a correctly rounded division takes
    nine.

    reciprocal: 1 / divisor, correctly rounded. One Newton step on the quotient, whose remainder a fused
    multiplication and addition gives exactly, rounds it correctly (Markstein 1990). Where quotient or
    remainder are under 2⁻¹²⁶ it may be off by an ulp. An infinity has no remainder, and becomes NaN.
    """
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)


@triton.jit
def normalise(m, v, correction1, correction2, eps):
    """N, fp32, from the new moments and bias_corrections.

    Division and root are correctly rounded: the fast versions flush subnormals.
    """
    m_hat = divide_by_scalar(m, correction1, tl.div_rn(1.0, correction1))
    v_hat = divide_by_scalar(v, correction2, tl.div_rn(1.0, correction2))
    v_hat = tl.where(v < float("inf"), v_hat, v)  # V overflows where |R| > 1.8e19; N is zero then
    return tl.div_rn(m_hat, tl.sqrt_rn(v_hat) + tl.cast(eps, tl.float32))
