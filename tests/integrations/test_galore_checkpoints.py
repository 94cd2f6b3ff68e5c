"""States that galore-torch saved, and runs that go on from them."""

import os
import pickle
import sys
import types

import pytest
import torch

import lowrank_kernels as lrk
from lowrank_kernels.integrations import galore_torch
from lowrank_kernels.integrations.galore_checkpoint import PROJECTOR, load_checkpoint

BEFORE, GAP, RANK = 5, 4, 3
SHAPES = [(12, 20), (20, 12), (9, 9)]
SIDES = ["std", "reverse_std", "right", "left"]
AFTER = 3
"""Steps 5 to 7, before the refresh of step 8."""


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [*SHAPES, (7,)]]


def groups(params, **options):
    return [{"params": params[3:]}, {"params": params[:3], "rank": RANK, "update_proj_gap": GAP, "scale": 0.5, **options}]


def steps(optimizer, params, count, start=0):
    for step in range(start, start + count):
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def close(a, b, count):
    """fp32: R is a sum of at most 20 products. N = M / √V magnifies its error by up to 32 = 1/√(1 − β2).
    Each of the steps adds lr·α·P·N with |N| ≤ 32, rounded to 2⁻²⁴."""
    bound = count * 1e-2 * 32 * 40 * 2.0**-24 + 4 * count * 2.0**-24 * max(param.abs().max().item() for param in a)
    return all((x - y).abs().max() <= bound for x, y in zip(a, b, strict=True))


class TestAgainstGaloreTorch:
    """Version 1.0, as it is on PyPI."""

    @pytest.fixture
    def theirs(self):
        return pytest.importorskip("galore_torch")

    def trained(self, kind, **options):
        params = parameters()
        optimizer = kind(groups(params, proj_type=options.pop("proj_type", "std")), lr=1e-2, eps=0.0, **options)
        steps(optimizer, params, BEFORE)
        return params, optimizer

    @pytest.mark.parametrize("proj_type", SIDES)
    @pytest.mark.parametrize("form", ["state_dict", "script", "trainer"])
    def test_the_next_steps_are_the_same(self, theirs, tmp_path, proj_type, form):
        params, optimizer = self.trained(theirs.GaLoreAdamW, proj_type=proj_type, no_deprecation_warning=True)
        path = tmp_path / "optimizer.pt"
        torch.save({"optimizer": optimizer.state_dict(), "scheduler": {}} if form == "script" else optimizer.state_dict(), path)
        own = [torch.nn.Parameter(param.detach().clone()) for param in params]
        other = lrk.GaLoreAdamW(groups(own, proj_type=proj_type), lr=1e-2, eps=0.0)
        load_checkpoint(other, tmp_path if form == "trainer" else path)
        before = [param.detach().clone() for param in own]
        steps(optimizer, params, AFTER, BEFORE)
        steps(other, own, AFTER, BEFORE)
        assert close(params, own, AFTER) and not close(before, own, AFTER)
        assert other.param_groups[1]["calls"] == BEFORE + AFTER

    def test_the_next_refresh_is_due_when_it_was(self, theirs, tmp_path):
        params, optimizer = self.trained(theirs.GaLoreAdamW, no_deprecation_warning=True)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        own = [torch.nn.Parameter(param.detach().clone()) for param in params]
        other = lrk.GaLoreAdamW(
            groups(own),
            lr=1e-2,
            eps=0.0,
        )
        load_checkpoint(other, tmp_path)
        bases = []
        for step in range(BEFORE, 9):
            bases.append([optimizer.state[params[0]]["projector"].ortho_matrix.clone(), other.state[own[0]]["basis"].clone()])
            steps(optimizer, params, 1, step)
            steps(other, own, 1, step)
        new = optimizer.state[params[0]]["projector"].ortho_matrix, other.state[own[0]]["basis"]
        assert all(torch.equal(*pair) for pair in zip(*bases[-1:], *bases[:1], strict=True))
        assert not torch.equal(bases[-1][0], new[0]) and not torch.equal(bases[-1][1], new[1])
        overlap = torch.linalg.svdvals(new[0].mT @ new[1])  # the same subspace, up to signs
        assert torch.allclose(overlap, torch.ones(RANK), atol=1e-4)

    @pytest.mark.parametrize("beta1", [None, 0.8])
    def test_adafactor(self, theirs, tmp_path, beta1):
        params = parameters()[:3]
        options = dict(lr=1e-2, beta1=beta1, scale_parameter=False, relative_step=False)
        optimizer = theirs.GaLoreAdafactor(groups(params, proj_type="std")[1:], **options)
        steps(optimizer, params, BEFORE)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        own = [torch.nn.Parameter(param.detach().clone()) for param in params]
        other = galore_torch.GaLoreAdafactor(groups(own)[1:], **{key: value for key, value in options.items() if key != "relative_step"})
        load_checkpoint(other, tmp_path)
        steps(optimizer, params, AFTER, BEFORE)
        steps(other, own, AFTER, BEFORE)
        assert close(params, own, AFTER)

    def test_a_checkpoint_of_trainer_with_the_real_one_resumes_with_this_one(self, theirs, tmp_path):
        pytest.importorskip("accelerate")
        from tiny import llama, losses, trainer

        options = dict(optim="galore_adamw", optim_target_modules=["attn", "mlp"], optim_args="rank=8", max_steps=10)
        saved = dict(save_strategy="steps", save_steps=5)
        whole = trainer(tmp_path / "a", **options, **saved)
        whole.train()
        galore_torch.install()
        try:
            again = trainer(tmp_path / "b", model=llama(1), **options)
            again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
        finally:
            galore_torch.uninstall()
        assert losses(again)[-5:] == pytest.approx(losses(whole)[-5:], rel=1e-3)


