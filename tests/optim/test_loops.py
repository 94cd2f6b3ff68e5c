"""What a training loop expects of any optimizer: schedulers, closures, hooks, autocast around a step, a
compiled loop."""

import functools

import pytest
import torch
from optim import rso_runs
from optim.models import METHODS, batch, same_bits, train
from optim.rso_runs import everything, random_gradients

BUILDS = METHODS | {"RSOAdamW": functools.partial(rso_runs.build, proximal=0.1)}
pytestmark = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


@pytest.mark.parametrize(
    "scheduler_of",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 5)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),  # also cycles betas and adds keys
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    ],
    ids=["lambda", "one cycle", "cosine", "warm restarts"],
)
def test_lr_schedulers_resume(build, scheduler_of):
    def fresh():
        model, optimizer = build()
        return model, optimizer, scheduler_of(optimizer)

    model, optimizer, scheduler = fresh()
    losses = train(model, optimizer, 14, scheduler=scheduler)
    stopped = fresh()
    train(stopped[0], stopped[1], 6, scheduler=stopped[2])
    resumed = fresh()
    for new, old in zip(resumed, stopped, strict=True):
        new.load_state_dict(old.state_dict())
    assert train(resumed[0], resumed[1], 8, start=6, scheduler=resumed[2]) == losses[6:]
    assert same_bits(model.state_dict(), resumed[0].state_dict())
    assert len({group["lr"] for group in optimizer.param_groups}) == 1 and losses[-1] != train(*build(), 14)[-1]


def test_closure_runs_once_with_gradients_and_its_loss_comes_back(build):
    model, optimizer = build()
    plain_model, plain_optimizer = build()
    expected = train(plain_model, plain_optimizer, 5)
    found, modes = [], []
    for step in range(5):
        x, y = batch(step)

        def closure(x=x, y=y):
            modes.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        found.append(optimizer.step(closure).item())
    assert found == expected and modes == [True] * 5
    assert same_bits(model.state_dict(), plain_model.state_dict())


def test_step_hooks(build):
    model, optimizer = build()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 2)
    assert calls == ["before", "after"] * 2


def test_a_step_under_autocast_is_the_step_outside_of_it(build):
    inside, outside = build(), build()
    for (model, optimizer), enabled in ((inside, True), (outside, False)):
        for step in range(9):
            random_gradients(model, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
    assert same_bits(everything(*inside), everything(*outside))


def test_step_inside_a_compiled_function(build):
    model, optimizer = build()
    expected = train(*build(), 6)

    def training_step(x, y):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    compiled = torch.compile(training_step, backend="aot_eager")
    assert [compiled(*batch(step)).item() for step in range(6)] == pytest.approx(expected, rel=1e-5)
