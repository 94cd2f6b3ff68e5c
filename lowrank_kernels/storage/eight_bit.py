"""8-bit moments: one byte for each element and one fp32 scale for each block of 64 neighbours along n.

A block's scale s is its largest |value|. A code is linear in a root of the value, so that the values of a
block may span several orders of magnitude:

    M:  c = 128 + ⌊127·sign(m)·√(|m|/s) + ½⌋             m = s·sign(c − 128)·((c − 128)/127)²
    V:  c = b + [255⁴·v/s > b⁴ + u·((b + 1)⁴ − b⁴)],     v = s·(c/255)⁴
        b = ⌊255·(v/s)^¼⌋, and 1 at least if v > 0

A code of M is the nearest one. A code of V is one of the two neighbours b and b + 1 of v: for u uniform in
[0, 1) what it decodes to has the mean v. Nearest codes would lose every change of V that is smaller than half
the distance to the next code, and at β2 = 0.999 nearly all changes are. u is

    u = ((ROW·i + COLUMN·j + STEP·t) mod 2²³) / 2²³

for row i, column j and the update of number t. Over t this is a sequence of low discrepancy, with a phase for
each element, so it needs no seed and no state, and u is exact in fp32. A v within SLACK of a code gets that
code for every u, so that coding again what was decoded changes nothing.

Neighbouring codes of M are 1.6 % apart at the top and 6e-5·s at the bottom. Those of √V are 0.8 % and
1.5e-5·√s apart. V > 0 keeps a code of at least 1, so that N stays finite. The largest value of a block has
the code 255 (1 or 255 for M), and decodes to the scale itself. A block whose largest value is under 2⁻¹²⁶
becomes zero. In a block that holds a NaN or an infinity all values decode to NaN. Codes are uint8 (…, r, n),
scales fp32 (…, r, ⌈n / 64⌉).

Source of blockwise coding of Adam's moments: Dettmers et al., "8-bit optimizers via block-wise quantization",
arXiv 2110.02861. Unlike theirs, the codes here need no table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .storage import Layout, Storage

BLOCK = 64
SMALLEST = 2.0**-126
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
UNITS = 2**23
"""u is a multiple of 1 / UNITS."""
STEP = 5184487
"""STEP / UNITS = 0.61804, near the golden section. The partial quotients of its continued fraction are 1, 2
and 3. The smaller they are, the more evenly the multiples of a number fill [0, 1)."""
ROW, COLUMN = 2309557, 5971751
"""The best of 3000 random pairs: i·ROW + j·COLUMN + k·STEP stays away from the multiples of UNITS for small
i, j and k, so that neighbours in space and time have different u."""
SLACK = 2.0**-18
"""The part of v within which v counts as equal to a code. fp32 coding and decoding is off by 2⁻¹⁹·v at
most."""


def scales_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales, (…, r, ⌈n / 64⌉), of moments of shape (…, r, n)."""
    return (*shape[:-1], -(-shape[-1] // BLOCK))


def decode(
    exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor, exp_avg_sq_scale: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """M and V, (…, r, n) in `dtype`."""
    return decode_m(exp_avg, exp_avg_scale, dtype), decode_v(exp_avg_sq, exp_avg_sq_scale, dtype)


def decode_m(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # In place where it can be, here and below: fresh memory takes half of the time otherwise.
    root = codes.to(dtype).sub_(128).div_(127)
    return root.abs().mul_(root).mul_(_spread(scale, codes))


def decode_v(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).div_(255).square_().square_().mul_(_spread(scale, codes))


def encode_(
    m: Tensor,
    v: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq_scale: Tensor,
    step: float | Tensor,
) -> None:
    """Writes the codes and scales of M and V in place. m, v: (…, r, n) in fp32 or fp64. step: t, the
    number of the update that they come from."""
    encode_m_(m, exp_avg, exp_avg_scale)
    encode_v_(v, exp_avg_sq, exp_avg_sq_scale, step)


def coded(name: str, values: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
    """Codes and scales of one moment in fp32, named `name`, in new memory."""
    codes = torch.empty_like(values, dtype=torch.uint8, memory_format=torch.contiguous_format)
    scales = values.new_empty(scales_shape(values.shape))
    if name == "exp_avg":
        encode_m_(values, codes, scales)
    else:
        encode_v_(values, codes, scales, float(step))
    return codes, scales


def encode_m_(m: Tensor, codes: Tensor, scale: Tensor) -> None:
    scale.copy_(_peak(m))
    codes.copy_(_share(m, scale).sqrt_().mul_(127).copysign_(m).add_(0.5).floor_().add_(128).nan_to_num_(128))


def encode_v_(v: Tensor, codes: Tensor, scale: Tensor, step: float | Tensor) -> None:
    scale.copy_(_peak(v))
    chosen = codes_of_v(_share(v, scale), fractions(v.shape[-2:], step, v.dtype, v.device))
    codes.copy_(chosen.clamp_min_(1).masked_fill_(v <= 0, 0).nan_to_num_(0))


def fractions(shape: Sequence[int], step: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """u, (…, r, n) in `dtype`, for the update of number t = `step`, a number or (…, 1, 1). It is the same in
    fp32 and fp64."""
    rows, columns = torch.arange(shape[0], device=device)[:, None], torch.arange(shape[1], device=device)
    step = step.to(device, torch.int64) if isinstance(step, Tensor) else int(step)
    of_row, of_column = ((part % UNITS).to(dtype) / UNITS for part in (ROW * rows + STEP * step, COLUMN * columns))
    return (of_row + of_column).frac_()


def codes_of_v(share: Tensor, fraction: Tensor) -> Tensor:
    """The codes of V for its shares v/s in [0, 1] and u, as floats. Here a code may be 0 for v > 0;
    `encode_` makes it 1."""
    fourth = 255.0**4 * share
    below = fourth.sqrt().sqrt_().mul_(1 + SLACK / 4).floor_()
    exact = below.square().square_()
    distance = (4 * below).add_(6).mul_(below).add_(4).mul_(below).add_(1)  # (b + 1)⁴ − b⁴
    threshold = distance.mul_(fraction).add_(exact)
    torch.maximum(threshold, exact.mul_(1 + SLACK), out=threshold)
    return below.add_(fourth.gt_(threshold))


def _peak(values: Tensor) -> Tensor:
    """The largest |value| of each block, in fp32. It is NaN for a block that is not finite, and 0 where it is
    under the smallest normal number."""
    padded = torch.nn.functional.pad(values.abs(), (0, -values.shape[-1] % BLOCK)).unflatten(-1, (-(-values.shape[-1] // BLOCK), BLOCK))
    peak = padded.amax(-1).to(torch.float32)
    return peak.where(peak >= SMALLEST, 0 * peak).where(peak.isfinite(), torch.nan)


def _share(values: Tensor, scale: Tensor) -> Tensor:
    """|value| / s in [0, 1]; 0 where s is 0."""
    spread = _spread(scale, values)
    return values.abs().div_(spread).clamp_(max=1).masked_fill_(spread == 0, 0)


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    """The scale of each element's block, (…, r, n)."""
    return scale.repeat_interleave(BLOCK, -1)[..., : like.shape[-1]]


class EightBit(Storage):
    """Stores a rule's `exp_avg` as M and its `exp_avg_sq` as V, in codes, each with its scales
    (exp_avg_scale, exp_avg_sq_scale). What else a rule keeps is small, and stays as it is."""

    name = "eight_bit"

    def layout(self, shapes: dict[str, tuple[int, int]], state_dtype: torch.dtype) -> Layout:
        coded = [name for name in MOMENTS if name in shapes]
        if not coded:
            raise ValueError(f"state_bits=8 codes {' and '.join(MOMENTS)}, and this rule keeps {', '.join(shapes)}; use state_bits=32")
        layout = {name: (shape, torch.uint8 if name in coded else state_dtype) for name, shape in shapes.items()}
        return layout | {f"{name}_scale": (scales_shape(shapes[name]), torch.float32) for name in coded}

    def load(self, stored: dict[str, Tensor], state_dtype: torch.dtype) -> dict[str, Tensor]:
        values = {name: tensor for name, tensor in stored.items() if name not in SCALES}
        for name, decode_one in zip(MOMENTS, (decode_m, decode_v), strict=True):
            if name in values:
                values[name] = decode_one(stored[name], stored[f"{name}_scale"], state_dtype)
        return values

    def store_(self, values: dict[str, Tensor], stored: dict[str, Tensor], step: float | Tensor) -> None:
        if "exp_avg" in values:
            encode_m_(values["exp_avg"], stored["exp_avg"], stored["exp_avg_scale"])
        if "exp_avg_sq" in values:
            encode_v_(values["exp_avg_sq"], stored["exp_avg_sq"], stored["exp_avg_sq_scale"], step)
