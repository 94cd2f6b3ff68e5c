"""capturable=True: counts on the device, steps inside a CUDA graph, refreshes between its replays."""

import copy

import pytest
import torch
from models import batch, build, same_bits, through_a_file, train

import lowrank_kernels as lrk
from lowrank_kernels.optim import optimizer as base
from lowrank_kernels.optim import refreshes
from lowrank_kernels.optim import scaler as scaler_module

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")


class FakeCapture:
    """On a CPU: while `active`, torch says that a CUDA stream is being captured. A step taken then stands for
    a replay of one that was."""

    def __init__(self, monkeypatch):
        self.active = False
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.active)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.active)

    def __enter__(self):
        self.active = True

    def __exit__(self, *_):
        self.active = False


@pytest.fixture
def capture(monkeypatch):
    return FakeCapture(monkeypatch)


def backward(model, step):
    x, y = batch(step, next(model.parameters()).dtype, next(model.parameters()).device)
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize(
    "options", [{}, {"stagger": True}, {"state_bits": 8}, {"rounding": "stochastic", "dtype": torch.bfloat16}], ids=str
)
def test_it_trains_as_without(options):
    """On a CPU the count is read where it lies, so to the bit."""
    plain, captured = build(**options), build(**options, capturable=True)
    assert train(*plain, 10) == train(*captured, 10)
    assert same_bits(plain[0].state_dict(), captured[0].state_dict())
    for group in captured[1].param_groups:
        for parameter in group["params"]:
            step = captured[1].state[parameter]["step"]
            assert step.shape == () and step.dtype == torch.float32 and step.device == parameter.device and step == 10


@pytest.mark.parametrize("save_at", [1, 6, 8])
@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
def test_resume_is_bit_identical_also_into_the_other_kind(save_at, before, after):
    """A checkpoint brings its capturable with it, as torch's does; set otherwise afterwards, it goes on with
    the same numbers."""
    straight, optimizer = build(capturable=before)
    train(straight, optimizer, 13)
    stopped, optimizer_before = build(capturable=before)
    train(stopped, optimizer_before, save_at)
    file = through_a_file({"model": stopped.state_dict(), "optimizer": optimizer_before.state_dict()})
    resumed, optimizer_after = build(capturable=after)
    resumed.load_state_dict(file["model"])
    optimizer_after.load_state_dict(file["optimizer"])
    for group in optimizer_after.param_groups:
        group["capturable"] = after
    train(resumed, optimizer_after, 13 - save_at, start=save_at)
    assert same_bits(straight.state_dict(), resumed.state_dict())
    if before == after:
        assert same_bits(optimizer.state_dict(), optimizer_after.state_dict())


def test_copies_count_on():
    model, optimizer = build(capturable=True)
    train(model, optimizer, 5)
    other_model, other = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, 6, start=5) == train(other_model, other, 6, start=5)


@pytest.mark.parametrize("stagger", [False, True])
def test_refresh_and_replays_are_the_steps_themselves(capture, stagger):
    """Where the backward pass runs before refresh(), replays give what eager steps give, refreshes
    included."""
    eager, replayed = (build(capturable=True, stagger=stagger) for _ in range(2))
    train(*eager, 11)
    model, optimizer = replayed
    train(model, optimizer, 2)
    bases = {index: optimizer.state[p]["basis"] for index, p in enumerate(optimizer.param_groups[1]["params"])}
    for step in range(2, 11):
        backward(model, step)
        optimizer.refresh()
        with capture:
            optimizer.step()
        optimizer.zero_grad()
    assert same_bits(eager[0].state_dict(), model.state_dict())
    assert same_bits(eager[1].state_dict(), optimizer.state_dict())
    for index, parameter in enumerate(optimizer.param_groups[1]["params"]):
        assert optimizer.state[parameter]["basis"] is bases[index], "a graph holds its address"


