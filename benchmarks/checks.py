"""Every step is checked before it is timed, against the reference in fp64 on the same states."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

import lowrank_kernels as lrk
from lowrank_kernels.storage import eight_bit

from . import formulas
from .contenders import SCALE, low_rank_optimizer, make_params
from .iterations import Training, layers
from .shapes import is_right

UPDATE_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative error of the update ΔW. N is close to the sign of R. Where |R| is under its rounding error
δ (1e-7 of its size in fp32, 4e-3 in bf16), N is off by its own size. That is a share δ of all elements, so in
fp32 the error is sqrt(1e-7) = 3e-4 of the norm. In bf16 it is less than the rounding of the weights,
stochastic (2⁻⁸ of each) or not."""
MOMENT_ERROR = {32: {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-5}}
MOMENT_ERROR[8] = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-3}
"""Largest relative error of M and V, by bits and dtype. fp32: sums of m ≤ 2¹⁴ terms in fp32. In bf16 a CPU's
native product rounds R once, by 2⁻⁹, which is 2⁻⁸ in R². 8-bit moments are decoded and compared with the
reference's own codes of the exact moments. A code differs where a moment lies within the error above of the
edge between two codes, and neighbouring codes are 1.6 % apart. At an error of 1e-7 that happens to a share of
1e-5 of the codes (sqrt(1e-5) · 1.6 % = 5e-5). In bf16 it happens to many codes, and if all differ the error
is 1.6 %."""

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")


class WrongResult(Exception):
    """A result differs from the reference. Nothing of it is timed."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def exact_step(
    weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], *, step: int, lr: float, scale: float, decay: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """W after one step in fp64, and the moments as numbers. If the state holds codes, the moments are decoded
    from the reference's codes."""
    weight = weight.double().clone()
    moments = [state[key].clone() if SCALES[0] in state else state[key].double().clone() for key in MOMENTS]
    scales = [state[key].clone() for key in SCALES if key in state]
    formulas.adamw_step_(
        [weight], [grad.double()], [state["basis"].double()], [moments[0]], [moments[1]], lr=lr, beta1=0.9, beta2=0.999, eps=1e-8,
        weight_decay=decay, scale=scale, step=step, right=is_right(*weight.shape),
        **{f"{key}s": [value] for key, value in zip(SCALES, scales, strict=False)},
    )  # fmt: skip
    return weight, decoded(dict(zip((*MOMENTS, *SCALES), (*moments, *scales), strict=False)))


def decoded(state: Mapping[str, Tensor]) -> list[Tensor]:
    """M and V as numbers in fp64."""
    if SCALES[0] in state:
        return list(eight_bit.decode(*(state[key] for key in (*MOMENTS, *SCALES)), torch.float64))
    return [state[key].double() for key in MOMENTS]


def require(what: str, error: float, bound: float) -> float:
    if not error <= bound:
        raise WrongResult(f"{what} is off by {error:.2g} from fp64, {bound:.2g} is allowed; not timed")
    return error


@torch.no_grad()
def check_step(weights: list[tuple[int, int]], rank: int, dtype: torch.dtype, device: str, keys: dict[str, object]) -> float:
    """‖ΔW − exact ΔW‖ / ‖exact ΔW‖ of one step of this package, the worst over shapes. Raises WrongResult if
    it or the moments are off."""
    worst = 0.0
    bits = keys.get("state_bits", 32)
    for shape in sorted(set(weights)):
        params = make_params([shape] * 2, dtype, device)
        optimizer = low_rank_optimizer(params, rank, keys)
        before = [param.detach().double().clone() for param in params]
        states = [{key: value.clone() for key, value in optimizer.state[p].items() if isinstance(value, Tensor)} for p in params]
        optimizer.param_groups[0]["lr"] = 1.0  # so that the weight's rounding does not hide the update
        optimizer.step()
        for param, weight, state in zip(params, before, states, strict=True):
            exact, moments = exact_step(weight, param.grad, state, step=2, lr=1.0, scale=SCALE)
            error = relative_error(param.detach().double() - weight, exact - weight)
            worst = max(worst, require(f"the update of {shape}", error, UPDATE_ERROR[dtype]))
            for name, found, truth in zip("MV", decoded(optimizer.state[param]), moments, strict=True):
                require(f"{name} of {shape}", relative_error(found, truth), MOMENT_ERROR[bits][dtype])
    return worst


ITERATION_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative error of y, dx and dB. fp32: sums as in the kernel suite. 16 bits: Z, dB and what lies
between the layers of a block are each rounded once, by 2⁻⁹ at most. A dozen such errors add up as the root of
their squares, to a third of this."""


def check_iteration(training: Training, dtype: torch.dtype) -> float:
    """‖ΔW − exact ΔW‖ / ‖exact ΔW‖ of RSO's first iteration, the worst over layers. Raises WrongResult if
    anything is off.

    y and dx are checked against nn.Linear in fp64, and dB against its full weight gradient projected on P. M,
    V and W are checked against the formulas in fp64 on the dB that this package computed: N is the sign of dB
    at first, so the rounding of dB would count twice otherwise.
    """
    exact = lrk.to_dense(copy.deepcopy(training.module)).double()
    x = training.x.detach().double().requires_grad_()
    dense_y = exact(x)
    dense_y.backward(training.dy.double())
    dense_grads = {name: param.grad for name, param in exact.named_parameters()}

    y = training.module(training.x)
    y.backward(training.dy)
    bound = ITERATION_ERROR[dtype]
    require("y", relative_error(y.detach(), dense_y.detach()), bound)
    require("dx", relative_error(training.x.grad, x.grad), bound)
    found = layers(training.module)
    before, expected = {}, {}
    for name, layer in found.items():
        basis, dB = layer.subspace.matrix(training.x.device, dtype).double(), layer.coordinates.grad.double()
        weight_name = f"{name}.weight".lstrip(".")
        require(f"dB of {weight_name}", relative_error(dB, (dense_grads[weight_name] @ basis).mT), bound)
        moments = torch.zeros_like(dB), torch.zeros_like(dB)
        normalised = formulas.update_moments_(*moments, dB, beta1=0.9, beta2=0.999, eps=1e-8, step=1)
        before[name] = layer.weight.double()
        weight = formulas.updated_weight(before[name], basis, normalised, lr=1.0, scale=1.0, weight_decay=0.0, right=True)
        expected[name] = weight, moments
    [optimizer] = training.optimizers
    optimizer.param_groups[0]["lr"] = 1.0  # so that the weight's rounding does not hide the update
    training.step()
    training.free_gradients()
    worst = 0.0
    for name, layer in found.items():
        weight, moments = expected[name]
        error = relative_error(layer.weight.double() - before[name], weight - before[name])
        worst = max(worst, require(f"the update of {name or 'the layer'}", error, UPDATE_ERROR[dtype]))
        for key, truth in zip(MOMENTS, moments, strict=True):
            error = relative_error(optimizer.state[layer.coordinates][key], truth)
            require(f"{key} of {name or 'the layer'}", error, MOMENT_ERROR[32][torch.float32])
    return worst
