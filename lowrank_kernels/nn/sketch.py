"""The principal directions of a layer's inputs, for the next P."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..range_finder import orthonormalise
from ..subspaces import draw_projection

OVERSAMPLE = 8
"""Columns of the sketch beyond the directions that are wanted."""


class InputSketch:
    """Y = Σ xᵀ(x·Ω), a sketch of the inputs' covariance C = Σ xᵀx, with a Gaussian Ω (in, r₁ + 8). Y and Ω
    are fp32 and exist for one step in an outer step. An input costs 4·T·in·(r₁ + 8) flops."""

    def __init__(self, in_features: int, rank: int, seed: int, device: torch.device) -> None:
        columns = min(in_features, rank + OVERSAMPLE)
        with torch.inference_mode(False):
            self.omega = draw_projection("gaussian", in_features, columns, seed=seed, device=device, dtype=torch.float32)
            self.columns = torch.zeros_like(self.omega)

    def add(self, x: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            self.columns.addmm_(rows.mT, rows @ self.omega)


def principal_directions(sketch: InputSketch, rank: int) -> Tensor | None:
    """Q (in, rank) with orthonormal columns in fp32, about the leading eigenvectors of C, the largest first.
    None where no input has come, or one that is not finite. The host waits for the device.

    Where torch.distributed is initialised, all processes add up their sketches, and take the result of the
    first one.
    """
    columns = sketch.columns.clone()  # a redraw that fails is tried again
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several:
        dist.all_reduce(columns)
    peak = columns.abs().amax().item()
    if not 0 < peak < float("inf"):
        return None
    columns = columns / peak
    _, vectors = torch.linalg.eigh(columns.double().mT @ columns.double())
    # Row-major, as it comes back from a checkpoint: products of other strides may have other last bits.
    directions = orthonormalise(columns @ vectors.flip(-1)[:, :rank].float()).contiguous()
    if several:
        dist.broadcast(directions, src=0)
    return directions
