"""Whether an error is one after which every call to the GPU fails in this process: its context is gone."""

from __future__ import annotations

import re

LOST = re.compile(
    "illegal memory access|illegal address|device-side assert|unspecified launch failure|misaligned address|illegal instruction"
    "|invalid program counter|hardware stack error|invalid address space|uncorrectable|launch timed out|CUDA_ERROR_LAUNCH_FAILED",
    re.IGNORECASE,
)


def is_lost(error: BaseException | None) -> bool:
    """By the text of the error, and of those that it came from: torch's and Triton's are RuntimeErrors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
