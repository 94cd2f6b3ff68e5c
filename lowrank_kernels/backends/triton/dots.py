"""How the dots multiply: operand dtype and input precision, decided on the host and stated at every
`tl.dot`."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...precision import tf32_allowed

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FLOATS = tuple(TRITON_DTYPES)


@triton.jit
def round_operand(x, ROUNDING: tl.constexpr):
    """Nearest tf32 for a tf32 dot, x otherwise.

    The tensor cores drop the low 13 bits of an fp32 operand, which biases every product towards zero.
    Rounding first halves the error and removes the bias.

    Triton would otherwise move the transpose of an operand in front of its load, which turns the 16-byte
    copies into 4-byte ones on sm_80 and sm_90. An impure operation prevents that. On sm_100 it does not, and
    Triton up to 3.8 cannot pipeline an impure operation there.
    """
    if ROUNDING == "impure":
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    elif ROUNDING == "pure":
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x


INTERPRETED = not isinstance(round_operand, triton.JITFunction)  # TRITON_INTERPRET as it was at import


@dataclass(frozen=True)
class Dot:
    """kind names the rows of configs.py: "16bit", "tf32" or "ieee". Every kind accumulates in fp32."""

    kind: str
    DOT_DTYPE: tl.dtype
    PRECISION: str
    ROUNDING: str = "none"


def dot_of(a: torch.dtype, b: torch.dtype, arch: int | str | None) -> Dot:
    """16-bit operands where both have the same 16-bit dtype; else fp32 operands, in tf32 where torch allows
    it.

    The interpreter always gets fp32 operands, because its tl.dot multiplies the bit patterns of bf16.
    Upcasting is exact, so the products are those of the 16-bit dot. The interpreter and AMD have no tf32 and
    get ieee.
    """
    if a == b and a.itemsize == 2:
        return Dot("16bit", tl.float32 if INTERPRETED else TRITON_DTYPES[a], "ieee")
    if not tf32_allowed() or not isinstance(arch, int):
        return Dot("ieee", tl.float32, "ieee")
    return Dot("tf32", tl.float32, "tf32", "pure" if 100 <= arch < 120 else "impure")
