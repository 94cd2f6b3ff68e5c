"""Nothing is kept between steps: whatever a user changes is seen at the next one."""

import copy
import gc
import weakref

import pytest
import torch
from models import batch, build, same_bits, train
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels import backends
from lowrank_kernels.optim import optimizer as optimizer_module


def halve(model, optimizer):
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


def part_the_groups(model, optimizer):
    """The dense group's rate alone: what was one set of values in two low-rank groups must not stay so."""
    optimizer.param_groups[-1]["lr"] *= 0.25


def shorter_gap(model, optimizer):
    optimizer.param_groups[1]["update_proj_gap"] = 2


def swap_data(model, optimizer):
    model.layers[0].weight.data = model.layers[0].weight.data.clone()


def swap_data_for_its_transpose(model, optimizer):
    weight = model.layers[0].weight
    weight.data = weight.data.t()


def new_moments(model, optimizer):
    optimizer.state[model.layers[1].weight]["exp_avg"] = torch.full((6, 40), 0.25)


def another_count(model, optimizer):
    optimizer.state[model.layers[1].weight]["step"] = torch.tensor(40.0)


def forget_one(model, optimizer):
    del optimizer.state[model.layers[1].weight]


def forget_all(model, optimizer):
    optimizer.state.clear()


def freeze(model, optimizer):
    model.layers[2].weight.requires_grad_(False)


def reload(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def add_group(model, optimizer):
    optimizer.add_param_group({"params": [model.head], "rank": 3, "update_proj_gap": 4, "weight_decay": 0.1})


def reverse_params(model, optimizer):
    optimizer.param_groups[1]["params"].reverse()


def clear_one(model, optimizer):
    optimizer.state[model.layers[1].weight].clear()


CHANGES = [
    halve, part_the_groups, shorter_gap, swap_data, swap_data_for_its_transpose, new_moments, another_count, forget_one, forget_all,
    freeze, reload, add_group, reverse_params, clear_one,
]  # fmt: skip


def run(change, capturable, forgetting):
    model, optimizer = build(capturable=capturable)
    model.head = nn.Parameter(torch.randn(10, 40))
    if change is part_the_groups:
        optimizer.add_param_group({"params": [model.head], "rank": 6, "update_proj_gap": 4, "weight_decay": 0.1})
    for step in range(9):
        if step == 6:
            change(model, optimizer)
        x, y = batch(step)
        (model(x) - y + 0.01 * model.head.mean()).square().mean().backward()
        if forgetting:
            optimizer._forget()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(change, capturable):
    kept, found_anew = (run(change, capturable, anew) for anew in (False, True))
    assert same_bits(kept, found_anew)


def test_gradients_are_let_go():
    model, optimizer = build()
    train(model, optimizer, 2)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradient = weakref.ref(model.up.weight.grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert gradient() is None


def test_a_sparse_gradient_is_refused_after_dense_ones_too():
    parameter = nn.Parameter(torch.randn(8, 6))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 2}])
    parameter.grad = torch.randn(8, 6)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    parameter.grad = torch.randn(8, 6).to_sparse()
    with pytest.raises(TypeError, match="the gradient is sparse"):
        optimizer.step()
    assert same_bits(before, optimizer.state_dict())


@pytest.mark.parametrize("key", ["basis", "exp_avg", "exp_avg_sq"])
def test_states_of_experts_whose_memory_is_swapped_are_followed(key):
    """As an offload and return does it: the tensor stays, what is beneath it is other memory."""
    torch.manual_seed(0)
    kept, anew = (nn.Parameter(torch.ones(3, 8, 12)) for _ in range(2))
    optimizers = [lrk.LowRankAdamW([{"params": [param], "rank": 2}]) for param in (kept, anew)]
    for number in range(5):
        kept.grad = torch.randn_like(kept)
        anew.grad = kept.grad.clone()
        for param, optimizer in zip((kept, anew), optimizers, strict=True):
            if number == 3:
                optimizer.state[param][key].data = optimizer.state[param][key].data.clone()
            if param is anew:
                optimizer._forget()
            optimizer.step()
    assert torch.equal(kept, anew) and same_bits(optimizers[0].state_dict(), optimizers[1].state_dict())


