"""The refresh's operators: schemas, fakes and mutation, as torch.library checks them."""

import pytest
import torch


@pytest.mark.parametrize("rank", [3, 12])
def test_opcheck_of_the_refresh(rank):
    lowrank = torch.ops.lowrank_kernels
    torch.library.opcheck(lowrank.range_finder.default, (torch.randn(2, 12, 40), rank, 4, 1, 7, None))
    torch.library.opcheck(lowrank.range_finder.default, (torch.randn(2, 40, 12).mT, rank, 4, 1, 7, None))
    torch.library.opcheck(lowrank.range_finder.default, (torch.randn(2, 12, 40), rank, 4, 1, 7, torch.randn(2, 12, 2)))
    torch.library.opcheck(lowrank.orthonormalise.default, (torch.randn(2, 40, rank), 7))
    for right, previous in ((False, []), (True, [torch.randn(40, rank)] * 2)):
        grads, settings = [torch.randn(40, 12) if not right else torch.randn(12, 40) for _ in range(2)], ("importance", "randomized", 4, 1)
        opcheck = torch.library.opcheck
        opcheck(lowrank.choose_bases.default, (grads, previous, rank, right, *settings, 7, [1, 2], torch.bfloat16, None))
    torch.library.opcheck(lowrank.sample_importance.default, (torch.rand(2, 20), rank, [3, 4]))
