"""8-bit moments for the tests, each in a frame that a missing mask would show, and the judgement of codes."""

from __future__ import annotations

import torch
from buckets import DEVICE, guarded
from tolerances import codes_error, exact_codes

from lowrank_kernels.storage import eight_bit

GUARD = 2048
EDGE = 255  # the code of a block's largest value: one read from the frame would be that of its block


def guarded_codes(codes: torch.Tensor) -> torch.Tensor:
    buffer = torch.full((codes.numel() + 2 * GUARD,), EDGE, dtype=torch.uint8, device=DEVICE)
    view = buffer[GUARD : GUARD + codes.numel()].view(codes.shape)
    view.copy_(codes)
    return view


def coded_states(count: int, r: int, n: int, scale: float = 1.0) -> list[list[torch.Tensor]]:
    """exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales of the size that gradients of size `scale`
    would have given them."""
    lists = [[], [], [], []]
    for _ in range(count):
        m, v = scale * torch.randn(r, n, dtype=torch.float64), scale**2 * (0.1 + torch.rand(r, n, dtype=torch.float64))
        coded = [torch.zeros(r, n, dtype=torch.uint8) for _ in range(2)] + [torch.zeros(eight_bit.scales_shape((r, n))) for _ in range(2)]
        eight_bit.encode_(m, v, *coded, step=1)
        for tensors, values in zip(lists, coded, strict=True):
            tensors.append(guarded_codes(values) if values.dtype == torch.uint8 else guarded(values.to(DEVICE)))
    return lists


def code_frames_intact(views: list[torch.Tensor]) -> bool:
    return all(bool((view._base[:GUARD] == EDGE).all()) and bool((view._base[-GUARD:] == EDGE).all()) for view in views)


def assert_codes(
    coded: tuple[torch.Tensor, ...], m: torch.Tensor, v: torch.Tensor, errors: tuple[torch.Tensor, torch.Tensor], step: float
) -> None:
    """Codes of M and V and their scales after the update of number `step`, against the exact moments. A code
    of M is the nearest one, within its error. A code of V is monotone in V for its u, so it lies between the
    codes of the ends of the interval in which V is."""
    expected, bounds = exact_codes(m, v), codes_error(m, v, errors)
    wrong = ~((coded[0].double() - expected[0]).abs() <= 0.5 + bounds[0])
    assert not wrong.any(), f"codes of M: {int(wrong.sum())} of {wrong.numel()} not the nearest, first at {wrong.nonzero()[0].tolist()}"
    fraction = eight_bit.fractions(v.shape, step, torch.float64, v.device)
    least, greatest = (eight_bit.codes_of_v(((expected[1] + error) / 255).clamp(0, 1) ** 4, fraction) for error in (-bounds[1], bounds[1]))
    least, greatest = (codes.clamp_min(1).where(v + error > 0, codes) for codes, error in ((least, -errors[1]), (greatest, errors[1])))
    wrong = ~((least <= coded[1]) & (coded[1] <= greatest))
    assert not wrong.any(), f"codes of V: {int(wrong.sum())} of {wrong.numel()} are others, first at {wrong.nonzero()[0].tolist()}"
    for name, found, exact, bound in zip(("scales of M", "scales of V"), coded[2:], expected[2:], bounds[2:], strict=True):
        wrong = ~((found.double() - exact).abs() <= bound + 2.0**-24 * exact)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} off, first at {wrong.nonzero()[0].tolist()}"
