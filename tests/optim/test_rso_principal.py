"""distribution="principal": the directions of a layer's inputs in P, what is kept of them, and what V is in
the next ones."""

import copy
import math
import pickle

import pytest
import torch
from optim.models import batch, same_bits, through_a_file, train
from optim.rso_runs import Shared, build, converted, everything, matrix, random_gradients, resumed_from
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.nn.sketch import InputSketch, principal_directions

OPTIONS = {"distribution": "principal", "inner_steps": 4}


def inputs_of_rank(count, rank, width, seed=0):
    """Rows in `rank` directions, of sizes 1, 1/2, 1/4, …, and the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, rank, generator=generator))[0]
    sizes = 0.5 ** torch.arange(rank)
    return (torch.randn(count, rank, generator=generator) * sizes) @ directions.mT, directions


def one_layer(rank=8, width=32, **options):
    torch.manual_seed(0)
    layer = lrk.SubspaceLinear(width, 16, rank=rank, distribution="principal", bias=False, **options)
    return layer, lrk.RSOAdamW(layer.parameters(), lr=1e-3, inner_steps=3)


def step(layer, optimizer, x):
    layer(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("principal_rank", [None, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_p_has_the_inputs_directions_and_random_ones(principal_rank, dtype):
    layer, optimizer = one_layer(dtype=dtype, principal_rank=principal_rank)
    taken = principal_rank or 4
    x, directions = inputs_of_rank(512, 8, 32)
    unit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float64: 1e-5}[dtype]
    first = matrix(layer).double()  # before any input: sqrt(in/r) times orthonormal columns
    assert torch.allclose(first.mT @ first, 4.0 * torch.eye(8).double(), atol=8 * unit)
    for outer_step in range(3):
        for _ in range(3):
            step(layer, optimizer, x.to(dtype))
        p = matrix(layer).double()
        gain = math.sqrt((32 - taken) / (8 - taken))
        expected = torch.diag(torch.tensor([1.0] * taken + [gain**2] * (8 - taken))).double()
        assert torch.allclose(p.mT @ p, expected, atol=16 * unit * gain)
        found = lrk.subspace_overlap(p[:, :taken], directions[:, :taken].double())
        assert found > 0.95, outer_step
    assert layer.subspace.principal.shape == (32, taken) and layer.subspace.sketch is None


def test_the_expectation_of_p_pt_is_the_identity():
    layer, optimizer = one_layer()
    x, _ = inputs_of_rank(512, 8, 32)
    total = torch.zeros(32, 32)
    for number in range(300):
        layer.subspace.move_to(number + 1, torch.linalg.qr(x.mT @ x)[0][:, :4])
        total += matrix(layer) @ matrix(layer).mT / 300
    assert abs(total.trace() - 32) < 1e-3  # 4, and 28 = 7·4 of the random part, in each draw
    assert (total - torch.eye(32)).square().mean().sqrt() < 0.1


def test_a_clipping_norm_is_that_of_the_whole_gradient_in_the_mean():
    """‖Pᵀ·dWᵀ‖² against ‖dW‖², over redraws with Q held."""
    layer, optimizer = one_layer()
    x, _ = inputs_of_rank(512, 8, 32)
    grad = torch.randn(32, 16)
    squares = []
    for number in range(400):
        layer.subspace.move_to(number + 1, torch.linalg.qr(x.mT @ x)[0][:, :4])
        squares.append((matrix(layer).mT @ grad).square().sum())
    squares = torch.stack(squares)
    assert abs(squares.mean() / grad.square().sum() - 1) < 4 * squares.std() / 20 / grad.square().sum()


def test_only_the_last_step_of_an_outer_step_is_watched():
    layer, optimizer = one_layer()
    early, _ = inputs_of_rank(256, 4, 32, seed=1)
    late, directions = inputs_of_rank(256, 4, 32, seed=2)
    for x in (early, early, late):
        assert (layer.subspace.sketch is not None) == (x is late)
        step(layer, optimizer, x)
    assert lrk.subspace_overlap(matrix(layer)[:, :4], directions) > 0.99
    for _ in range(2):
        step(layer, optimizer, early)
    with torch.no_grad():  # nor are inputs outside of training
        layer(early)
    assert not layer.subspace.sketch.columns.any()


def test_micro_batches_and_shared_inputs_count_once():
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 8), "k_proj": nn.Linear(32, 8)})
    lrk.to_subspace(model, rank=8, target_modules=["q_proj", "k_proj"], distribution="principal")
    optimizer = lrk.RSOAdamW(model.parameters(), inner_steps=1)
    subspace = model["q_proj"].subspace
    pieces = [torch.randn(20, 32) for _ in range(3)]
    for x in pieces:
        (model["q_proj"](x) + model["k_proj"](x)).sum().backward()
    expected = sum(x.mT @ (x @ subspace.sketch.omega) for x in pieces)
    assert torch.allclose(subspace.sketch.columns, expected, rtol=1e-4, atol=1e-3)
    optimizer.step()
    assert subspace.principal is optimizer.state[model["q_proj"].coordinates]["principal"]
    assert subspace.principal is optimizer.state[model["k_proj"].coordinates]["principal"]
    assert subspace.sketch is not None  # each step is the last one of its outer step


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 0.0])
def test_inputs_that_say_nothing_leave_the_directions(poison):
    layer, optimizer = one_layer()
    x, _ = inputs_of_rank(256, 4, 32)
    for _ in range(3):
        step(layer, optimizer, x)
    before = layer.subspace.principal
    for number in range(3):
        if number == 2:
            layer(x * poison)
        random_gradients(layer, number)
        optimizer.step()
    assert optimizer.param_groups[0]["outer_step"] == 2 and layer.subspace.principal is before


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e15])
def test_the_sketch_finds_directions_of_inputs_of_any_size(size):
    x, directions = inputs_of_rank(300, 6, 40)
    sketch = InputSketch(40, 3, 5, torch.device("cpu"))
    sketch.add(size * x.view(3, 100, 40))
    found = principal_directions(sketch, 3)
    assert torch.allclose(found.mT @ found, torch.eye(3), atol=1e-5)
    assert lrk.subspace_overlap(found, directions[:, :3]) > 0.98
    assert (found[:, 0] @ directions[:, 0]).abs() > 0.9  # the largest first


@pytest.mark.parametrize("net", [None, Shared])
@pytest.mark.parametrize("moments", ["reset", "carry"])
@pytest.mark.parametrize("save_at", [2, 3, 4, 7, 9])  # before the watched step, in it, after the redraw, and later
def test_resume_is_bit_identical(net, moments, save_at):
    options = OPTIONS | {"moments": moments} | ({"net": net} if net else {})
    straight, optimizer = build(**options)
    losses = train(straight, optimizer, 14)
    stopped, before = build(**options)
    train(stopped, before, save_at)
    resumed, after = resumed_from(stopped, before, **options)
    assert train(resumed, after, 14 - save_at, start=save_at) == losses[save_at:]
    assert same_bits(everything(resumed, after), everything(straight, optimizer))


def test_a_layer_without_a_state_gets_no_directions_that_no_checkpoint_would_hold():
    """A scaler skips the whole first outer step; or a layer is used, and gets no gradient."""
    options = OPTIONS | {"inner_steps": 2}
    model, optimizer = build(**options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(2):
        x, y = batch(number)
        (scaler.scale((model(x) - y).square().mean()) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["outer_step"] == 1 and model.up.subspace.principal is None
    resumed, after = resumed_from(model, optimizer, **options)
    train(model, optimizer, 5, start=2)
    train(resumed, after, 5, start=2)
    assert same_bits(everything(resumed, after), everything(model, optimizer))

    model, optimizer = build(**options)
    for number in range(3):
        x, y = batch(number)
        (model(x) - y).square().mean().backward()
        model.down.coordinates.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert model.down.subspace.principal is None and model.up.subspace.principal is not None
    resumed, after = resumed_from(model, optimizer, **options)
    train(model, optimizer, 5, start=3)
    train(resumed, after, 5, start=3)
    assert same_bits(everything(resumed, after), everything(model, optimizer))


def test_an_early_checkpoint_and_a_new_optimizer_forget_later_directions():
    fresh, first = build(**OPTIONS)
    start = copy.deepcopy((fresh.state_dict(), first.state_dict()))
    expected = matrix(fresh.up).clone()
    train(fresh, first, 6)
    assert not torch.equal(matrix(fresh.up), expected)
    fresh.load_state_dict(start[0])
    first.load_state_dict(start[1])
    assert fresh.up.subspace.principal is None and torch.equal(matrix(fresh.up), expected)
    train(fresh, first, 6)
    lrk.RSOAdamW(fresh.parameters(), inner_steps=4)
    assert fresh.up.subspace.principal is None and torch.equal(matrix(fresh.up), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("inner_steps", [1, 4])
@pytest.mark.parametrize("steps", [2, 3, 4, 7])
def test_copies_of_a_run_go_on_alike(steps, inner_steps, duplicate):
    pair = build(**(OPTIONS | {"inner_steps": inner_steps}))
    train(*pair, steps)
    twin = duplicate(pair)
    train(*pair, 6, start=steps)
    train(*twin, 6, start=steps)
    assert same_bits(everything(*twin), everything(*pair))


def test_a_longer_inner_loop_begins_its_sketch_later():
    layer, optimizer = one_layer()
    early, _ = inputs_of_rank(256, 4, 32, seed=1)
    late, directions = inputs_of_rank(256, 4, 32, seed=2)
    for _ in range(2):
        step(layer, optimizer, early)
    optimizer.param_groups[0]["inner_steps"] = 5
    for number in range(3):
        step(layer, optimizer, late if number == 2 else early)
    assert optimizer.param_groups[0]["outer_step"] == 1
    assert lrk.subspace_overlap(matrix(layer)[:, :4], directions) > 0.99


@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 3, 5, 32)], ids=str)
def test_inputs_of_any_shape(shape):
    layer, optimizer = one_layer()
    for _ in range(4):
        step(layer, optimizer, torch.randn(shape))
    assert layer.subspace.principal is not None


def test_a_sketch_goes_along_to_another_device():
    layer, _ = one_layer()
    layer.subspace.watch_inputs(torch.device("cpu"))
    layer.to("meta")
    assert layer.subspace.sketch.omega.device.type == "meta"


def test_into_a_run_that_had_other_directions():
    one, first = build(**OPTIONS)
    train(one, first, 6)
    file = through_a_file({"model": one.state_dict(), "optimizer": first.state_dict()})
    train(one, first, 5, start=6)
    other, second = build(**OPTIONS)
    train(other, second, 11, start=50)
    other.load_state_dict(file["model"])
    second.load_state_dict(file["optimizer"])
    train(other, second, 5, start=6)
    assert same_bits(everything(other, second), everything(one, first))


def test_copies_keep_their_directions():
    model, optimizer = build(**OPTIONS)
    train(model, optimizer, 6)
    twin = copy.deepcopy(model)
    for layer, other in zip(converted(model).values(), converted(twin).values(), strict=True):
        assert torch.equal(matrix(layer), matrix(other))


def test_v_of_the_next_directions():
    """The turned V against its formula, element by element."""
    layer, optimizer = one_layer()
    optimizer.param_groups[0]["moments"] = "carry"
    x, _ = inputs_of_rank(256, 4, 32)
    for _ in range(3):
        step(layer, optimizer, x)
    state = optimizer.state[layer.coordinates]
    assert state["step"] == state["carried"] == 0  # the first directions: V starts anew
    for _ in range(2):
        step(layer, optimizer, x)
    layer.coordinates.grad = torch.randn(8, 16)
    old_v, old_q = state["exp_avg_sq"].double().clone(), state["principal"].double()
    old_v = 0.999 * old_v + 0.001 * layer.coordinates.grad.double().square()
    fresh, _ = inputs_of_rank(256, 4, 32, seed=3)
    layer(0.5 * x + fresh)
    optimizer.step()
    turn = layer.subspace.principal.double().mT @ old_q
    mean = old_v[4:].mean(0)
    for i in range(4):
        outside = 1 - sum(turn[i, j] ** 2 for j in range(4))
        expected = sum(turn[i, j] ** 2 * old_v[j] for j in range(4)) + outside * mean / 7
        assert torch.allclose(state["exp_avg_sq"][i].double(), expected, rtol=1e-4)
        assert torch.allclose(state["exp_avg_sq"][4 + i].double(), mean, rtol=1e-4)
    assert state["carried"] == 3 and state["since"] == 0 and not state["exp_avg"].any()


def test_refusals():
    with pytest.raises(ValueError, match="principal_rank must be an int from 1 to rank − 1 = 3, got 4"):
        lrk.SubspaceLinear(8, 8, rank=4, distribution="principal", principal_rank=4)
    with pytest.raises(ValueError, match="principal_rank must be an int from 1 to rank − 1 = 0, got 1"):
        lrk.SubspaceLinear(8, 8, rank=1, distribution="principal")
    with pytest.raises(ValueError, match="principal_rank is for distribution='principal', got 2 with 'haar'"):
        lrk.SubspaceLinear(8, 8, rank=4, distribution="haar", principal_rank=2)
    model, optimizer = build(**OPTIONS)
    train(model, optimizer, 6)
    file = optimizer.state_dict()
    other, second = build(principal_rank=2, **OPTIONS)
    with pytest.raises(ValueError, match=r"the checkpoint's principal directions are \(12, 3\), expected \(12, 2\)"):
        second.load_state_dict(file)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled(backend):
    model, optimizer = build(**OPTIONS)
    plain, plain_optimizer = build(**OPTIONS)
    compiled = torch.compile(model, backend=backend)
    for number in range(9):
        x, y = batch(number)
        for each, one in ((compiled, optimizer), (plain, plain_optimizer)):
            (each(x) - y).square().mean().backward()
            one.step()
            one.zero_grad()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for layer in converted(model).values():
        assert layer.subspace.principal is not None


def test_training():
    model, optimizer = build(weight_decay=0.0, **(OPTIONS | {"inner_steps": 10, "moments": "carry"}))
    x, y = batch(0)
    losses = []
    for _ in range(100):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