class GaLoreProjector:
    """As galore-torch's, where that is not installed."""

    def __init__(self, basis):
        self.rank, self.verbose, self.update_proj_gap, self.scale, self.ortho_matrix, self.proj_type = RANK, False, GAP, 0.5, basis, "std"


@pytest.fixture
def projector(monkeypatch):
    """The stand-in under the name of the real one."""
    package, module = types.ModuleType("galore_torch"), types.ModuleType("galore_torch.galore_projector")
    monkeypatch.setattr(GaLoreProjector, "__module__", module.__name__)
    module.GaLoreProjector = GaLoreProjector
    monkeypatch.setitem(sys.modules, "galore_torch", package)
    monkeypatch.setitem(sys.modules, "galore_torch.galore_projector", module)
    return GaLoreProjector


def saved(projector, param, step=BEFORE, **options):
    basis = torch.linalg.qr(torch.randn(param.shape[0], RANK))[0]
    state = {"step": step, "projector": projector(basis), "exp_avg": torch.randn(RANK, param.shape[1])}
    state["exp_avg_sq"] = torch.rand(RANK, param.shape[1])
    group = dict(lr=2e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0, correct_bias=True, rank=RANK, update_proj_gap=GAP, scale=0.5)
    return {"state": {0: state}, "param_groups": [group | dict(proj_type="std", params=[0]) | options]}


@pytest.mark.parametrize("bits", [32, 8])
def test_states_and_settings_are_taken_over(projector, tmp_path, bits):
    param = parameters()[0]
    held = saved(projector, param)
    torch.save(held, tmp_path / "o.pt")
    optimizer = lrk.GaLoreAdamW([dict(params=[param], rank=RANK, state_bits=bits)], lr=1e-3)
    with pytest.warns(UserWarning, match="update_proj_gap 200 becomes 4"):
        load_checkpoint(optimizer, tmp_path / "o.pt")
    state, group = optimizer.state[param], optimizer.param_groups[0]
    assert torch.equal(state["basis"], held["state"][0]["projector"].ortho_matrix)
    assert state["step"] == BEFORE and state["refreshed_at"] == 4 and group["calls"] == BEFORE
    assert (group["lr"], group["betas"], group["scale"], group["state_bits"]) == (2e-2, (0.9, 0.99), 0.5, bits)
    if bits == 32:
        assert torch.equal(state["exp_avg"], held["state"][0]["exp_avg"])
    else:
        assert state["exp_avg"].dtype == torch.uint8