def test_a_captured_step_refreshes_nothing(capture, monkeypatch):
    model, optimizer = build(capturable=True, update_proj_gap=1)
    train(model, optimizer, 2)
    monkeypatch.setattr(refreshes.ops, "choose_bases", lambda *_, **__: pytest.fail("a refresh inside of the graph"))
    backward(model, 2)
    with capture:
        optimizer.step()


def test_eager_steps_keep_the_bases_where_they_are():
    model, optimizer = build(capturable=True, update_proj_gap=2)
    train(model, optimizer, 1)
    basis = optimizer.state[model.up.weight]["basis"]
    before = basis.clone()
    train(model, optimizer, 4, start=1)
    assert optimizer.state[model.up.weight]["basis"] is basis and not torch.equal(basis, before)


def test_errors_help(capture):
    model, optimizer = build()
    backward(model, 0)
    with pytest.raises(RuntimeError, match="refresh.* is for steps in a CUDA graph; group 1 has capturable=False"):
        optimizer.refresh()
    optimizer.step()
    with capture, pytest.raises(RuntimeError, match="build the optimizer with capturable=True"):
        optimizer.step()
    model, optimizer = build(capturable=True)
    backward(model, 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="refresh.* came before the first step"):
        optimizer.refresh()
    with capture, pytest.raises(RuntimeError, match="before the first step"):
        optimizer.step()
    low_rank = {f"{name}.weight" for name in ("up", "down", "layers.0", "layers.1", "layers.2")}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in low_rank)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="refresh.* found no gradient to choose bases from"):
        optimizer.refresh()
    with pytest.raises(TypeError, match="capturable must be True or False, got 1"):
        build(capturable=1)


@pytest.mark.parametrize("bad_steps", [(0,), (0, 1, 4), (5, 6)])
def test_a_scaler_skips_a_step_as_if_it_had_not_been(bad_steps):
    model, optimizer = build(capturable=True)
    plain = build(capturable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**6)
    good = 0
    for attempt in range(10):
        x, y = batch(good)
        scaler.scale((model(x) - y).square().mean()).backward()
        if attempt in bad_steps:
            model.down.bias.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if attempt not in bad_steps:
            train(*plain, 1, start=good)
            good += 1
    assert same_bits(plain[0].state_dict(), model.state_dict())
    assert optimizer.state[model.up.weight]["step"] == good


@pytest.fixture
def asked(monkeypatch):
    """As on a GPU, where nothing is read of found_inf but where it must be: how many skips there were each
    time that the host asks."""
    found, ask = [], scaler_module.Skips.ask
    monkeypatch.setattr(base, "HOST", ())

    def counted(self, group):
        waits = id(group) in self._skipped
        skipped = ask(self, group)
        found.extend([skipped] * waits)
        return skipped

    monkeypatch.setattr(scaler_module.Skips, "ask", counted)
    return found


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("bad_steps", [(0,), (1,), (3, 4), (5,), (2, 3, 7, 8, 9, 12)])
def test_a_skip_that_the_host_does_not_see_changes_nothing(asked, monkeypatch, bad_steps, stagger):
    ends = []
    for host in (("cpu",), ()):
        monkeypatch.setattr(base, "HOST", host)
        model, optimizer = build(capturable=True, update_proj_gap=5, stagger=stagger)
        for step in range(20):
            backward(model, step)
            optimizer.found_inf = torch.tensor(float(step in bad_steps))
            optimizer.step()
            optimizer.zero_grad()
        if not host and not stagger:
            assert len(asked) <= 4 + len(bad_steps), "only where a refresh may be due"
        ends.append((model.state_dict(), optimizer.state_dict()))
        assert optimizer.state[model.up.weight]["step"] == 20 - len(bad_steps)
        assert optimizer.param_groups[1]["calls"] == 20 - len(bad_steps)
    assert same_bits(*ends)


def test_refresh_knows_of_a_skip_that_the_host_did_not_see(asked, monkeypatch, capture):
    """The last step before the capture was skipped: every replay after it is one update later."""
    bases = []
    for host in (("cpu",), ()):
        monkeypatch.setattr(base, "HOST", host)
        model, optimizer = build(capturable=True)
        for step in range(9):
            backward(model, step)
            optimizer.found_inf = torch.tensor(1.0) if step == 1 else None
            if step < 2:
                optimizer.step()
            else:
                optimizer.refresh()
                with capture:
                    optimizer.step()
            optimizer.zero_grad()
        bases.append(optimizer.state_dict())
    assert same_bits(*bases)


