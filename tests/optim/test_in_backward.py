"""Gradients that are projected, or used up, while the backward pass runs."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from optim.models import METHODS, Net, batch, build, same_bits, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lrk
from lowrank_kernels.optim import refreshes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TAKES_GRADIENT = {"FiraAdamW", "FiraAdamW with I3S", "ApolloAdamW", "ApolloMiniAdamW"}
SETTINGS = [
    {},
    dict(dtype=torch.bfloat16, rounding="stochastic"),
    dict(dtype=torch.float64),
    dict(state_bits=8),
    dict(stagger=True, selection="importance"),
    dict(moments="rotate", proj_type="left"),
    dict(selection="random", proj_type="right"),
    dict(refresh_threshold=0.3, diagnostics=True),
]
galore = functools.partial(build, optimizer=lrk.GaLoreAdamW)


def projected(optimizer):
    return [param for group in optimizer.param_groups if "rank" in group for param in group["params"]]


def both_ways(make, steps=9, **arguments):
    """(model, optimizer) after the dense way, and after in_backward."""
    model, optimizer = make()
    train(model, optimizer, steps)
    other, other_optimizer = make()
    lrk.in_backward(other, other_optimizer, **arguments)
    train(other, other_optimizer, steps)
    return (model, optimizer), (other, other_optimizer)


def assert_same(one, other):
    assert same_bits(one[0].state_dict(), other[0].state_dict())
    assert same_bits(one[1].state_dict(), other[1].state_dict())


# Equal to the dense way.


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_dense_way_bit_for_bit(name):
    if name not in TAKES_GRADIENT:
        assert_same(*both_ways(METHODS[name]))
    assert_same(*both_ways(METHODS[name], update="immediately"))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: " ".join(map(str, each)) or "default")
@pytest.mark.parametrize("update", ["deferred", "immediately"])
def test_equals_the_dense_way_under_every_setting(settings, update):
    assert_same(*both_ways(functools.partial(build, **settings), update=update))


class Odd(nn.Module):
    """Experts, a convolution, a matrix that is used twice, and one that is not used in every step."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 12, 8) / 4)
        self.conv = nn.Conv2d(2, 6, 3, bias=False)
        self.twice = nn.Parameter(torch.randn(8, 8) / 4)
        self.at_times = nn.Parameter(torch.randn(8, 10) / 4)

    def forward(self, x, with_all):
        images = self.conv(x.view(-1, 2, 4, 3)).flatten(1)
        x = torch.tanh(x[:, :12] @ self.experts[0] + images @ self.experts[1]) @ self.twice
        x = torch.tanh(x) @ self.twice
        return x @ self.at_times if with_all else x


