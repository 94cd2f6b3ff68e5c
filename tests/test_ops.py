"""The refresh's operators: schemas, fakes and mutation, as torch.library checks them."""

import pytest
import torch


@pytest.mark.parametrize("rank", [3, 12])
def test_opcheck_of_the_refresh(rank):
    lowrank = torch.ops.lowrank_kernels
    for grads in ([torch.randn(2, 12, 40)], [torch.randn(40, 12).mT] * 2):
        torch.library.opcheck(lowrank.peaks.default, (grads,))
        torch.library.opcheck(lowrank.leading.default, (grads, torch.ones(2).double(), rank, 4, 1, 7))
        torch.library.opcheck(lowrank.short_side_spectrum.default, (grads, rank))
        torch.library.opcheck(lowrank.multiply.default, (grads, torch.randn(40, rank)))
    torch.library.opcheck(lowrank.normal.default, (torch.randn(2), [3, 4], [7, 8, 9], 1))
    torch.library.opcheck(lowrank.orthonormalise.default, (torch.randn(2, 40, rank), 7))
    for right, previous in ((False, []), (True, [torch.randn(40, rank)] * 2)):
        grads, settings = [torch.randn(40, 12) if not right else torch.randn(12, 40) for _ in range(2)], ("importance", "randomized", 4, 1)
        opcheck = torch.library.opcheck
        opcheck(lowrank.choose_bases.default, (grads, previous, rank, right, *settings, 7, [1, 2], torch.bfloat16, None))
    torch.library.opcheck(lowrank.sample_importance.default, (torch.rand(2, 20), rank, [3, 4]))