def test_parameters_that_have_made_other_numbers_of_steps_are_told_of(projector, tmp_path):
    params = parameters()[:1] + parameters()[:1]
    held = saved(projector, params[0], params=[0, 1])
    held["state"][1] = held["state"][0] | dict(step=BEFORE + 2)
    torch.save(held, tmp_path / "o.pt")
    optimizer = lrk.GaLoreAdamW([dict(params=params, rank=RANK)], lr=1e-3)
    with pytest.warns(UserWarning, match=f"group 0 have made {BEFORE} to {BEFORE + 2} steps"):
        load_checkpoint(optimizer, tmp_path / "o.pt")
    assert optimizer.param_groups[0]["calls"] == BEFORE + 2


def test_moments_of_bitsandbytes_are_decoded(projector, tmp_path):
    param = torch.nn.Parameter(torch.randn(RANK + 1, 300))
    held = saved(projector, param)
    state, table = held["state"][0], torch.linspace(-1, 1, 256)
    del state["exp_avg"], state["exp_avg_sq"]
    for number in "12":
        largest = torch.tensor([2.0, 3.0, 0.5, 4.0])  # of 900 numbers in blocks of 256
        state |= {f"state{number}": torch.randint(256, (RANK, 300), dtype=torch.uint8), f"absmax{number}": largest}
        state[f"qmap{number}"] = table.abs() if number == "2" else table
    torch.save(held, tmp_path / "o.pt")
    optimizer = lrk.GaLoreAdamW([dict(params=[param], rank=RANK, update_proj_gap=GAP)], lr=2e-2)
    with pytest.warns(UserWarning, match="scale"):
        load_checkpoint(optimizer, tmp_path / "o.pt")
    codes = state["state1"].flatten().long()
    blocks = torch.arange(900) // 256
    expected = (table[codes] * largest[blocks]).view(RANK, 300)
    assert torch.equal(optimizer.state[param]["exp_avg"], expected)


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_file_does_not_run(projector, tmp_path):
    param = parameters()[0]
    held = saved(projector, param)
    held["state"][0]["extra"] = Command(f"touch {tmp_path}/ran")
    torch.save(held, tmp_path / "o.pt")
    optimizer = lrk.GaLoreAdamW([dict(params=[param], rank=RANK)], lr=1e-3)
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(optimizer, tmp_path / "o.pt")
    assert not (tmp_path / "ran").exists() and not optimizer.state


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda held: held["param_groups"][0].update(correct_bias=False), "correct_bias=False"),
        (lambda held: held["param_groups"][0]["params"].append(1), r"groups have \[2\] parameters and the optimizer's \[1\]"),
        (lambda held: held["state"][0].pop("projector"), "no projector with one basis for group 0, parameter 0"),
        (lambda held: held.pop("param_groups"), "holds no state_dict"),
        (lambda held: setattr(held["state"][0]["projector"], "ortho_matrix", torch.ones(4, RANK)), "basis is"),
    ],
)
def test_what_does_not_fit_is_refused(projector, tmp_path, change, words):
    param = parameters()[0]
    held = saved(projector, param)
    change(held)
    torch.save(held, tmp_path / "o.pt")
    optimizer = lrk.GaLoreAdamW([dict(params=[param], rank=RANK)], lr=1e-3)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(optimizer, tmp_path / "o.pt")
    assert not optimizer.state


def test_a_plain_load_names_the_way(projector):
    param = parameters()[0]
    optimizer = lrk.GaLoreAdamW([dict(params=[param], rank=RANK)], lr=1e-3)
    with pytest.raises(ValueError, match="load_checkpoint takes those of galore-torch"):
        optimizer.load_state_dict(saved(projector, param))
    assert PROJECTOR.endswith("GaLoreProjector")
