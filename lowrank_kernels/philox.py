"""Philox4x32-10 in plain PyTorch: random numbers as a pure function of (seed, stream, element), the same on
every device.

    word[i] = philox(key = seed, counter = (i // 4, stream, 0))[i % 4]

The integer words agree bit for bit between devices. Gaussians and Gumbels computed from them agree up to
rounding. Nothing depends on the thread count, on earlier draws, or on a matrix's position in a batch.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF

# Streams keep the draws of one seed apart. The numbers are part of the format: changing one changes every
# run.
SKETCH, TAIL, GUMBEL, COMPLETION, BASIS, ROUNDING, PROJECTION = range(7)


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. The four counter words and two key words are int64 tensors that hold uint32
    values. They are broadcast together. Returns four words of the same kind."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, but both 32-bit halves of the unsigned 64-bit product are still right.
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0 = (k0 + 0x9E3779B9) & MASK32
        k1 = (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def derive_seed(seed: int, *path: int) -> int:
    """A 64-bit seed for one place (parameter, refresh, expert, ...) under `seed`. It applies splitmix64's
    finaliser to each part of the path in turn."""
    state = seed & MASK64
    for part in path:
        state = (state + 0x9E3779B97F4A7C15 * ((part & MASK64) + 1)) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state


def signed64(seed: int) -> int:
    """The low 64 bits of any int as a two's complement int64. Operator schemas take seeds in this form."""
    return ((seed & MASK64) ^ (1 << 63)) - (1 << 63)


def seed_tensor(seeds: Sequence[int], device: torch.device | str) -> Tensor:
    """The 64 bits of each seed, (batch,) int64. The copy to a GPU is asynchronous, from pinned memory."""
    host = torch.tensor([signed64(seed) for seed in seeds], dtype=torch.int64, device="cpu")
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def words(seeds: Tensor, count: int, stream: int, first: int = 0) -> Tensor:
    """(batch,) seeds → (batch, count) int64 tensor of uniform uint32 values. first: number of the first word,
    a multiple of 4."""
    blocks = -(-count // 4)
    index = first // 4 + torch.arange(blocks, device=seeds.device)
    zero = torch.zeros_like(index)
    counter = (index & MASK32, index >> 32, zero + stream, zero)
    key = ((seeds & MASK32)[:, None], ((seeds >> 32) & MASK32)[:, None])
    return torch.stack(philox4x32(counter, key), dim=-1).flatten(-2)[:, :count]


def rounding_bits(seed: Tensor, rows: int, columns: int, step: int | Tensor) -> Tensor:
    """(1,) seed → (rows, columns) int64 tensor of uniform uint16 values: 16 bits for each element of a matrix
    at one step.

    Element (i, j) takes a half of word j % 8 // 2 of the block with counter (j // 8, i, ROUNDING, step). It
    takes the lower half where j is even, else the upper half.
    """
    device = seed.device
    block = torch.arange(-(-columns // 8), device=device)
    row = torch.arange(rows, device=device)[:, None]
    step = torch.as_tensor(step, device=device).to(torch.int64) & MASK32
    counter = (block, row, torch.full_like(step, ROUNDING), step)
    words = philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return halves.flatten(-2)[:, :columns]


def normal(seeds: Tensor, shape: tuple[int, ...], stream: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """(batch,) seeds → (batch, *shape) of N(0, 1). They are computed by Box–Muller in fp32 (23-bit uniforms:
    |z| < 5.8) and then cast to `dtype`.

    first: number of the first element, a multiple of 4. It lets a large matrix be drawn in pieces.
    """
    count = math.prod(shape)
    bits = words(seeds, count + count % 2, stream, first)
    unit = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23  # in (0, 1), exactly
    radius = unit[:, 0::2].log().mul_(-2.0).sqrt_()
    angle = unit[:, 1::2] * (2.0 * math.pi)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pairs.flatten(-2)[:, :count].reshape(-1, *shape).to(dtype)


def gumbel(seeds: Tensor, count: int, stream: int) -> Tensor:
    """(batch,) seeds → (batch, count) standard Gumbel in fp32: −log(E), where E = −log(1 − u) is exponential.
    The relative error of E stays small for small E."""
    unit = (words(seeds, count, stream).to(torch.float32) + 0.5) * 2.0**-32
    exponential = -torch.log1p(-unit.clamp_(max=1.0 - 2.0**-24))
    return -exponential.log()
