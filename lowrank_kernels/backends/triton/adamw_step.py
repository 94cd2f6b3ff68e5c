"""One AdamW step in the subspace: R = PᵀG', moments and N, W' = (1 − lr·wd)·W' − lr·α·P·N.

single_pass.py does the step in one launch and keeps R and N on the chip. two_pass.py does it in three
launches and keeps both in memory.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ...storage import eight_bit
from ..bucket import Bucket, Hyper
from . import single_pass, table, two_pass


def step(bucket: Bucket, hyper: Hyper) -> None:
    """One step, in place on the weights and states of a bucket. The bucket was checked by whoever made it.

    Weights, gradients and bases are fp32, bf16 or fp16, each independently of the others. States are
    row-major, in plain fp32 or in 8 bits. Where found_inf is not zero, weights and states keep their bits.
    Each step writes the pointer table anew. No step synchronises with the device.
    """
    names = [*eight_bit.MOMENTS, *(name for name in eight_bit.SCALES if name in bucket.states)]
    lists = [bucket.weights, bucket.grads, bucket.bases, *(bucket.states[name] for name in names)]
    if len(bucket) > table.MAX_MATRICES:
        for start in range(0, len(bucket), table.MAX_MATRICES):
            step(bucket.part(start, start + table.MAX_MATRICES), hyper)
        return
    with table.on_device(bucket.device):
        rows, aligned = table.rows_of(lists, bucket.steps)
        first = [tensors[0] for tensors in lists[:4]]
        options = dict(count=len(bucket), aligned=aligned)
        path = choose_path(*first, **options)
        launch = path.prepare(rows, *first, right=bucket.right, stochastic=bucket.rounding_seeds is not None, **options)
        on_device, (beta1, beta2) = isinstance(hyper.lr, Tensor), hyper.options["betas"]
        launch(
            lr=0.0 if on_device else hyper.lr, device_lr=hyper.lr if on_device else None,
            beta1=beta1, beta2=beta2, eps=hyper.options["eps"], weight_decay=hyper.weight_decay, scale=hyper.scale, step=None,
            found_inf=bucket.found_inf, rounding_seeds=bucket.rounding_seeds,
        )  # fmt: skip


def choose_path(weight: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, *, count: int, aligned: bool) -> ModuleType:
    """The module whose `prepare` serves the bucket. It is single_pass if that has tiles for the bucket and
    enough programs to fill the device, else two_pass."""
    return single_pass if single_pass.serves(weight, grad, basis, exp_avg, count=count, aligned=aligned) else two_pass
