"""State: dtypes, files, resuming to the bit, copying, pickling, and checkpoints that do not fit."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import build, same_bits, through_a_file, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_kernels as lrk
from lowrank_kernels.subspaces import SELECTIONS


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save_at", [1, 6, 8])  # in the first period, in a later one, just before a refresh (gap 4)
def test_resume_is_bit_identical(selection, dtype, save_at):
    straight, optimizer = build(dtype, selection=selection)
    losses = train(straight, optimizer, 13)

    stopped, optimizer_before = build(dtype, selection=selection)
    train(stopped, optimizer_before, save_at)
    file = through_a_file({"model": stopped.state_dict(), "optimizer": optimizer_before.state_dict()})

    resumed, optimizer_after = build(dtype, selection=selection)
    resumed.load_state_dict(file["model"])
    optimizer_after.load_state_dict(file["optimizer"])
    assert train(resumed, optimizer_after, 13 - save_at, start=save_at) == losses[save_at:]
    assert same_bits(straight.state_dict(), resumed.state_dict())
    assert same_bits(optimizer.state_dict(), optimizer_after.state_dict())


CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from models import build, train
model, optimizer = build(torch.bfloat16)
file = torch.load(sys.argv[2], weights_only=True)
model.load_state_dict(file["model"]); optimizer.load_state_dict(file["optimizer"])
train(model, optimizer, 6, start=6)
torch.save(model.state_dict(), sys.argv[3])
"""


