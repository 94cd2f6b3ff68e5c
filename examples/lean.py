"""The cheap parts of a decoder's block, with less kept for the backward pass: what is computed again there in
little time is not kept, and the rest is kept in bf16.

Per token and in elements, of width d and intermediate width f:

                     eager PyTorch                      here
    RMSNorm          2·d and more                       d, its input, in bf16
    rotary angles    q and k, in halves                 nothing: turning back needs the angles alone
    attention        q, k, v and its output, 4·d        q, k and v, 3·d, in bf16; computed again
    silu(g)·u        g, silu(g), u, 3·f                 g and u, 2·f, in bf16
    linear layers    their inputs, 3·d + f              the same; with RSO 4·r

A kept value is rounded once, by up to 2⁻⁹ of it, so a gradient is off by about that much at random. Models in
bf16 keep theirs unrounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KEPT = torch.bfloat16


class RMSNorm(torch.autograd.Function):
    """y = w·x / sqrt(mean(x²) + ε) over the last dimension, computed in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps, ctx.dtype = eps, x.dtype
        ctx.save_for_backward(x.to(KEPT), weight)
        x32 = x.float()
        return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x, dy = x.float(), dy.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        unit = x * scale
        dw = (dy * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dy = dy * weight.float()
        dx = scale * (dy - unit * (dy * unit).mean(-1, keepdim=True))
        return dx.to(ctx.dtype), dw, None


class SwiGLU(torch.autograd.Function):
    """silu(gate)·up, silu(g) = g·σ(g)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate.to(KEPT), up.to(KEPT))
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (each.to(dy.dtype) for each in ctx.saved_tensors)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        return dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu


class Attention(torch.autograd.Function):
    """Causal attention of q, k and v, (batch, heads, positions, head_dim), with q and k turned by their
    angles first; `rotate` is llama.rotate. All of it is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rotate) -> Tensor:
        ctx.rotate, ctx.dtype = rotate, q.dtype
        ctx.save_for_backward(q.to(KEPT), k.to(KEPT), v.to(KEPT), cos, sin)
        return F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        *kept, cos, sin = ctx.saved_tensors
        with torch.enable_grad():
            q, k, v = (each.to(ctx.dtype).requires_grad_() for each in kept)
            y = F.scaled_dot_product_attention(ctx.rotate(q, cos, sin), ctx.rotate(k, cos, sin), v, is_causal=True)
        return *torch.autograd.grad(y, (q, k, v), dy), None, None, None
