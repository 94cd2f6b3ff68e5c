"""The step on a CPU, in plain PyTorch, over a bucket of equal shapes.

The formulas are those of rules/adamw.py and lifts/back_projection.py. Four things make this faster than those
files. Large fp32 products go to oneDNN and small ones to the BLAS. bf16 is multiplied as bf16 where the CPU
has instructions for it (accumulated in fp32 and rounded once); otherwise bf16, and fp16 always, is multiplied
in fp32. Moments go through torch's fused AdamW kernel in one pass over memory. Decay and update of a 16-bit
weight are part of its native product. benchmarks/NOTES.md has the figures, and the alternatives that lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..rounding import round_stochastically
from ..storage import eight_bit
from .bucket import Bucket, Hyper

ONEDNN_FROM_FLOPS = 2**23
"""fp32 products of at least this many flops go to oneDNN. Below it the higher cost of a oneDNN call makes the
BLAS that torch.mm calls faster."""

CHUNK_ELEMENTS = 2**18
"""Projected gradients are processed in chunks of this many elements (1 MiB in fp32), so that they are still
in cache when they are read again."""


def _has_native_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products. Without them a bf16 product is some 30 times slower
    than an fp32 one."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


NATIVE_BF16 = _has_native_bf16()
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for two matrices of the same dtype."""
    flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
    if ONEDNN_LINEAR is not None and left.dtype == torch.float32 and flops >= ONEDNN_FROM_FLOPS:
        return ONEDNN_LINEAR(left, right.mT, None, "none", [], "")
    return _left(left) @ _right(right)


def _left(matrix: Tensor) -> Tensor:
    """The left operand of a product; in bf16 without a gap between its rows. oneDNN's AMX kernels read past
    the end of a row and multiply what they find by zero, so a NaN in the gap becomes one of the product
    (torch 2.13)."""
    gap = matrix.stride(1) == 1 and matrix.stride(0) > matrix.shape[1]
    return matrix.contiguous() if matrix.dtype == torch.bfloat16 and gap else matrix


def _right(matrix: Tensor) -> Tensor:
    """The right operand, likewise without a gap between its columns."""
    return _left(matrix.mT).mT


def _product_dtype(*matrices: Tensor) -> torch.dtype:
    dtypes = {matrix.dtype for matrix in matrices}
    if torch.float64 in dtypes:
        return torch.float64
    return torch.bfloat16 if NATIVE_BF16 and dtypes == {torch.bfloat16} else torch.float32


class _Workspace:
    """Temporaries of a chunk, each (count, r, n). The next chunk reuses them, because fresh memory costs a
    page fault every 4 KiB.

    products: R in the dtype that products run in. projected: R in fp32 (fp64 for fp64); the same tensor as
    `products` where the dtypes are equal. negated: −N.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.products = torch.empty(shape, dtype=dtype, device="cpu")
        state_dtype = torch.promote_types(dtype, torch.float32)
        self.projected = self.products if dtype == state_dtype else torch.empty(shape, dtype=state_dtype, device="cpu")
        self.negated = torch.empty(shape, dtype=state_dtype, device="cpu")


def project(bases: list[Tensor], grads: list[Tensor], right: bool) -> Tensor:
    """R = PᵀG' for each matrix: (m, r) bases, gradients as stored → (batch, r, n) fp32 (fp64 for fp64)."""
    shape = (len(grads), bases[0].shape[1], grads[0].shape[0 if right else 1])
    return _project(bases, grads, right, _Workspace(shape, _product_dtype(bases[0], grads[0])))


def _project(bases: list[Tensor], grads: list[Tensor], right: bool, workspace: _Workspace) -> Tensor:
    products, projected = workspace.products[: len(grads)], workspace.projected[: len(grads)]
    dtype = products.dtype
    for out, basis, grad in zip(products.unbind(), bases, grads, strict=True):
        left, right_factor = basis.mT.to(dtype), (grad.mT if right else grad).to(dtype)
        if dtype == torch.bfloat16:
            torch.mm(_left(left), _right(right_factor), out=out)
        else:
            out.copy_(_product(left, right_factor))
    return projected if projected.dtype == dtype else projected.copy_(products)