def test_resume_in_another_process_is_bit_identical(tmp_path):
    model, optimizer = build(torch.bfloat16)
    train(model, optimizer, 6)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(model, optimizer, 6, start=6)
    arguments = [str(Path(__file__).parent), str(tmp_path / "checkpoint.pt"), str(tmp_path / "end.pt")]
    program = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n{CHILD}"
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    assert same_bits(dict(model.state_dict()), dict(torch.load(tmp_path / "end.pt", weights_only=True)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_moments_keep_their_dtype_also_after_loading(dtype):
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    parameter = nn.Parameter(torch.randn(12, 20).to(dtype))

    def optimizer_of():
        return lrk.LowRankAdamW([{"params": [parameter], "rank": 4}])

    optimizer = optimizer_of()
    parameter.grad = torch.randn(12, 20).to(dtype)
    optimizer.step()
    loaded = optimizer_of()
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for state in (optimizer.state[parameter], loaded.state[parameter]):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == state_dtype
        assert state["basis"].dtype == dtype
        assert state["step"].dtype == torch.float32 and state["step"].shape == () and type(state["refreshed_at"]) is int
    assert same_bits(optimizer.state_dict(), loaded.state_dict())


def test_dense_states_of_half_precision_are_torchs():
    parameter = nn.Parameter(torch.randn(12).bfloat16())
    optimizer = lrk.LowRankAdamW([parameter])
    parameter.grad = torch.randn(12).bfloat16()
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["exp_avg"].dtype == torch.bfloat16 and state["step"].dtype == torch.float32


def test_loading_shares_no_memory():
    model, optimizer = build()
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    _, other = build()
    other.load_state_dict(saved)
    assert same_bits(saved, before)
    train(model, optimizer, 3, start=2)
    assert same_bits(other.state_dict(), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_deepcopy_and_pickle(duplicate):
    model, optimizer = build()
    train(model, optimizer, 5)
    other_model, other_optimizer = duplicate((model, optimizer))
    assert train(model, optimizer, 6, start=5) == train(other_model, other_optimizer, 6, start=5)
    assert same_bits(model.state_dict(), other_model.state_dict())


def test_state_holds_tensors_and_numbers_only():
    model, optimizer = build()
    train(model, optimizer, 2)
    for state in optimizer.state_dict()["state"].values():
        assert all(isinstance(value, (torch.Tensor, int, float)) for value in state.values())


def test_a_checkpoints_bases_lie_by_rows():
    """So that a process may broadcast their memory to one that reads it by rows."""
    model, optimizer = build(torch.float32)
    train(model, optimizer, 2)
    held = [state["basis"] for state in optimizer.state.values() if "basis" in state]
    saved = [state["basis"] for state in optimizer.state_dict()["state"].values() if "basis" in state]
    assert all(map(torch.equal, held, saved)) and held
    assert all(basis.is_contiguous() for basis in saved)


def test_state_bytes_are_the_formula():
    model, optimizer = build(torch.bfloat16)
    train(model, optimizer, 1)
    for parameter in (model.up.weight, model.layers[0].weight, model.down.weight):
        m, n = sorted(parameter.shape)
        state = optimizer.state[parameter]
        tensors = [value for key, value in state.items() if isinstance(value, torch.Tensor) and key != "step"]
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 8 * 6 * n + 2 * m * 6


def test_load_hooks_see_and_replace_the_dict():
    model, optimizer = build()
    train(model, optimizer, 3)
    _, other = build()
    seen = []

    def replace(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][1]["lr"] = 0.125
        return state_dict

    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_post_hook(lambda loaded: seen.append(loaded.state[loaded.param_groups[1]["params"][0]]["exp_avg"].dtype))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[1]["lr"] == 0.125 and seen == [torch.float32]
    assert len(other._optimizer_load_state_dict_pre_hooks) == len(other._optimizer_load_state_dict_post_hooks) == 1


def test_checkpoint_older_than_a_key_gets_its_default():
    model, optimizer = build()
    train(model, optimizer, 2)
    for key, default in (("power_iters", 1), ("seed", 0), ("proj_type", "std")):
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["param_groups"][1][key]
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[1][key] == default
    train(model, optimizer, 3, start=2)


def test_checkpoint_with_an_empty_state():
    """Reading optimizer.state[p] of a parameter that never had a gradient leaves an empty entry behind."""
    model, optimizer = build()
    optimizer.state[model.up.weight]
    _, other = build()
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    train(model, other, 2)


def test_a_named_class_refuses_the_other_ones_checkpoint():
    saved = build(optimizer=lrk.I3SAdamW)[1].state_dict()
    with pytest.raises(ValueError, match="selection is 'importance' but this optimizer's is 'dominant'"):
        build(optimizer=lrk.GaLoreAdamW)[1].load_state_dict(saved)


@pytest.mark.parametrize("key, value, error", [("svd", "exactt", ValueError), ("update_proj_gap", 0, ValueError), ("lr", -1.0, ValueError)])
def test_values_changed_to_wrong_ones_are_refused_before_anything_moves(key, value, error):
    model, optimizer = build()
    train(model, optimizer, 2)
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[1][key] = value
    with pytest.raises(error, match=f"{key} must be"):
        train(model, optimizer, 1)
    assert same_bits(before, model.state_dict())


def test_checkpoint_of_torch_adamw_is_refused():
    model, optimizer = build()
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="group 1 is low-rank here but dense in the checkpoint"):
        optimizer.load_state_dict(adamw.state_dict())
    assert same_bits(optimizer.state_dict(), before)


def test_checkpoint_of_another_model_is_refused():
    small, wide = (lrk.LowRankAdamW([{"params": [nn.Parameter(torch.randn(10, columns))], "rank": 4}]) for columns in (20, 30))
    for optimizer in (small, wide):
        parameter = optimizer.param_groups[0]["params"][0]
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    with pytest.raises(ValueError, match=r"exp_avg is \(4, 20\), expected \(4, 30\) \(group 0, parameter 0 of shape \(10, 30\)\)"):
        wide.load_state_dict(small.state_dict())
    broken = small.state_dict()
    broken["state"][0] = {key: value for key, value in broken["state"][0].items() if key != "basis"}
    with pytest.raises(ValueError, match="basis is missing"):
        small.load_state_dict(broken)


def test_changed_rank_after_steps_is_an_error_that_changes_nothing():
    model, optimizer = build()
    train(model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.param_groups[1]["rank"] = 5
    with pytest.raises(ValueError, match="cannot change after the first step"):
        train(model, optimizer, 1)
    optimizer.param_groups[1]["rank"] = 6
    assert same_bits(before, (model.state_dict(), optimizer.state_dict()))


def test_moments_of_any_strides_go_on():
    (model, optimizer), (twin, other) = build(), build()
    train(model, optimizer, 3)
    train(twin, other, 3)
    saved = copy.deepcopy(other.state_dict())
    for state in saved["state"].values():
        state |= {key: state[key].mT.contiguous().mT for key in ("exp_avg", "exp_avg_sq") if state[key].dim() == 2}
    other.load_state_dict(saved)
    assert train(model, optimizer, 3, start=3) == train(twin, other, 3, start=3)
    assert same_bits(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("stepped", [1, 3])
def test_a_state_that_was_put_in_the_place_of_another_is_used(stepped):
    """Of the same shapes, dtypes and count, as a user's own way of loading leaves it."""
    model, optimizer = build(update_proj_gap=100)
    train(model, optimizer, stepped)
    twin, other = copy.deepcopy((model, optimizer))
    for each in (optimizer, other):
        parameter = each.param_groups[1]["params"][1]
        doubled = {key: value * 2 if key == "exp_avg" else value for key, value in each.state[parameter].items()}
        if each is optimizer:
            each.state[parameter] = doubled
        else:
            each.state[parameter]["exp_avg"].mul_(2)
    train(model, optimizer, 2, start=stepped)
    train(twin, other, 2, start=stepped)
    assert same_bits(model.state_dict(), twin.state_dict()) and same_bits(optimizer.state_dict(), other.state_dict())


def test_a_dispatch_mode_sees_the_step():
    class Seen(TorchDispatchMode):
        names: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(func.name())
            return func(*args, **(kwargs or {}))

    model, optimizer = build()
    train(model, optimizer, 1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with Seen():
        optimizer.step()
    assert "aten::addcmul_" in Seen.names, "V of the rule in plain PyTorch"


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("save_at", [1, 3, 4, 6])
def test_a_checkpoint_of_before_groups_counted_goes_on(save_at, stagger):
    """There `step` was an int, and nothing said when a basis was chosen: the parameter's own count did."""
    straight, stopped, resumed = (build(stagger=stagger) for _ in range(3))
    train(*straight, 11)
    train(*stopped, save_at)
    older = through_a_file(stopped[1].state_dict())
    for group in older["param_groups"]:
        for key in ("calls", "lift", "moments"):
            group.pop(key, None)
    for state in older["state"].values():
        if state.pop("refreshed_at", None) is not None:
            state["step"] = int(state["step"])
    resumed[0].load_state_dict(stopped[0].state_dict())
    resumed[1].load_state_dict(older)
    train(*resumed, 11 - save_at, start=save_at)
    assert same_bits(straight[0].state_dict(), resumed[0].state_dict())
    assert same_bits(straight[1].state_dict(), resumed[1].state_dict())


def test_a_checkpoint_of_before_whose_only_step_was_skipped_starts_anew():
    """It has a basis that no gradient chose, at step 0."""
    low_rank = torch.randn(8, 2) @ torch.randn(2, 12)
    parameter = nn.Parameter(torch.ones(8, 12))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 2, "selection": "dominant"}])
    parameter.grad = torch.randn(8, 12)
    optimizer.step()
    older = optimizer.state_dict()
    del older["param_groups"][0]["calls"], older["state"][0]["refreshed_at"]
    older["state"][0] |= {"step": 0, "exp_avg": torch.zeros(2, 12), "exp_avg_sq": torch.zeros(2, 12)}
    optimizer.load_state_dict(older)
    parameter.grad = low_rank
    optimizer.step()
    basis = optimizer.state[parameter]["basis"]
    assert torch.allclose(basis @ (basis.mT @ low_rank), low_rank, atol=1e-4)


def test_a_group_of_which_a_process_holds_nothing_counts_along():
    """ZeroRedundancyOptimizer's: the count that the first process saves is the one that all load."""
    optimizer = lrk.LowRankAdamW([{"params": [nn.Parameter(torch.ones(3))]}, {"params": [], "rank": 2}])
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[1]["calls"] == 3
