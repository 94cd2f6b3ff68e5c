"""M = β1·M + (1−β1)·R;  V = β2·V + (1−β2)·R²;  N = (M / (1−β1ᵗ)) / (sqrt(V / (1−β2ᵗ)) + ε).

Elementwise on (r, n) in fp32; ε stands outside the corrected root, as in torch.optim.AdamW.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, table
from .dots import FLOATS


@triton.jit(do_not_specialize_on_alignment=["exp_avgs_at", "exp_avg_sqs_at"])
def _update_moments_kernel(
    exp_avgs_at, exp_avg_sqs_at, projected, normalised, found_inf,
    numel, beta1, one_minus_beta1, beta2, one_minus_beta2, bias_correction1, bias_correction2, eps,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    matrix = tl.program_id(1).to(tl.int64)
    exp_avg = tl.load(exp_avgs_at + matrix).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(exp_avg_sqs_at + matrix).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        exp_avg = tl.multiple_of(exp_avg, 16)
        exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < numel

    r = tl.load(projected + matrix * numel + offs, mask=inside, other=0.0)
    m = tl.load(exp_avg + offs, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + offs, mask=inside, other=0.0)
    m = tl.cast(beta1, tl.float32) * m + tl.cast(one_minus_beta1, tl.float32) * r
    v = tl.cast(beta2, tl.float32) * v + tl.cast(one_minus_beta2, tl.float32) * (r * r)
    tl.store(exp_avg + offs, m, mask=inside)
    tl.store(exp_avg_sq + offs, v, mask=inside)
    # Correctly rounded division and root: the fast ones flush subnormals, and the kernel waits for memory anyway.
    root = tl.sqrt_rn(tl.div_rn(v, tl.cast(bias_correction2, tl.float32)))
    norm = tl.div_rn(tl.div_rn(m, tl.cast(bias_correction1, tl.float32)), root + tl.cast(eps, tl.float32))
    tl.store(normalised + matrix * numel + offs, norm.to(normalised.dtype.element_ty), mask=inside)


def update_moments_(
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    projected: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    found_inf: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Updates M and V in place and returns N, for every matrix of a bucket, in one launch.

    exp_avgs, exp_avg_sqs: B row-major (r, n) fp32. projected: (B, r, n) fp32, R on entry. N goes to `out`, (B, r, n) of fp32, bf16
    or fp16; by default to `projected`, overwriting R. `step` is t, counted from 1. Where found_inf is non-zero nothing is written,
    so M and V keep their bits and N is undefined. Raises ValueError for a list that is not a bucket and for shapes that do not fit.
    """
    check(exp_avgs, exp_avg_sqs, projected, step, found_inf, out)
    rows = table.pointer_table(exp_avgs, exp_avg_sqs)
    return launch(*rows, exp_avgs, exp_avg_sqs, projected, beta1=beta1, beta2=beta2, eps=eps, step=step, found_inf=found_inf, out=out)


def check(
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], projected: Tensor, step: int, found_inf: Tensor | None, out: Tensor | None
) -> None:
    check_states(exp_avgs, exp_avg_sqs, step, found_inf)
    table.check_batch("projected", projected, exp_avgs, (torch.float32,))
    if out is not None:
        table.check_batch("out", out, exp_avgs, FLOATS)


def check_states(exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: int, found_inf: Tensor | None) -> None:
    table.check_bucket("exp_avgs", exp_avgs, (torch.float32,), row_major=True)
    table.check_bucket("exp_avg_sqs", exp_avg_sqs, (torch.float32,), row_major=True)
    table.check_same_length(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    table.check_same_device(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    table.check_found_inf(found_inf, exp_avgs[0].device)
    if exp_avgs[0].shape != exp_avg_sqs[0].shape:
        raise ValueError(f"exp_avgs and exp_avg_sqs must share a shape, got {tuple(exp_avgs[0].shape)} and {tuple(exp_avg_sqs[0].shape)}")
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")


def launch(
    exp_avgs_at: Tensor,
    exp_avg_sqs_at: Tensor,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    projected: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    found_inf: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """update_moments_, given the pointer table and checked buckets."""
    out = projected if out is None else out
    numel, device = exp_avgs[0].numel(), exp_avgs[0].device
    tiles = triton.cdiv(numel, configs.MOMENTS.BLOCK)
    if tiles:
        # 1 − β is taken in double: fp32(0.999) subtracted from 1 in fp32 is off by 2e-5 of itself.
        with table.on_device(device):
            _update_moments_kernel[(tiles, len(exp_avgs))](
                exp_avgs_at, exp_avg_sqs_at, projected, out, found_inf,
                numel, float(beta1), 1.0 - beta1, float(beta2), 1.0 - beta2, 1.0 - beta1**step, 1.0 - beta2**step, float(eps),
                table.aligned(exp_avgs, exp_avg_sqs),
                **vars(configs.MOMENTS),
            )  # fmt: skip
    return out
