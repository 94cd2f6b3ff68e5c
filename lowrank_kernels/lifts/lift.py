"""Lift: the base class of lifts."""

from __future__ import annotations

from torch import Tensor


class Lift:
    """Computes from N the direction D (m, n) of W' = (1 − lr·wd)·W' − lr·α·D, for one matrix."""

    name: str
    takes_gradient = False
    """Whether D needs G'. A step that is given R instead of a gradient has no G'."""

    needs_orthonormal = False
    """Whether P must have orthonormal columns."""

    def state(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that are kept between steps, in fp32. They start as zeros."""
        return {}

    def direction(
        self, basis: Tensor, normalised: Tensor, *, grad: Tensor | None, projected: Tensor | None, state: dict[str, Tensor]
    ) -> Tensor:
        """D from P (m, r), N (r, n), G' (m, n) and R (r, n), all in fp32 (fp64 for fp64). Updates `state` in
        place."""
        raise NotImplementedError
