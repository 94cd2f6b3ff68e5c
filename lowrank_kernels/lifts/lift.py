"""What a lift is."""

from __future__ import annotations

from torch import Tensor


class Lift:
    """N → the direction D (m, n) of W' = (1 − lr·wd)·W' − lr·α·D, for one matrix."""

    name: str
    takes_gradient = False
    """Whether D needs G', which a step whose R is given does not have."""

    def state(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is kept between steps, in fp32, which starts as zeros."""
        return {}

    def direction(
        self, basis: Tensor, normalised: Tensor, *, grad: Tensor | None, projected: Tensor | None, state: dict[str, Tensor]
    ) -> Tensor:
        """D from P (m, r), N (r, n), G' (m, n) and R (r, n), all in fp32 (fp64 for fp64); `state` moves in
        place."""
        raise NotImplementedError