def test_a_refresh_that_failed_has_not_been(monkeypatch):
    model, optimizer = build(capturable=True, update_proj_gap=1)
    train(model, optimizer, 2)
    backward(model, 2)
    before = copy.deepcopy(optimizer.state_dict())
    choose, calls = refreshes.ops.choose_bases, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no")
        return choose(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(refreshes.ops, "choose_bases", failing)
        with pytest.raises(MemoryError):
            optimizer.refresh()
    assert len(calls) == 2 and same_bits(before, optimizer.state_dict())


def test_complex_dense_parameters():
    parameters = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2)]
    optimizers = [lrk.LowRankAdamW([p], lr=0.1, capturable=c) for p, c in zip(parameters, (False, True), strict=True)]
    for parameter, optimizer in zip(parameters, optimizers, strict=True):
        parameter.grad = torch.full((3,), 1 + 1j)
        optimizer.step()
    assert torch.equal(*parameters)


def test_a_pickle_of_before_these_keys():
    model, optimizer = build()
    train(model, optimizer, 2)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        for key in ("capturable", "state_bits", "rounding"):
            group.pop(key, None)
    state["defaults"].pop("capturable")
    again = lrk.LowRankAdamW.__new__(lrk.LowRankAdamW)
    again.__setstate__(state)
    train(model, again, 2, start=2)
    again.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize("options", [{}, {"state_bits": 8}, {"rounding": "stochastic", "dtype": torch.bfloat16}], ids=str)
def test_a_cuda_graph_of_the_step(options):
    """The backward pass eagerly, the step as a graph: equal to eager steps to the bit, with a rate that
    changes between replays."""
    lr = torch.tensor(1e-2, device="cuda")
    eager = build(device="cuda", capturable=True, lr=lr.clone(), **options)
    model, optimizer = build(device="cuda", capturable=True, lr=lr.clone(), **options)

    def rate(optimizer, step):
        for group in optimizer.param_groups:
            group["lr"].fill_(1e-2 / (step + 1))

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    graph = None
    for step in range(12):
        for each, each_optimizer in (eager, (model, optimizer)):
            rate(each_optimizer, step)
            each_optimizer.zero_grad(set_to_none=each is eager[0])
            backward(each, step)
        eager[1].step()
        if step < 3:
            optimizer.step()
            continue
        if graph is None:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        optimizer.refresh()
        graph.replay()
    assert same_bits(eager[0].state_dict(), model.state_dict())


@pytest.mark.gpu
@needs_a_gpu
def test_a_cuda_graph_of_the_whole_iteration():
    """Forward, backward and step in one graph: the bases come from the gradients of the replay before."""
    model, optimizer = build(device="cuda", capturable=True, lr=torch.tensor(1e-2, device="cuda"))
    x, y = (part.clone() for part in batch(0, device="cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    losses = []
    for _ in range(40):
        optimizer.refresh()
        graph.replay()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and optimizer.state[model.up.weight]["step"].item() == 43


def test_a_matrix_that_waits_makes_no_step_wait(asked, monkeypatch):
    """An expert without a gradient looks for a basis at each step; nobody asks whether steps were skipped."""
    experts = torch.nn.Parameter(torch.ones(2, 8, 12))
    optimizer = lrk.LowRankAdamW([{"params": [experts], "rank": 2, "update_proj_gap": 100}])
    for step in range(8):
        experts.grad = torch.randn(2, 8, 12)
        experts.grad[0] *= step == 6
        optimizer.found_inf = torch.tensor(float(step == 4))
        optimizer.step()
        assert optimizer.state[experts]["basis"][0].any() == (step >= 6)
    assert asked == [] and optimizer.state_dict()["param_groups"][0]["calls"] == 7
