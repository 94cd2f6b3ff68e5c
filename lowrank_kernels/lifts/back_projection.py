"""GaLore's lift (arXiv 2403.03507)."""

from __future__ import annotations

from torch import Tensor

from .lift import Lift


class BackProjection(Lift):
    """D = P·N."""

    name = "back_projection"

    def direction(self, basis: Tensor, normalised: Tensor, **_: object) -> Tensor:
        return basis @ normalised