@pytest.mark.parametrize("bits", [32, 8])
def test_moments_of_another_size_are_refused_before_anything_is_written(bits):
    parameter = nn.Parameter(torch.randn(40, 12))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 4, "state_bits": bits}])
    parameter.grad = torch.randn(40, 12)
    optimizer.step()
    parameter.data = torch.cat([parameter.data, torch.randn(20, 12)])
    parameter.grad = torch.randn(60, 12)
    before = copy.deepcopy((parameter.data, optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"exp_avg must be \(4, 60\), got \(4, 40\).*; the state is of a parameter of another shape"):
        optimizer.step()
    assert torch.equal(before[0], parameter.data) and same_bits(before[1], optimizer.state_dict())


@pytest.mark.parametrize("count", [torch.tensor(8, dtype=torch.int64), 8])
def test_a_count_of_another_kind_is_taken(count):
    model, optimizer = build(capturable=True)
    train(model, optimizer, 3)
    for parameter in optimizer.param_groups[1]["params"]:
        optimizer.state[parameter]["step"] = count.clone() if isinstance(count, torch.Tensor) else count
    train(model, optimizer, 1, start=3)
    steps = [optimizer.state[parameter]["step"] for parameter in optimizer.param_groups[1]["params"]]
    assert all(step.dtype == torch.float32 and step.shape == () and step == 9 for step in steps)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_gradient_of_another_shape_is_refused(steps):
    """Rows cut off a parameter after its backward pass, in the same memory."""
    parameter = nn.Parameter(torch.randn(40, 12))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 4}])
    for _ in range(steps):
        parameter.grad = torch.randn(40, 12)
        optimizer.step()
    parameter.grad = torch.randn(40, 12)
    parameter.data = parameter.data[:20]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"the gradient is \(40, 12\) in group 0, parameter 0 of shape \(20, 12\)"):
        optimizer.step()
    assert same_bits(before, optimizer.state_dict())


def test_weights_of_other_strides_leave_their_bucket(monkeypatch):
    """Kernels are launched with one set of strides for all of a bucket."""
    model, optimizer = build()
    train(model, optimizer, 2)
    swap_data_for_its_transpose(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    strides = []
    step = backends.step
    monkeypatch.setattr(backends, "step", lambda bucket, hyper: strides.append([w.stride() for w in bucket.weights]) or step(bucket, hyper))
    optimizer.step()
    assert [(1, 40)] in strides and [(40, 1)] * 2 in strides and all(len(set(each)) == 1 for each in strides)


@pytest.mark.parametrize("bits, other", [(8, 32), (32, 8)])
def test_other_state_bits_are_refused_before_anything_is_written(bits, other):
    parameter = nn.Parameter(torch.randn(40, 12))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 4, "state_bits": bits}])
    parameter.grad = torch.randn(40, 12)
    optimizer.step()
    optimizer.param_groups[0]["state_bits"] = other
    before = copy.deepcopy((parameter.data, optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match=f"the state has {bits}-bit moments but state_bits={other}"):
        optimizer.step()
    assert same_bits(before, (parameter.data, optimizer.state_dict()["state"]))


@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, lambda moment: moment.mT.contiguous().mT], ids=["bf16", "columns"])
def test_moments_that_a_user_changed_are_brought_back(change):
    """Kernels read them as row-major fp32."""
    torch.manual_seed(0)
    plain, changed = (nn.Parameter(torch.ones(3, 8, 12)) for _ in range(2))
    optimizers = [lrk.LowRankAdamW([{"params": [param], "rank": 2}]) for param in (plain, changed)]
    for number in range(3):
        plain.grad = torch.randn_like(plain)
        changed.grad = plain.grad.clone()
        if number == 2:
            state = optimizers[1].state[changed]
            state["exp_avg"] = change(state["exp_avg"])
        for optimizer in optimizers:
            optimizer.step()
    state = optimizers[1].state[changed]
    assert state["exp_avg"].dtype == torch.float32 and state["exp_avg"].is_contiguous()
    assert torch.allclose(plain, changed, atol=1e-4)


