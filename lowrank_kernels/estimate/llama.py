"""A LLaMA on the meta device, whose parameters have Hugging Face's names. It computes nothing: its passes
make tensors of the sizes that a training run has, for estimate_memory to count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .models import Size


class _FusedAttention(torch.autograd.Function):
    """The memory of a fused attention kernel: it keeps q, k, v, its output and a number in fp32 for each of
    its rows."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        of_kv = size.kv_heads * size.head_dim
        self.q_proj = nn.Linear(size.hidden, size.heads * size.head_dim, size.biases)
        self.k_proj = nn.Linear(size.hidden, of_kv, size.biases)
        self.v_proj = nn.Linear(size.hidden, of_kv, size.biases)
        self.o_proj = nn.Linear(size.heads * size.head_dim, size.hidden, False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
        y = _FusedAttention.apply(_rotated(q, angles), _rotated(k, angles), v)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles + torch.cat((-second, first), dim=-1) * angles


class MLP(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, size.intermediate, False)
        self.up_proj = nn.Linear(size.hidden, size.intermediate, False)
        self.down_proj = nn.Linear(size.intermediate, size.hidden, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.self_attn = Attention(size)
        self.mlp = MLP(size)
        self.input_layernorm = nn.RMSNorm(size.hidden)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """tokens (batch, positions) int64 → logits (batch, positions, vocabulary). checkpointing: whether each
    layer keeps its input alone, and runs again in the backward pass."""

    def __init__(self, size: Size, checkpointing: bool = False) -> None:
        super().__init__()
        self.head_dim, self.checkpointing = size.head_dim, checkpointing
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.model.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.model.norm = nn.RMSNorm(size.hidden)
        self.lm_head = nn.Linear(size.hidden, size.vocabulary, False)
        if size.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        angles = x.new_empty(tokens.shape[1], self.head_dim)
        for layer in self.model.layers:
            x = checkpoint(layer, x, angles, use_reentrant=False) if self.checkpointing else layer(x, angles)
        return self.lm_head(self.model.norm(x))


def on_meta(size: Size, dtype: torch.dtype, checkpointing: bool = False) -> Llama:
    with torch.device("meta"):
        return Llama(size, checkpointing).to(dtype)


def loss(model: nn.Module, batch: int, sequence: int) -> Tensor:
    """The cross-entropy, in fp32, of so many sequences of so many tokens."""
    tokens = torch.zeros(batch, sequence, dtype=torch.int64, device="meta")
    return F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