@pytest.mark.parametrize("update", ["deferred", "immediately"])
def test_experts_convolutions_shared_and_missing_gradients(update):
    def run(inside):
        torch.manual_seed(0)
        model = Odd()
        optimizer = lrk.I3SAdamW([{"params": list(model.parameters()), "rank": 3, "update_proj_gap": 3}], lr=1e-2)
        if inside:
            lrk.in_backward(model, optimizer, update=update)
        for step in range(8):
            x = torch.randn(5, 24, generator=torch.Generator().manual_seed(step))
            model(x, step not in (2, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    assert_same(run(False), run(True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_is_one_large_batch_within_rounding(dtype):
    """Of R after one step's micro-batches, each element; u = 2⁻²⁴, and 2⁻⁸ a sum more in bf16."""
    pieces = 4

    def gradients(inside):
        model, optimizer = galore()
        train(model, optimizer, 1)  # both have the same bases then
        if inside:
            lrk.in_backward(model, optimizer, accumulate=pieces, dtype=dtype)
        x, y = batch(1)
        each = []
        for piece, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            ((model(piece) - target).square().mean() / pieces).backward()
            each.append([None if p.grad is None else p.grad.clone() for p in projected(optimizer)])
        return model, optimizer, each

    model, optimizer, sums = gradients(False)
    same_model, same_optimizer, _ = gradients(True)
    assert same_bits(model.state_dict(), same_model.state_dict())
    for index, (param, twin) in enumerate(zip(projected(optimizer), projected(same_optimizer), strict=True)):
        basis, held = optimizer.state[param]["basis"].double(), same_optimizer._in_backward.projected[twin]
        assert held.dtype == dtype and twin.grad is None
        totals = [each[index].double() for each in sums]
        parts = [totals[0], *(b - a for a, b in zip(totals, totals[1:], strict=False))]
        right = param.shape[0] >= param.shape[1]
        orient = (lambda g: g.mT) if right else (lambda g: g)
        m = basis.shape[0]
        size = sum(basis.mT.abs() @ orient(part).abs() for part in parts)
        bound = 2 * (pieces + m) * 2**-24 * size
        if dtype == torch.bfloat16:
            bound = bound + pieces * 2**-8 * sum((basis.mT @ orient(part)).abs() for part in parts)
        assert ((basis.mT @ orient(totals[-1]) - held.double()).abs() <= bound).all()


def test_a_due_basis_comes_from_the_first_micro_batch():
    model, optimizer = galore(update_proj_gap=1)
    twin, twin_optimizer = copy.deepcopy(model), None
    twin_optimizer = lrk.GaLoreAdamW(lrk.param_groups(twin, rank=6, update_proj_gap=1), lr=1e-2)
    lrk.in_backward(model, optimizer, accumulate=2)
    x, y = batch(0)
    (twin(x) - y).square().mean().backward()
    twin_optimizer.step()
    (model(x) - y).square().mean().backward()
    model(batch(1)[0]).square().mean().backward()
    optimizer.step()
    for param, other in zip(projected(optimizer), projected(twin_optimizer), strict=True):
        assert torch.equal(optimizer.state[param]["basis"], twin_optimizer.state[other]["basis"])


def test_training_with_accumulation_follows_the_dense_way():
    """With random bases, which do not depend on the gradient; in fp64, where rounding is out of the way."""

    def run(inside):
        model, optimizer = build(dtype=torch.float64, selection="random")
        if inside:
            lrk.in_backward(model, optimizer, accumulate=4)
        for step in range(10):
            x, y = batch(step, torch.float64)
            for piece, target in zip(x.chunk(4), y.chunk(4), strict=True):
                ((model(piece) - target).square().mean() / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    for one, other in zip(run(False).parameters(), run(True).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["LowRankAdamW", "LowRankAdafactor", "FiraAdamW", "ApolloAdamW"])
def test_by_the_kernels_it_follows_the_dense_way(name, dtype):
    """With random bases, which do not depend on the gradient. One matrix at a time, and by way of R in
    memory, sums may be in another order."""
    options = dict(selection="random", dtype=dtype, device=DEVICE)
    ways = ["immediately"] if name in TAKES_GRADIENT else ["immediately", "deferred"]
    for update in ways:
        one, other = both_ways(functools.partial(METHODS[name], **options), steps=5, update=update)
        for (key, a), b in zip(one[0].named_parameters(), other[0].parameters(), strict=True):
            # Adam's first steps divide by |R|: an element near zero may move by 2·lr either way.
            assert (a - b).abs().mean() < 1e-3, (update, key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be synchronised with")
@pytest.mark.parametrize("update", ["deferred", "immediately"])
def test_nothing_waits_for_the_gpu_between_refreshes(update):
    model, optimizer = galore(device="cuda", update_proj_gap=1000)
    lrk.in_backward(model, optimizer, update=update)
    train(model, optimizer, 3)
    x, y = batch(3, device="cuda")
    loss = (model(x) - y).square().mean()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
        if update == "deferred":
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Memory.


@pytest.mark.parametrize("update", ["deferred", "immediately"])
def test_no_full_gradient_outlives_its_hook(update):
    model, optimizer = galore()
    matrices, alive, most = projected(optimizer), [], []

    def probe(param):
        most.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(param.grad.untyped_storage()))

    for param in matrices:
        param.register_post_accumulate_grad_hook(probe)
    lrk.in_backward(model, optimizer, accumulate=2 if update == "deferred" else 1, update=update)
    for step in range(5):
        for micro in range(2 if update == "deferred" else 1):
            x, y = batch(10 * step + micro)
            (model(x) - y).square().mean().backward()
            assert not any(reference() is not None for reference in alive)
            assert all(param.grad is None for param in matrices)
        if update == "deferred":
            held = optimizer._in_backward.projected
            assert all(held[param].numel() == 6 * max(param.shape) for param in matrices)
        optimizer.step()
        optimizer.zero_grad()
    assert len(most) >= 5 * len(matrices) and max(most) == 0


def test_nothing_stays_when_updates_are_immediate():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer, update="immediately")
    before = [param.detach().clone() for param in projected(optimizer)]
    model(batch(0)[0]).square().mean().backward()
    assert not optimizer._in_backward.projected
    assert not any(torch.equal(old, new) for old, new in zip(before, projected(optimizer), strict=True))


def test_the_optimizer_is_freed_with_its_hooks_in_place():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer)
    train(model, optimizer, 2)
    freed = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert freed() is None
    model(batch(0)[0]).sum().backward()
    assert all(param.grad is not None for param in model.parameters())


# Clipping.


def test_clipping_counts_r_and_ordinary_gradients():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer)
    x, y = batch(0)
    (100 * (model(x) - y).square().mean()).backward()
    held = optimizer._in_backward.projected
    ordinary = [param.grad for param in model.parameters() if param.grad is not None]
    assert len(held) == 5 and len(ordinary) == 5
    everything = [tensor.clone() for tensor in (*held.values(), *ordinary)]
    expected = torch.cat([tensor.double().flatten() for tensor in everything]).norm()
    norm = optimizer.clip_grad_norm_(0.5)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    for now, was in zip((*held.values(), *ordinary), everything, strict=True):
        torch.testing.assert_close(now, was * (0.5 / (expected + 1e-6)).float())
    assert optimizer.clip_grad_norm_(1e9).item() == pytest.approx(0.5, rel=1e-4)  # clips nothing
    assert optimizer.clip_grad_norm_(float("inf")).item() == pytest.approx(0.5, rel=1e-4)


def test_clipping_without_in_backward_is_torchs():
    model, optimizer = galore()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        (100 * each(batch(0)[0]).square().mean()).backward()
    assert torch.equal(optimizer.clip_grad_norm_(0.1), nn.utils.clip_grad_norm_(twin.parameters(), 0.1))
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(model.parameters(), twin.parameters(), strict=True))


def test_clipping_refuses():
    model, optimizer = galore()
    assert optimizer.clip_grad_norm_(1.0) == 0
    for value in (0, -1.0, "1"):
        with pytest.raises(ValueError, match="max_norm"):
            optimizer.clip_grad_norm_(value)
    handle = lrk.in_backward(model, optimizer)
    (model(batch(0)[0]).sum() * float("inf")).backward()
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    optimizer.zero_grad()
    handle.remove()
    lrk.in_backward(model, optimizer, update="immediately")
    with pytest.raises(RuntimeError, match="update='deferred' to clip"):
        optimizer.clip_grad_norm_(1.0)


# Loops.


def test_lr_schedules_and_resume_bit_for_bit():
    def fresh():
        model, optimizer = galore()
        lrk.in_backward(model, optimizer)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)

    model, optimizer, scheduler = fresh()
    dense_model, dense = galore()
    expected = train(dense_model, dense, 14, scheduler=torch.optim.lr_scheduler.OneCycleLR(dense, max_lr=0.05, total_steps=20))
    assert train(model, optimizer, 14, scheduler=scheduler) == expected
    stopped = fresh()
    train(stopped[0], stopped[1], 6, scheduler=stopped[2])
    resumed = fresh()
    for new, old in zip(resumed, stopped, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert train(resumed[0], resumed[1], 8, start=6, scheduler=resumed[2]) == expected[6:]
    assert_same((model, optimizer), resumed[:2])


def test_a_checkpoint_between_micro_batches_goes_on_with_the_step():
    """What a step has gathered is not in a checkpoint, as .grad is not. The step that is begun anew is the
    same."""

    def micro_batches(model, step):
        for piece in range(2):
            x, y = batch(10 * step + piece)
            (model(x) - y).square().mean().backward()
            yield

    def fresh():
        model, optimizer = galore(update_proj_gap=2)
        lrk.in_backward(model, optimizer, accumulate=2)
        return model, optimizer

    model, optimizer = fresh()
    saved = None
    for step in range(6):
        for number, _ in enumerate(micro_batches(model, step)):
            if (step, number) == (4, 0):  # a refresh was due
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                with pytest.raises(RuntimeError, match=r"load_state_dict\(\) came between a backward pass and its step"):
                    optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        optimizer.zero_grad()
    resumed = fresh()
    for new, state in zip(resumed, saved, strict=True):
        new.load_state_dict(state)
    for step in (4, 5):
        for _ in micro_batches(resumed[0], step):
            pass
        resumed[1].step()
        resumed[1].zero_grad()
    assert_same((model, optimizer), resumed)
    optimizer.load_state_dict(optimizer.state_dict())  # after a step there is nothing to lose


def test_frozen_parameters_may_thaw_and_freeze():
    def run(inside):
        model, optimizer = galore()
        frozen = model.layers[1].weight.requires_grad_(False)
        if inside:
            lrk.in_backward(model, optimizer)
            assert not frozen.requires_grad
        train(model, optimizer, 3)
        frozen.requires_grad_(True)
        train(model, optimizer, 3, start=3)
        frozen.requires_grad_(False)
        train(model, optimizer, 3, start=6)
        assert frozen.grad is None and (not inside or frozen not in optimizer._in_backward.projected)
        return model, optimizer

    assert_same(run(False), run(True))


def test_several_optimizers_of_one_model():
    def run(inside):
        torch.manual_seed(0)
        model = Net()
        halves = [list(model.layers.parameters()), [*model.up.parameters(), *model.down.parameters()]]
        optimizers = []
        for params in halves:
            matrices, rest = [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]
            optimizers.append(lrk.I3SAdamW([{"params": matrices, "rank": 4, "update_proj_gap": 3}, {"params": rest}]))
            if inside:
                lrk.in_backward(model, optimizers[-1])
        for step in range(7):
            x, y = batch(step)
            (model(x) - y).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return model, optimizers[1]

    assert_same(run(False), run(True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("update", ["deferred", "immediately"])
def test_activation_checkpointing(reentrant, update):
    class Checkpointed(Net):
        def forward(self, x):
            x = torch.tanh(self.up(x))
            for layer in self.layers:
                x = x + checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=reentrant)
            return self.down(x)

    def run(inside):
        torch.manual_seed(0)
        model = Checkpointed()
        optimizer = lrk.GaLoreAdamW(lrk.param_groups(model, rank=6, update_proj_gap=4), lr=1e-2)
        if inside:
            lrk.in_backward(model, optimizer, update=update)
        train(model, optimizer, 6)
        return model, optimizer

    assert_same(run(False), run(True))


def test_a_compiled_model():
    def run(inside):
        model, optimizer = galore()
        compiled = torch.compile(model, backend="aot_eager")
        if inside:
            lrk.in_backward(compiled, optimizer)
        train(compiled, optimizer, 5)
        return model, optimizer

    assert_same(run(False), run(True))


def test_autocast():
    def run(inside):
        model, optimizer = galore()
        if inside:
            lrk.in_backward(model, optimizer)
        for step in range(5):
            x, y = batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    assert_same(run(False), run(True))


def test_remove_goes_back_to_full_gradients():
    model, optimizer = galore()
    handle = lrk.in_backward(model, optimizer)
    train(model, optimizer, 3)
    model(batch(3)[0]).sum().backward()
    with pytest.raises(RuntimeError, match=r"remove\(\) came between"):
        handle.remove()
    optimizer.zero_grad()
    handle.remove()
    train(model, optimizer, 3, start=3)
    plain = galore()
    train(*plain, 6)
    assert_same(plain, (model, optimizer))
    lrk.in_backward(model, optimizer)  # and again


# A GradScaler.


class Scaler(torch.amp.GradScaler):
    """One that keeps the scales it had."""

    def __init__(self, **options):
        super().__init__(DEVICE, **({"init_scale": 2.0**10, "growth_interval": 3} | options))
        self.had = []

    def update(self):
        self.had.append(self.get_scale())
        super().update()


def scaled_run(inside, clip=False, unscale=False, bad=(), **options):
    model, optimizer = galore(device=DEVICE, **options)
    scaler = Scaler()
    if inside:
        lrk.in_backward(model, optimizer, scaler=scaler)
    for step in range(8):
        x, y = batch(step, device=DEVICE)
        loss = (model(x) - y).square().mean()
        if step in bad:  # only one matrix gets a gradient that is not finite
            loss = loss + (model.layers[1].weight * torch.tensor([float("inf")] + [0.0] * 39, device=DEVICE)).sum()
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if clip and inside:
            optimizer.clip_grad_norm_(1e-2)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model, optimizer, scaler


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [(), (2, 3)], ids=["finite", "infinite"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler(bad, unscale):
    """Bases are chosen from scaled gradients, which gives other bits but the same subspaces: scales are
    powers of two. No basis is due in the steps that are skipped."""
    dense, inside = scaled_run(False, bad=bad, unscale=unscale), scaled_run(True, bad=bad, unscale=unscale)
    assert inside[2].had == dense[2].had and len(set(inside[2].had)) > 1
    for (name, one), other in zip(dense[0].named_parameters(), inside[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    for param in projected(inside[1]):
        assert inside[1].state[param]["step"] == 8 - len(bad)


def test_a_basis_that_is_due_in_a_skipped_step():
    """The matrix whose gradient is infinite keeps its basis, or has none; the others have theirs from the
    finite gradients of that step."""
    model, optimizer, scaler = scaled_run(True, bad=(0, 5))
    assert scaler.had[1] == scaler.had[0] / 2
    for param in projected(optimizer):
        state = optimizer.state[param]
        assert state["step"] == 6 and state["refreshed_at"] == 4
        torch.testing.assert_close(state["basis"].mT @ state["basis"], torch.eye(6, device=DEVICE))
    assert all(torch.isfinite(param).all() for param in model.parameters())


@pytest.mark.parametrize("unscale", [False, True])
def test_clipping_unscales_with_the_scaler(unscale):
    model, optimizer, _ = scaled_run(True, clip=True, unscale=unscale)
    twin, twin_optimizer = galore(device=DEVICE)
    lrk.in_backward(twin, twin_optimizer)
    for step in range(8):
        x, y = batch(step, device=DEVICE)
        (twin(x) - y).square().mean().backward()
        twin_optimizer.clip_grad_norm_(1e-2)
        twin_optimizer.step()
        twin_optimizer.zero_grad()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_a_scaler_that_is_off():
    model, optimizer = galore()
    scaler = Scaler(enabled=False)
    lrk.in_backward(model, optimizer, scaler=scaler)
    losses = train(model, optimizer, 5, scaler=None)
    other, other_optimizer = galore()
    lrk.in_backward(other, other_optimizer, scaler=scaler)
    other_losses = []
    for step in range(5):
        x, y = batch(step)
        loss = (other(x) - y).square().mean()
        scaler.scale(loss).backward()
        other_optimizer.clip_grad_norm_(1e9)
        scaler.step(other_optimizer)
        torch.amp.GradScaler.update(scaler)
        other_optimizer.zero_grad()
        other_losses.append(loss.item())
    assert losses == other_losses


def test_a_scaler_that_it_does_not_know_is_refused():
    for update, message in (("deferred", "pass it: in_backward"), ("immediately", "use update='deferred'")):
        model, optimizer = galore()
        lrk.in_backward(model, optimizer, update=update)
        scaler = Scaler()
        scaler.scale(model(batch(0)[0]).square().mean()).backward()
        with pytest.raises(RuntimeError, match=message):
            scaler.step(optimizer)


# Errors.


def test_one_backward_pass_too_many_is_refused():
    for update in ("deferred", "immediately"):
        model, optimizer = galore()
        lrk.in_backward(model, optimizer, update=update)
        model(batch(0)[0]).sum().backward()
        with pytest.raises(RuntimeError, match="gradient number 2 since the last step.*accumulate=1"):
            model(batch(1)[0]).sum().backward()
        with pytest.raises(RuntimeError, match="did not finish"):
            optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, 2)


def test_fewer_backward_passes_are_no_error():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer, accumulate=3)
    assert train(model, optimizer, 4) == train(*galore(), 4)


def test_after_a_backward_pass_that_raised_the_next_step_starts_clean():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("in the middle")

    model, optimizer = galore()
    lrk.in_backward(model, optimizer)
    expected = train(*galore(), 6)
    assert train(model, optimizer, 3) == expected[:3]
    x, y = batch(3)
    hidden = torch.tanh(model.up(x))
    for layer in model.layers:
        hidden = Fails.apply(hidden) if layer is model.layers[1] else hidden
        hidden = hidden + torch.tanh(layer(hidden))
    with pytest.raises(ArithmeticError):
        (model.down(hidden) - y).square().mean().backward()
    assert optimizer._in_backward.projected
    for use in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=r"did not finish; call optimizer.zero_grad\(\)"):
            use()
    optimizer.zero_grad()
    assert not optimizer._in_backward.projected
    assert train(model, optimizer, 3, start=3) == expected[3:]


def test_a_gradient_beside_r_is_refused():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer)
    model(batch(0)[0]).sum().backward()
    model.up.weight.grad = torch.ones_like(model.up.weight)
    with pytest.raises(RuntimeError, match=r"up\.weight.*has a gradient beside the one that in_backward has projected"):
        optimizer.step()
    model.up.weight.grad = None
    optimizer.state[model.up.weight].clear()
    with pytest.raises(RuntimeError, match=r"state of .*up\.weight.* is gone"):
        optimizer.step()


def test_a_closure_is_refused():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer)
    with pytest.raises(RuntimeError, match=r"step\(closure\) cannot follow in_backward"):
        optimizer.step(lambda: 0.0)


