"""One AdamW step in the subspace: R = PᵀG', moments and N, W' = (1 − lr·wd)·W' − lr·α·P·N.

single_pass.py does the step in one launch and keeps R and N on the chip. split.py does it in two launches,
and N passes through memory.
"""

from __future__ import annotations

from ..bucket import Bucket, Hyper
from . import single_pass, split, table
from .configs import SinglePassConfig


def step(bucket: Bucket, hyper: Hyper) -> None:
    """One step, in place on the weights and states of a bucket. The bucket was checked by whoever made it.

    Weights, gradients, R and bases are fp32, bf16 or fp16, each independently of the others. States are
    row-major, in plain fp32 or in 8 bits. Where found_inf is not zero, weights and states keep their bits.
    Each step writes the pointer table anew. No step synchronises with the device.
    """
    for part in table.launchable(bucket):
        with table.on_device(part.device):
            rows = table.rows_of(part)
            row = single_pass.row_for(part, rows.aligned)
            if isinstance(row, SinglePassConfig):
                single_pass.step(part, hyper, rows, row)
            else:
                split.step(part, hyper, rows, row)