def update_moments_(
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    projected: list[Tensor],
    *,
    beta1: float,
    beta2: float,
    eps: float,
    device_steps: Sequence[Tensor],
    found_inf: Tensor | None = None,
) -> Tensor:
    """Updates the moments in place and returns N (batch, r, n). Where found_inf ≠ 0 the moments stay and N is
    meaningless."""
    shape = projected[0].shape
    _check_moments(exp_avgs, exp_avg_sqs, (), shape=tuple(shape))
    projected = _in_rows(projected, exp_avgs[0].dtype)
    negated = torch.empty((len(projected), *shape), dtype=exp_avgs[0].dtype, device="cpu")
    if found_inf is not None and found_inf.item():
        return negated
    steps = [count.item() + 1 for count in device_steps]
    return _update_moments_(exp_avgs, exp_avg_sqs, projected, negated, beta1=beta1, beta2=beta2, eps=eps, steps=steps).neg_()


def _update_moments_(
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    projected: list[Tensor],
    negated: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    steps: Sequence[float],
) -> Tensor:
    """Updates the moments in place and writes −N into `negated`. AdamW with lr = 1 moves weights of zero to
    exactly −N."""
    negated.zero_()
    adamw(
        list(negated.unbind()),
        projected,
        exp_avgs,
        exp_avg_sqs,
        [],
        list((torch.tensor(steps, dtype=torch.float32, device="cpu") - 1).unbind()),
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=1.0,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
    return negated


def back_project_(
    weights: list[Tensor],
    bases: list[Tensor],
    normalised: Tensor,
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    right: bool,
    found_inf: Tensor | None = None,
    rounding_seeds: Tensor | None = None,
    device_steps: Sequence[Tensor] | None = None,
) -> None:
    """W' = (1 − lr·wd)·W' − lr·α·P·N in place. 16-bit weights are rounded once, from fp32: stochastically
    with `rounding_seeds`, else to nearest."""
    if found_inf is not None and found_inf.item():
        return
    m, n = weights[0].shape[::-1] if right else weights[0].shape
    if bases[0].shape[0] != m or normalised.shape != (len(weights), bases[0].shape[1], n) or len(bases) != len(weights):
        raise ValueError(  # PyTorch would broadcast a product of one row or column
            f"{len(weights)} weights {tuple(weights[0].shape)}, {len(bases)} bases {tuple(bases[0].shape)} and normalised "
            f"{tuple(normalised.shape)} do not fit with right={right}"
        )
    if rounding_seeds is not None:
        steps = [count.item() + 1 for count in device_steps or ()] or [1] * len(weights)
        options = dict(lr=lr, scale=scale, weight_decay=weight_decay, right=right)
        return _back_project_stochastically_(weights, bases, normalised, rounding_seeds.split(1), steps, **options)
    decay, rate = 1 - lr * weight_decay, -lr * scale
    dtype = torch.promote_types(_product_dtype(weights[0], bases[0]), weights[0].dtype)
    for weight, basis, update in zip(weights, bases, normalised.to(dtype).unbind(), strict=True):
        # The product is taken in the weight's own orientation, so that both have the same strides.
        left, right_factor = (update.mT, basis.to(dtype).mT) if right else (basis.to(dtype), update)
        if weight.dtype != dtype:
            weight.copy_(weight.to(dtype).mul_(decay).add_(_product(left, right_factor), alpha=rate))
        elif dtype == torch.float32:
            if decay != 1:
                weight.mul_(decay)
            weight.add_(_product(left, right_factor), alpha=rate)
        else:
            weight.addmm_(_left(left), _right(right_factor), beta=decay, alpha=rate)


def step(bucket: Bucket, hyper: Hyper) -> None:
    """One AdamW step in the subspace, back-projected, for each matrix of a bucket. States are fp32 (fp64 for
    fp64) or in 8 bits."""
    weights, bases, right, (_, n, rank) = bucket.weights, bucket.bases, bucket.right, bucket.extents
    exp_avgs, exp_avg_sqs = (bucket.states[name] for name in eight_bit.MOMENTS)
    scales = [bucket.states[name] for name in eight_bit.SCALES if name in bucket.states]
    _check_moments(exp_avgs, exp_avg_sqs, scales, shape=(rank, n))
    if bucket.found_inf is not None and bucket.found_inf.item():  # reads on a CPU wait for nothing, here and in the next lines
        return
    (beta1, beta2), eps = hyper.options["betas"], hyper.options["eps"]
    back = dict(lr=float(hyper.lr), scale=-hyper.scale, weight_decay=hyper.weight_decay, right=right)
    steps = [count.item() + 1 for count in bucket.steps]
    chunk = min(len(weights), max(1, CHUNK_ELEMENTS // exp_avgs[0].numel()))
    workspace = _Workspace((chunk, rank, n), _product_dtype(bases[0], weights[0] if bucket.grads is None else bucket.grads[0]))
    for start in range(0, len(weights), chunk):
        part = slice(start, start + chunk)
        negated = workspace.negated[: len(bases[part])]
        if bucket.grads is not None:
            projected = list(_project(bases[part], bucket.grads[part], right, workspace).unbind())
        else:
            projected = _in_rows(bucket.projected[part], negated.dtype)
        codes = list(zip(exp_avgs[part], exp_avg_sqs[part], *(each[part] for each in scales), strict=True)) if scales else []
        decoded = [eight_bit.decode(*state, negated.dtype) for state in codes]
        moments = [list(values) for values in zip(*decoded, strict=True)] or [exp_avgs[part], exp_avg_sqs[part]]
        _update_moments_(*moments, projected, negated, beta1=beta1, beta2=beta2, eps=eps, steps=steps[part])
        for values, state, t in zip(decoded, codes, steps[part] if scales else [], strict=True):
            eight_bit.encode_(*values, *state, t)
        if bucket.rounding_seeds is not None:
            seeds = bucket.rounding_seeds[part].split(1)
            _back_project_stochastically_(weights[part], bases[part], negated, seeds, steps[part], **back)
            continue
        if workspace.products.dtype == weights[0].dtype != negated.dtype:
            negated = workspace.products[: len(projected)].copy_(negated)  # in the dtype of the product in back_project_
        back_project_(weights[part], bases[part], negated, **back)


def project_bucket(bucket: Bucket) -> list[Tensor]:
    return list(project(bucket.bases, bucket.grads, bucket.right).unbind())


def update(bucket: Bucket, hyper: Hyper, projected: list[Tensor]) -> Tensor:
    (beta1, beta2), moments = hyper.options["betas"], (bucket.states["exp_avg"], bucket.states["exp_avg_sq"])
    options = dict(beta1=beta1, beta2=beta2, eps=hyper.options["eps"], found_inf=bucket.found_inf, device_steps=bucket.steps)
    return update_moments_(*moments, projected, **options)


def lift(bucket: Bucket, hyper: Hyper, normalised: Tensor) -> None:
    options = dict(lr=float(hyper.lr), scale=hyper.scale, weight_decay=hyper.weight_decay, right=bucket.right)
    on_device = dict(found_inf=bucket.found_inf, rounding_seeds=bucket.rounding_seeds, device_steps=bucket.steps)
    back_project_(bucket.weights, bucket.bases, normalised, **options, **on_device)


def _in_rows(projected: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """R as torch's fused AdamW takes it: of the moments' dtype and row-major."""
    return [r.to(dtype).contiguous() for r in projected]


def _check_moments(exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], scales: Sequence[list[Tensor]], shape: tuple[int, int]) -> None:
    """Raises ValueError for moments of a wrong shape, dtype or layout.

    torch's fused AdamW checks neither sizes nor strides. It would write past the end of moments of another
    size, and pair the wrong elements of moments that are not row-major.
    """
    for name, tensors in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        if [tensor.shape for tensor in tensors].count(shape) != len(tensors):
            found = next(tuple(tensor.shape) for tensor in tensors if tensor.shape != shape)
            raise ValueError(
                f"{name} must be (r, n) = {shape}, got {found}; the state is of a parameter of another shape, or of another rank"
            )
        if not scales and not all(tensor.is_contiguous() for tensor in tensors):
            strides = next(tensor.stride() for tensor in tensors if not tensor.is_contiguous())
            raise ValueError(f"{name} must be row-major, got strides {strides} of shape {shape}")
        if scales and any(tensor.dtype != torch.uint8 for tensor in tensors):
            raise ValueError(f"{name} must be codes (torch.uint8) where there are scales, got {tensors[0].dtype}")


def _back_project_stochastically_(
    weights: list[Tensor],
    bases: list[Tensor],
    normalised: Tensor,
    seeds: Sequence[Tensor],
    steps: Sequence[float],
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    right: bool,
) -> None:
    """back_project_ for bf16 weights that are rounded stochastically. The product is computed in fp32,
    because a product rounded to nearest would not keep the mean."""
    for weight, basis, update, seed, step in zip(weights, bases, normalised, seeds, steps, strict=True):
        left, right_factor = (update.mT, basis.float().mT) if right else (basis.float(), update)
        exact = weight.float().mul_(1 - lr * weight_decay).add_(_product(left, right_factor), alpha=-lr * scale)
        weight.copy_(round_stochastically(exact, seed, int(step)))
