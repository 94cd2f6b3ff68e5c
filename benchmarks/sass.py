"""What is in a compiled kernel: registers, instructions, and the loops that they stand in, as cuobjdump of
Triton's wheel reads a cubin."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from . import dry

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
LOCAL = r"(LDL|STL)\b"
GLOBAL = r"(LDG|STG|LDGSTS|LD|ST|RED|ATOM|ATOMG|UTMA\w+|UBLKCP)\b"
MATRIX_UNITS = r"(HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA|OMMA|QMMA)\b"
FP64 = r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|(F2F|I2F|F2I|MUFU)\b.*(F64|64H)"
ASYNC_COPIES = r"(LDGSTS|UTMA\w+|UBLKCP)\b"


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Sass:
    """usage: REG, STACK, SHARED, LOCAL of a kernel. instructions: in order of their addresses."""

    usage: dict[str, int]
    instructions: list[Instruction]

    def loops(self) -> list[list[Instruction]]:
        """The bodies of the loops that hold no other one, in order. A loop ends with a branch back."""
        spans = sorted(
            (target, each.address)
            for each in self.instructions
            if each.name.startswith("BRA") and (target := _target(each.operands)) is not None and target < each.address
        )
        spans = [span for span in spans if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)]
        return [[each for each in self.instructions if first <= each.address <= last] for first, last in spans]


def disassemble(cubin: bytes) -> Sass:
    text = dry.cuobjdump(cubin, "--dump-resource-usage", "--dump-sass")
    instructions = [Instruction(int(address, 16), name, operands.strip()) for address, name, operands in _LINE.findall(text)]
    if not instructions:
        raise RuntimeError(f"no SASS in the output of cuobjdump:\n{text[:2000]}")
    return Sass(dry.resource_usage(text), instructions)


def _target(operands: str) -> int | None:
    found = re.search(r"0x([0-9a-f]+)", operands)
    return int(found.group(1), 16) if found else None


def select(instructions: list[Instruction], pattern: str) -> dict[str, int]:
    """How often each instruction occurs whose name matches."""
    counts = Counter(each.name for each in instructions if re.match(pattern, each.name))
    return dict(sorted(counts.items()))


def waits(instructions: list[Instruction]) -> int | None:
    """How many groups of asynchronous copies may be under way after the strictest wait for them; None where
    none is waited for."""
    found = [re.search(r"SB0, 0x([0-9a-f]+)", each.operands) for each in instructions if each.name.startswith("DEPBAR")]
    return min((int(match.group(1), 16) for match in found if match), default=None)


def access_bits(instruction: str) -> int:
    """Bits that a thread moves: LDG.E.128 → 128, LDG.E.U8 → 8, LDG.E → 32; bulk copies count as wide."""
    if instruction.startswith(("UTMA", "UBLKCP")):
        return 1024
    widths = [int(width) for width in re.findall(r"\.[US]?(8|16|64|128|256)\b", instruction)]
    return max(widths, default=32)
