"""APOLLO's lifts, in plain PyTorch, against the paper's formula written out; Fira's is tested through its
optimizer."""

import pytest
import torch

from lowrank_kernels.lifts.scaling import ChannelScaling, TensorScaling


def fp64(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("lift", [ChannelScaling(), TensorScaling()], ids=lambda lift: lift.name)
def test_against_the_formula_and_its_limiter(lift):
    basis, grad, state = fp64(12, 4), fp64(12, 20), {"scaled_norm": torch.zeros((), dtype=torch.float64)}
    last = None
    for growth in (1.0, 10.0, 0.1, 1.0):
        normalised, projected = growth * fp64(4, 20), fp64(4, 20)
        found = lift.direction(basis, normalised, grad=grad, projected=projected, state=state)
        if lift.name == "tensor_scaling":
            expected = grad * float(normalised.norm() / projected.norm())
        else:
            expected = torch.stack([grad[:, j] * normalised[:, j].norm() / projected[:, j].norm() for j in range(20)], 1)
        if last is not None and expected.norm() > 1.01 * last:
            expected = expected * (1.01 * last / expected.norm())
        assert torch.allclose(found, expected, rtol=1e-12)
        last = expected.norm()
        assert torch.allclose(state["scaled_norm"], last)


@pytest.mark.parametrize("lift", [ChannelScaling(), TensorScaling()], ids=lambda lift: lift.name)
def test_columns_without_a_gradient_stay(lift):
    grad, state = fp64(12, 20), {"scaled_norm": torch.zeros((), dtype=torch.float64)}
    projected = torch.zeros(4, 20, dtype=torch.float64)
    assert not lift.direction(fp64(12, 4), torch.zeros_like(projected), grad=grad, projected=projected, state=state).any()