def test_a_group_value_that_is_wrong_is_found_before_anything_moves():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer, update="immediately")
    optimizer.param_groups[1]["update_proj_gap"] = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="update_proj_gap"):
        model(batch(0)[0]).sum().backward()
    assert same_bits(before, model.state_dict())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(accumulate=0), ValueError, "accumulate must be a positive integer"),
        (dict(accumulate=True), ValueError, "accumulate must be a positive integer"),
        (dict(update="now"), ValueError, "update must be one of deferred, immediately"),
        (dict(dtype=torch.float16), ValueError, "torch.float32 or torch.bfloat16"),
        (dict(update="immediately", accumulate=2), ValueError, "one backward pass a step"),
        (dict(update="immediately", scaler=Scaler()), ValueError, "before a GradScaler has looked"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    model, optimizer = galore()
    with pytest.raises(error, match=message):
        lrk.in_backward(model, optimizer, **arguments)
    assert optimizer._in_backward is None and train(model, optimizer, 1)


def test_what_cannot_work_is_refused():
    model, optimizer = galore()
    with pytest.raises(ValueError, match="no parameter of the model"):
        lrk.in_backward(Net(), optimizer)
    with pytest.raises(TypeError, match="got AdamW"):
        lrk.in_backward(model, torch.optim.AdamW(model.parameters()))
    converted = lrk.to_subspace(Net(), rank=3)
    with pytest.raises(ValueError, match="R already"):
        lrk.in_backward(converted, lrk.RSOAdamW(converted.parameters()))
    model(batch(0)[0]).sum().backward()
    with pytest.raises(RuntimeError, match="has a gradient already"):
        lrk.in_backward(model, optimizer)
    optimizer.zero_grad()
    lrk.in_backward(model, optimizer)
    with pytest.raises(RuntimeError, match="before; remove"):
        lrk.in_backward(model, optimizer)
    fira = METHODS["FiraAdamW"]()
    with pytest.raises(ValueError, match="use update='immediately'"):
        lrk.in_backward(*fira)


def test_no_backward_pass_after_clipping():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer, accumulate=2)
    model(batch(0)[0]).sum().backward()
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="came after clip_grad_norm_"):
        model(batch(1)[0]).sum().backward()


