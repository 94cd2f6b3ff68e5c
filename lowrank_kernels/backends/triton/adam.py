"""AdamW's arithmetic on tiles and its scalars, for every kernel that updates moments or weights.

    M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·R²;  N = (M / c1) / (sqrt(V / c2) + ε);  c = 1 − βᵗ

t and the learning rate come from the host. They come from the device where the host must not know them (CUDA
graphs, capturable optimizers).
"""

import math

import triton
import triton.language as tl

from . import pointers


def log(beta: float) -> float:
    """ln β, and −∞ for β = 0. bias_corrections takes it when the updates are counted on the device."""
    return math.log(beta) if beta else -math.inf


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
def step_number(steps_at, matrix, step):
    """t as int32. It is the host's `step` if steps_at is None, otherwise the matrix's counter plus one.

    steps_at: a row of addresses of fp32 counters. Each counts the updates that a matrix has had before this
    one.
    """
    if steps_at is None:
        t = tl.cast(step, tl.int32)
    else:
        t = tl.load(pointers.matrix_at(steps_at, matrix, tl.float32)).to(tl.int32) + 1
    return t


@triton.jit
def bias_corrections(steps_at, matrix, first, second):
    """(1 − β1ᵗ, 1 − β2ᵗ) in fp32. If steps_at is None, `first` and `second` are these two already. Otherwise
    they are ln β1 and ln β2, and t comes from the counters."""
    first = tl.cast(first, tl.float32)
    second = tl.cast(second, tl.float32)
    if steps_at is not None:
        t = tl.load(pointers.matrix_at(steps_at, matrix, tl.float32)) + 1.0
        first = bias_correction(t, first)
        second = bias_correction(t, second)
    return first, second


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
    """The new M and V, fp32. The host passes 1 − β, because fp32(0.999) subtracted from 1 in fp32 has a
    relative error of 2e-5."""
    m = tl.cast(beta1, tl.float32) * m + tl.cast(one_minus_beta1, tl.float32) * r
    v = tl.cast(beta2, tl.float32) * v + tl.cast(one_minus_beta2, tl.float32) * (r * r)
    return m, v


@triton.jit
def normalise(m, v, correction1, correction2, eps):
    """N, fp32, from the new moments and bias_corrections.

    Division and root are correctly rounded: the fast versions flush subnormals, and the kernels wait for
    memory anyway.
    """
    root = tl.sqrt_rn(tl.div_rn(v, correction2))
    return tl.div_rn(tl.div_rn(m, correction1), root + tl.cast(eps, tl.float32))
