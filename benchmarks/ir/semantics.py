"""What ttsem 0.1.0 does not know of Triton 3.8.0, and what makes it faster: set_up() changes it for the rest
of the process."""

from __future__ import annotations

import functools

import numpy as np
from ttsem import mlir, ops, races
from ttsem.values import MemDesc


def set_up() -> None:
    """Before anything is compiled.

    The printer is switched to the generic form, in which a module may begin with aliases. Reading a module
    takes several times as long as executing it.
    """
    mlir.enable_generic_printing()
    mlir.tokenize = _tokenize
    mlir.Parser._parse_type_from_text = _parse_type_from_text
    mlir.to_generic = lambda module, *_: module
    ops.OPS["ttng.tmem_subslice"] = _tmem_subslice
    ops.OPS["builtin.unrealized_conversion_cast"] = lambda interpreter, operation, values: [values[0]]
    races._HOOKS["ttng.tc_gen5_mma"] = _tensor_core_reads
    # Accesses are looked up in lists by value, which would compare arrays.
    races.Access.__eq__ = object.__eq__
    races.Access.__hash__ = object.__hash__


def _tokenize(text: str) -> list:
    """mlir.tokenize without a call for each token."""
    matches = list(mlir._MASTER_RE.finditer(text))
    if sum(map(len, (match.group() for match in matches))) != len(text):
        raise mlir.ParseError("unexpected character")
    tokens = [
        mlir.Token(match.lastgroup, match.group(), match.start(), match.end())
        for match in matches
        if match.lastgroup not in mlir._IGNORED_KINDS
    ]
    return [*tokens, mlir.Token("EOF", "", len(text), len(text))]


def _parse_type_from_text(parser, text: str):
    return _type_of(text) if "#" not in text else mlir.Parser(_tokenize(text), text).parse_type()


@functools.lru_cache(1024)
def _type_of(text: str):
    return mlir.Parser(_tokenize(text), text).parse_type()


def _tmem_subslice(interpreter, operation, values) -> list:
    """Columns of a buffer in tensor memory from `N` on; ttsem looks for `offset`, and takes the first columns
    where there is none."""
    buffer = values[0]
    rows, columns = operation.result_types[0].shape
    start = int(str(operation.attrs["N"]).split(":")[0])
    if buffer.data.ndim != 2 or buffer.data.shape[0] != rows:
        raise ops.Unsupported(operation.name, f"{rows} rows of a buffer {buffer.data.shape}")
    return [MemDesc(buffer.data[:, start : start + columns], buffer.elem, dict(buffer.attrs))]


def _tensor_core_reads(interpreter, operation, values, results) -> None:
    """An MMA of sm_100 reads its operands in shared memory until its barrier says that it is through."""
    a, b, _, _, _, predicates, barriers, _ = ops._segments(operation, values, 8)
    if predicates and not bool(np.asarray(predicates[0])):
        return
    completion = races._barrier_key(barriers[0]) if barriers else None
    for operand in (*a, *b):
        if isinstance(operand, MemDesc) and "alloc_base" in operand.attrs:
            interpreter.whole(operand, "r", operation, pending=completion)
