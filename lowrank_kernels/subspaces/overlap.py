"""How much of one subspace lies in another."""

from __future__ import annotations

from torch import Tensor


def subspace_overlap(basis: Tensor, other: Tensor) -> Tensor:
    """‖PᵀQ‖²_F / r, from 0 (orthogonal) to 1 (the same span): two orthonormal bases (…, m, r) → (…), fp32
    (fp64 for fp64).

    Two unrelated random subspaces overlap r/m on average. Adjacent bases of GaLore are reported at 0.85–0.99,
    those of I3S at 0.3–0.7 (arXiv 2502.05790). Optimizers write a new basis over the old one, so clone a
    basis to compare it later. Raises ValueError where the shapes differ.
    """
    if basis.shape != other.shape or basis.dim() < 2:
        raise ValueError(f"bases must have the same shape (…, m, r), got {tuple(basis.shape)} and {tuple(other.shape)}")
    if basis.dtype.itemsize < 4:
        basis, other = basis.float(), other.float()
    return (basis.mT @ other.to(basis.dtype)).square().sum(dim=(-2, -1)) / basis.shape[-1]