def test_a_parameter_that_changes_its_group_goes_on_refreshing():
    """Its basis was chosen at a count that the new group has not reached yet."""
    first, second = (nn.Parameter(torch.ones(8, 12)) for _ in range(2))
    optimizer = lrk.LowRankAdamW([{"params": [first, second], "rank": 2, "update_proj_gap": 5, "selection": "random"}])

    def refreshes(steps):
        found, before = 0, optimizer.state.get(second, {}).get("basis")
        for _ in range(steps):
            before = None if before is None else before.clone()
            first.grad, second.grad = torch.randn(8, 12), torch.randn(8, 12)
            optimizer.step()
            found += before is None or not torch.equal(before, optimizer.state[second]["basis"])
            before = optimizer.state[second]["basis"]
        return found

    assert refreshes(37) == 8
    optimizer.param_groups[0]["params"] = [first]
    optimizer.add_param_group({"params": [second], "rank": 2, "update_proj_gap": 5, "selection": "random"})
    assert refreshes(43) == 9


def test_groups_that_are_taken_away_take_their_skips_along(monkeypatch):
    monkeypatch.setattr(optimizer_module, "HOST", ())
    params = [nn.Parameter(torch.ones(8, 12)) for _ in range(3)]
    optimizer = lrk.LowRankAdamW([{"params": [param], "rank": 2} for param in params])
    for step in range(4):
        for param in params:
            param.grad = torch.randn(8, 12)
        optimizer.found_inf = torch.tensor(float(step in (2, 3)))
        optimizer.step()
        if step == 2:
            del optimizer.param_groups[0], optimizer.state[params[0]]
    assert [group["calls"] for group in optimizer.state_dict()["param_groups"]] == [2, 2]


def test_16_bit_gradients_are_copied_one_bucket_at_a_time(monkeypatch):
    params = [nn.Parameter(torch.ones(8, 12 + number, dtype=torch.float16)) for number in range(4)]
    optimizer = lrk.LowRankAdamW([{"params": params, "rank": 2}])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    copies, alive = [], []
    step = backends.step

    def watch(bucket, hyper):
        copies.extend(map(weakref.ref, bucket.grads))
        alive.append(sum(copy() is not None for copy in copies))
        step(bucket, hyper)

    monkeypatch.setattr(backends, "step", watch)
    optimizer.step()
    assert alive == [1] * 4


def test_a_step_in_inference_mode_and_one_outside():
    parameter = nn.Parameter(torch.ones(8, 12))
    optimizer = lrk.LowRankAdamW([{"params": [parameter], "rank": 2, "update_proj_gap": 1}])
    parameter.grad = torch.randn(8, 12)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 2


def test_a_basis_that_lies_otherwise_than_its_bucket_is_brought_back():
    """Kernels read all bases of a bucket with the strides of the first one."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.ones(8, 12)) for _ in range(3)]
    optimizer = lrk.LowRankAdamW([{"params": params, "rank": 2}])
    for number in range(2):
        for param in params:
            param.grad = torch.randn(8, 12)
        if number == 1:
            states = [optimizer.state[param] for param in params]
            kept, before = states[0]["basis"], states[1]["basis"].clone()
            states[1]["basis"] = states[1]["basis"].mT.contiguous().mT.clone(memory_format=torch.contiguous_format)
            assert states[1]["basis"].stride() != kept.stride()
        optimizer.step()
    assert states[1]["basis"].stride() == kept.stride() and torch.equal(states[1]["basis"], before)
    assert states[0]["basis"] is kept, "a CUDA graph may hold its address"


def test_a_new_group_does_not_inherit_the_skips_of_one_that_is_gone(monkeypatch):
    """Its dict may lie where the other one lay."""
    monkeypatch.setattr(optimizer_module, "HOST", ())
    optimizer = lrk.LowRankAdamW([{"params": [nn.Parameter(torch.ones(3))]}])
    for _ in range(20):
        param = nn.Parameter(torch.ones(8, 12))
        optimizer.add_param_group({"params": [param], "rank": 2})
        for found_inf in (0.0, 1.0):
            param.grad, optimizer.found_inf = torch.randn(8, 12), torch.tensor(found_inf)
            optimizer.step()
        optimizer.found_inf = None
        del optimizer.state[param], optimizer.param_groups[1]
        fresh = nn.Parameter(torch.ones(8, 12))
        optimizer.add_param_group({"params": [fresh], "rank": 2})
        fresh.grad = torch.randn(8, 12)
        optimizer.step()
        assert optimizer.state_dict()["param_groups"][1]["calls"] == 1
        del optimizer.state[fresh], optimizer.param_groups[1]