def test_a_gradient_that_another_hook_has_taken():
    model, optimizer = galore()
    other = lrk.GaLoreAdamW(lrk.param_groups(model, rank=2))
    for each in (optimizer, other):
        lrk.in_backward(model, each)
    with pytest.raises(RuntimeError, match="another hook has taken the gradient of group 1, parameter"):
        model(batch(0)[0]).sum().backward()


def test_groups_that_were_rearranged():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer)
    optimizer.param_groups[1]["params"].reverse()
    with pytest.raises(RuntimeError, match="param_groups have been rearranged"):
        model(batch(0)[0]).sum().backward()


def test_a_matrix_that_moved_and_has_a_gradient_again():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer, update="immediately")
    model(batch(0)[0]).sum().backward()
    model.up.weight.grad = torch.ones_like(model.up.weight)
    with pytest.raises(RuntimeError, match=r"up\.weight.* was updated in the backward pass and has a gradient again"):
        optimizer.step()


def test_cuda_graphs_are_refused(monkeypatch):
    model, optimizer = galore(capturable=True)
    lrk.in_backward(model, optimizer)
    train(model, optimizer, 1)
    with pytest.raises(RuntimeError, match=r"refresh\(\) is for steps in a CUDA graph"):
        optimizer.refresh()
    model(batch(1)[0]).sum().backward()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        model(batch(1)[0]).sum().backward()


