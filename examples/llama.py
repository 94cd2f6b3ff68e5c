"""A LLaMA-style decoder: RMSNorm, rotary positions, SwiGLU, no biases. Module names are those of Hugging
Face's LLaMA."""

from __future__ import annotations

from dataclasses import dataclass

import lean
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    heads: int


# From "9m" on, the widths and depths of the LLaMA configurations that GaLore's experiments use. Their names
# count a 32,000-word vocabulary; over bytes the same decoder has fewer parameters (see `parameter_count`).
SIZES = {
    "tiny": Size(128, 352, 2, 4),
    "small": Size(256, 704, 2, 4),
    "9m": Size(128, 352, 4, 4),
    "60m": Size(512, 1376, 8, 8),
    "130m": Size(768, 2048, 12, 12),
    "350m": Size(1024, 2736, 24, 16),
    "1b": Size(2048, 5461, 24, 32),
}


def parameter_count(size: Size, vocab_size: int, tie_head: bool) -> int:
    """Parameters of `Llama(size, vocab_size, tie_head)`."""
    layer = 4 * size.hidden**2 + 3 * size.hidden * size.intermediate + 2 * size.hidden
    return size.layers * layer + size.hidden + vocab_size * size.hidden * (1 if tie_head else 2)


class RMSNorm(nn.Module):
    """y = w · x / sqrt(mean(x²) + ε) over the last dimension, computed in fp32. lean: see lean.py."""

    def __init__(self, width: int, eps: float = 1e-6, lean: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.lean = eps, lean

    def forward(self, x: Tensor) -> Tensor:
        if self.lean:
            return lean.RMSNorm.apply(x, self.weight, self.eps)
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(−2i / head_dim), each (positions, head_dim / 2), fp32."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + head_dim/2}) of (…, positions, head_dim) by its angle.

    ⟨rotate(q at s), rotate(k at t)⟩ then depends only on s − t.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, size: Size, lean: bool = False):
        super().__init__()
        self.heads, self.lean = size.heads, lean
        self.q_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.k_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.v_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.o_proj = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.lean:
            y = lean.Attention.apply(q, k, v, cos, sin, rotate)
        else:
            y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, size: Size, lean: bool = False):
        super().__init__()
        self.lean = lean
        self.gate_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.down_proj = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(lean.SwiGLU.apply(gate, up) if self.lean else F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, size: Size, lean: bool = False):
        super().__init__()
        self.input_layernorm = RMSNorm(size.hidden, lean=lean)
        self.self_attn = Attention(size, lean)
        self.post_attention_layernorm = RMSNorm(size.hidden, lean=lean)
        self.mlp = MLP(size, lean)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """tokens (batch, positions) int64 → logits (batch, positions, vocab_size) in the weights' dtype. lean:
    blocks that keep less for the backward pass, see lean.py."""

    def __init__(self, size: Size, vocab_size: int, tie_head: bool = False, lean: bool = False):
        super().__init__()
        self.head_dim = size.hidden // size.heads
        self.embed_tokens = nn.Embedding(vocab_size, size.hidden)
        self.layers = nn.ModuleList(Layer(size, lean) for _ in range(size.layers))
        self.norm = RMSNorm(size.hidden)
        self.lm_head = nn.Linear(size.hidden, vocab_size, bias=False)
        if tie_head:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = rotary_angles(torch.arange(tokens.shape[1], device=tokens.device), self.head_dim)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))

    def initialize(self, seed: int, std: float = 0.02) -> Llama:
        """Weights from N(0, std²), or with std / sqrt(2·layers) where a layer writes to the residual stream.
        They are a pure function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=std / (2 * len(self.layers)) ** 0.5 if writes_residual else std, generator=generator)
        return self


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each next byte, nats, fp32. tokens: (batch, positions + 1)."""
    return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())
