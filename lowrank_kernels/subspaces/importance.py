"""I3S (arXiv 2502.05790): r directions sampled from the singular vectors, without replacement, with probability ∝ σ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import philox
from ..range_finder import complement, frobenius_norm, multiply, sample_importance
from .spectrum import Spectrum


def importance(grad: Tensor, rank: int, spectrum: Spectrum, seeds: Sequence[int]) -> Tensor:
    """(batch, m, n) → (batch, m, r), columns sorted by σ.

    Where only the leading h < k = min(m, n) directions are known, the k − h others share the left-over energy
    E = ‖G‖²_F − Σσ²: each has the weight sqrt(E / (k − h)), and one that is drawn becomes a random direction of
    (I − UUᵀ)·G·ω, orthonormalised. Nothing depends on how many are drawn, so there is no host sync.
    """
    known = spectrum.affordable(grad, rank)
    directions, sigma = spectrum.leading(grad, known)
    unknown = min(grad.shape[-2:]) - known
    if unknown:
        sigma = torch.cat([sigma, _tail_weight(grad, sigma, unknown)[..., None].expand(-1, unknown)], dim=-1)
        directions = torch.cat([directions, _tail_directions(grad, directions, min(rank, unknown), spectrum.seed)], dim=-1)
    chosen = sample_importance(sigma, rank, seeds)
    # Tail directions are interchangeable: the first one drawn takes the first of them.
    tail = chosen >= known
    column = torch.where(tail, known + tail.cumsum(dim=-1) - 1, chosen)
    return directions.gather(-1, column[..., None, :].expand(-1, directions.shape[-2], -1))


def _tail_weight(grad: Tensor, sigma: Tensor, count: int) -> Tensor:
    """sqrt(E / count) (batch,), zero where E is within the rounding error of the sums it is the difference of, or out of range."""
    total = frobenius_norm(grad).square()
    left_over = total - sigma.double().square().sum(dim=-1)
    left_over = torch.where(torch.isfinite(total) & (left_over > 16 * torch.finfo(sigma.dtype).eps * total), left_over, 0)
    return (left_over / count).sqrt().to(sigma.dtype)


def _tail_directions(grad: Tensor, directions: Tensor, count: int, seed: int) -> Tensor:
    """`count` random orthonormal directions of range(G) orthogonal to the known ones: (batch, m, count)."""
    omega = philox.normal(philox.seed_tensor([seed], grad.device), (count, grad.shape[-1]), philox.TAIL, directions.dtype)[0].mT
    tail = multiply(grad, omega)
    return complement(directions, tail, seed)
