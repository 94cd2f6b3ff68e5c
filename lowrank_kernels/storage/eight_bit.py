"""8-bit moments: one byte for each element and one fp32 scale for each block of 64 neighbours along n.

A block's scale s is its largest |value|. A code is linear in a root of the value, so that the values of a
block may span several orders of magnitude:

    M:  c = 128 + ⌊127·sign(m)·√(|m|/s) + ½⌋             m = s·sign(c − 128)·((c − 128)/127)²
    V:  c = ⌊255·(v/s)^¼ + ½⌋, 1 at least if v > 0       v = s·(c/255)⁴

Neighbouring codes of M are 1.6 % apart at the top and 6e-5·s at the bottom. Those of √V are 0.8 % and
1.5e-5·√s apart. V > 0 keeps a code of at least 1, so that N stays finite. A block whose largest value is
under 2⁻¹²⁶ becomes zero. In a block that holds a NaN or an infinity all values decode to NaN. Codes are uint8
(…, r, n), scales fp32 (…, r, ⌈n / 64⌉).

Source of blockwise coding of Adam's moments: Dettmers et al., "8-bit optimizers via block-wise quantization",
arXiv 2110.02861. Unlike theirs, the codes here need no table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .storage import Layout, Storage

BLOCK = 64
SMALLEST = 2.0**-126
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")


def scales_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales, (…, r, ⌈n / 64⌉), of moments of shape (…, r, n)."""
    return (*shape[:-1], -(-shape[-1] // BLOCK))


def decode(
    exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor, exp_avg_sq_scale: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """M and V, (…, r, n) in `dtype`."""
    root = (exp_avg.to(dtype) - 128) / 127
    fourth_root = exp_avg_sq.to(dtype) / 255
    return root * root.abs() * _spread(exp_avg_scale, exp_avg), fourth_root.square().square() * _spread(exp_avg_sq_scale, exp_avg_sq)


def encode_(m: Tensor, v: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor, exp_avg_sq_scale: Tensor) -> None:
    """Writes the codes and scales of M and V in place. m, v: (…, r, n) of any float dtype."""
    exp_avg_scale.copy_(_peak(m))
    exp_avg_sq_scale.copy_(_peak(v))
    exp_avg.copy_((128 + (127 * m.sign() * _share(m, exp_avg_scale).sqrt() + 0.5).floor()).nan_to_num(128))
    fourth_root = _share(v, exp_avg_sq_scale).sqrt().sqrt()
    exp_avg_sq.copy_((255 * fourth_root + 0.5).floor().clamp_min(1).where(v > 0, 0).nan_to_num(0))


def _peak(values: Tensor) -> Tensor:
    """The largest |value| of each block, in fp32. It is NaN for a block that is not finite, and 0 where it is
    under the smallest normal number."""
    padded = torch.nn.functional.pad(values.abs(), (0, -values.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    peak = padded.amax(-1).to(torch.float32)
    return peak.where(peak >= SMALLEST, 0 * peak).where(peak.isfinite(), torch.nan)


def _share(values: Tensor, scale: Tensor) -> Tensor:
    """|value| / s in [0, 1]; 0 where s is 0."""
    spread = _spread(scale, values)
    return (values.abs() / spread).clamp(max=1).where(spread != 0, 0)


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    """The scale of each element's block, (…, r, n)."""
    return scale.repeat_interleave(BLOCK, -1)[..., : like.shape[-1]]


class EightBit(Storage):
    """Stores AdamW's M and V as codes, each with its scales: exp_avg and exp_avg_scale, exp_avg_sq and
    exp_avg_sq_scale."""

    name = "eight_bit"

    def layout(self, shapes: dict[str, tuple[int, int]], state_dtype: torch.dtype) -> Layout:
        if set(shapes) != set(MOMENTS):
            raise ValueError(f"state_bits=8 codes AdamW's moments, and this rule keeps {', '.join(shapes)}; use state_bits=32")
        codes = {name: (shape, torch.uint8) for name, shape in shapes.items()}
        return codes | {f"{name}_scale": (scales_shape(shape), torch.float32) for name, shape in shapes.items()}

    def load(self, stored: dict[str, Tensor], state_dtype: torch.dtype) -> dict[str, Tensor]:
        return dict(zip(MOMENTS, decode(*(stored[name] for name in (*MOMENTS, *SCALES)), state_dtype), strict=True))

    def store_(self, values: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
        encode_(*(values[name] for name in MOMENTS), *(stored[name] for name in (*MOMENTS, *SCALES)))
