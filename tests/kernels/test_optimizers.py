"""Whole optimizers on the kernels, in the interpreter or on a GPU: which launches a step makes, and that it
is the step of plain PyTorch."""

import copy

import pytest
import torch
from buckets import DEVICE
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels import backends
from lowrank_kernels.backends.triton import back_project, limiter, moments, project, project_moments, residual, scaling, single_pass

pytestmark = pytest.mark.gpu
LAUNCHES = {
    "single pass": (single_pass, "_adamw_step_kernel"),
    "project": (project, "_project_kernel"),
    "project, moments": (project_moments, "_project_moments_kernel"),
    "moments": (moments, "_update_moments_kernel"),
    "back-project": (back_project, "_back_project_kernel"),
    "residual": (residual, "_residual_kernel"),
    "limit": (limiter, "_limit_kernel"),
    "scale": (scaling, "_scale_kernel"),
}
OF_FIRA = ["project, moments", "residual", "limit", "residual"]
OF_APOLLO = ["project, moments", "limit", "scale"]
COMPOSED = ["project", "back-project"]


class Counted:
    def __init__(self, kernel, name, seen):
        self.kernel, self.name, self.seen = kernel, name, seen

    def __getitem__(self, grid):
        self.seen.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    """The launches so far, by name. CPU tensors run on the kernels too."""
    seen = []
    for name, (module, kernel) in LAUNCHES.items():
        monkeypatch.setattr(module, kernel, Counted(getattr(module, kernel), name, seen))
    monkeypatch.setitem(backends.BACKENDS, "cpu", backends.BACKENDS["cuda"])
    return seen


def gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def compare(a, b):
    for one, other in zip(a, b, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def in_plain_pytorch(monkeypatch):
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(backends.BACKENDS, device, backends.REFERENCE)


def layers():
    return nn.ModuleList([*(nn.Linear(40, 24, bias=False) for _ in range(3)), nn.Linear(24, 40, bias=False)]).to(DEVICE)


@pytest.mark.parametrize("proximal", [0.0, 0.1])
def test_rso_moves_all_layers_of_a_shape_in_one_launch(launches, monkeypatch, proximal):
    """With a proximal term the coordinates themselves move too, so that N is needed in memory."""
    model = lrk.to_subspace(layers(), rank=8, target_modules=r"\d", seed=0)
    twin = copy.deepcopy(model)
    optimizers = [lrk.RSOAdamW(each.parameters(), lr=0.01, proximal=proximal, weight_decay=0.1) for each in (model, twin)]
    for step in range(3):
        gradients([layer.coordinates for layer in model], step)
        launches.clear()
        optimizers[0].step()
        assert launches == (["moments", "back-project"] if proximal else ["single pass"]) * 2  # two shapes
    in_plain_pytorch(monkeypatch)
    for step in range(3):
        gradients([layer.coordinates for layer in twin], step)
        optimizers[1].step()
    compare([layer.weight for layer in model], [layer.weight for layer in twin])


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize(
    "name, expected",
    [
        ("GaLoreAdamW", ["single pass"]),
        ("FiraAdamW", OF_FIRA),
        ("ApolloAdamW", OF_APOLLO),
        ("ApolloMiniAdamW", OF_APOLLO),
        ("LowRankAdafactor", COMPOSED),
        ("LowRankAdamMini", COMPOSED),
    ],
)
def test_a_step_of_equal_matrices(launches, monkeypatch, name, expected, state_bits):
    models = [layers()]
    models.append(copy.deepcopy(models[0]))
    groups = [[{"params": list(model.parameters()), "rank": 6, "state_bits": state_bits}] for model in models]
    optimizers = [getattr(lrk, name)(group, lr=0.01, weight_decay=0.1) for group in groups]
    for step in range(3):
        gradients(models[0].parameters(), step)
        launches.clear()
        optimizers[0].step()
        assert launches == expected * 2  # two shapes
    in_plain_pytorch(monkeypatch)
    for step in range(3):
        gradients(models[1].parameters(), step)
        optimizers[1].step()
    compare(models[0].parameters(), models[1].parameters())