def test_a_scaler_needs_an_ordinary_gradient():
    weight = nn.Parameter(torch.randn(8, 12))
    model = nn.ParameterList([weight])
    with pytest.raises(ValueError, match="through the gradient of an ordinary parameter"):
        lrk.in_backward(model, lrk.GaLoreAdamW([{"params": [weight], "rank": 2}]), scaler=Scaler())
    bias = nn.Parameter(torch.zeros(3))
    optimizer = lrk.GaLoreAdamW([{"params": [weight], "rank": 2}, {"params": [bias]}])
    scaler = Scaler()
    lrk.in_backward(nn.ParameterList([weight, bias]), optimizer, scaler=scaler)
    scaler.scale(weight.sum()).backward()
    bias.grad = torch.zeros(3)  # too late for R to show in it
    with pytest.raises(RuntimeError, match="no ordinary parameter had a gradient when the backward pass ended"):
        scaler.step(optimizer)


def test_a_scaler_sees_r_of_reentrant_passes():
    """The only ordinary gradient comes in the outer pass, after those of the matrices."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(12))
            self.layer = nn.Linear(12, 10, bias=False)

        def forward(self, x):
            return checkpoint(self.layer, x + self.shift, use_reentrant=True)

    torch.manual_seed(0)
    model = Inner()
    optimizer, scaler = lrk.GaLoreAdamW(lrk.param_groups(model, rank=2)), torch.amp.GradScaler("cpu", init_scale=4.0)
    lrk.in_backward(model, optimizer, scaler=scaler)
    for step, bad in enumerate((False, True, False)):
        x, before = batch(step)[0], model.layer.weight.detach().clone()
        if bad:
            x[0, 0] = 1e38
        scaler.scale(model(x).square().mean() * (1e38 if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.layer.weight) == bad
    assert scaler.get_scale() == 2.0 and all(torch.isfinite(param).all() for param in model.parameters())


def test_a_scaler_that_is_off_is_none():
    model, optimizer = galore()
    lrk.in_backward(model, optimizer, update="immediately", scaler=Scaler(enabled=False))
    train(model, optimizer, 2)
    model, optimizer = galore()
    lrk.in_backward(model, optimizer, scaler=Scaler(enabled=False))
    (model.up.weight[0, 0] * float("inf") + model.down.bias.sum()).backward()
    assert torch.isfinite(model.down.bias.grad).all()


@pytest.mark.parametrize("selection", ["dominant", "importance"])
def test_bases_chosen_in_parts_are_the_same(selection, monkeypatch):
    def run():
        model, optimizer = build(selection=selection, update_proj_gap=3)
        for step in range(8):
            x, y = batch(step)
            loss = (model(x) - y).square().mean()
            loss.backward()
            if step < 2:
                model.layers[1].weight.grad.zero_()  # it waits for its basis
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    whole = run()
    monkeypatch.setattr(refreshes, "REFRESHED_ELEMENTS", 2 * 40 * 40)
    assert_same(whole, run())
