"""Two processes over gloo whose gradients are projected before they are sent. Models are in fp64, so that
rounding is far below what a wrong gradient would do."""

import contextlib
import copy

import gloo
import pytest
import torch
from models import Net, batch, same_bits
from torch.nn.parallel import DistributedDataParallel

import lowrank_kernels as lrk

RANKS, STEPS, RANK = 2, 20, 4
HALVES = 8  # rows of a batch for each process
CASES = {
    "plain": dict(way="ddp"),
    "compress": dict(way="compress"),
    "compress, importance and stagger": dict(way="compress", method="I3SAdamW", stagger=True),
    "compress, bucket views": dict(way="compress", view=True),
    "compress, small buckets": dict(way="compress", bucket_mb=0.002),
    "compress, left": dict(way="compress", method="LowRankAdamW", selection="random", proj_type="left"),
    "compress, 8 bits": dict(way="compress", state_bits=8),
    "compress, random": dict(way="compress", method="LowRankAdamW", selection="random"),
    "compress, accumulate": dict(way="compress", micro=2),
    "compress, clip": dict(way="compress", clip=True),
    "in backward": dict(way="group"),
    "in backward, DDP": dict(way="in ddp"),
    "in backward, importance and stagger": dict(way="group", method="I3SAdamW", stagger=True),
    "in backward, accumulate": dict(way="in ddp", micro=2),
    "in backward, clip": dict(way="group", clip=True),
    "immediately": dict(way="group", update="immediately"),
    "immediately, Fira": dict(way="group", update="immediately", method="FiraAdamW"),
    "rso": dict(way="ddp", method="RSOAdamW"),
}


def build(way, method="GaLoreAdamW", view=False, bucket_mb=25, update="deferred", micro=1, clip=False, **options):
    torch.manual_seed(0)
    model = Net(torch.float64)
    if method == "RSOAdamW":
        lrk.to_subspace(model, rank=RANK)
        optimizer = lrk.RSOAdamW(model.parameters(), lr=1e-2, inner_steps=5)
    else:
        optimizer = getattr(lrk, method)(lrk.param_groups(model, rank=RANK, **({"update_proj_gap": 5} | options)), lr=1e-2)
    forward, state = model, None
    if way in ("ddp", "compress", "in ddp"):
        forward = DistributedDataParallel(model, gradient_as_bucket_view=view, bucket_cap_mb=bucket_mb)
    if way == "compress":
        state = lrk.distributed.compress_gradients(forward, optimizer)
    elif way != "ddp" and way != "alone":
        arguments = dict(process_group=torch.distributed.group.WORLD) if way == "group" else {}
        state = lrk.in_backward(forward, optimizer, accumulate=micro, update=update, **arguments)
    return model, optimizer, forward, state


def step_of(model, optimizer, forward, step, rows, way, micro=1, clip=False, **_):
    """One step on `rows` of the batch."""
    for part in range(micro):
        x, y = (each[rows] for each in batch(10 * step + part, torch.float64))
        quiet = forward.no_sync() if way == "compress" and part + 1 < micro else contextlib.nullcontext()
        with quiet:
            ((forward(x) - y).square().mean() / micro).backward()
    if clip and way != "compress":
        optimizer.clip_grad_norm_(0.1)
    elif clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


def run(rank, **case):
    """The weights after all steps, those of a run that was resumed in the middle, and the bytes sent in each
    step."""
    rows = slice(rank * HALVES, (rank + 1) * HALVES)
    model, optimizer, forward, state = build(**case)
    sent, saved = [], None
    for step in range(STEPS):
        if step == STEPS // 2 + 2:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        before = 0 if state is None else state.sent_bytes
        step_of(model, optimizer, forward, step, rows, **case)
        sent.append(0 if state is None else state.sent_bytes - before)
    resumed, resumed_optimizer, forward, _ = build(**case)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    for step in range(STEPS // 2 + 2, STEPS):
        step_of(resumed, resumed_optimizer, forward, step, rows, **case)
    return model.state_dict(), resumed.state_dict(), sent


def of_one_process(way, **case):
    """On the whole batch, in the way that has the same bases."""
    way = "alone" if way in ("ddp", "compress") else "alone, in backward"
    model, optimizer, forward, _ = build(way, **case)
    for step in range(STEPS):
        step_of(model, optimizer, forward, step, slice(None), way, **case)
    return model.state_dict()


def raised(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(rank):
    """What is raised, by what was tried."""
    model, optimizer, forward, _ = build("ddp")
    compress, inside = lrk.distributed.compress_gradients, lrk.in_backward
    fira, gaussian = build("ddp", "FiraAdamW"), build("ddp", "LowRankAdamW", selection="gaussian")
    rso = build("ddp", "RSOAdamW")
    found = {
        "not DDP": raised(lambda: compress(model, optimizer)),
        "not low-rank": raised(lambda: compress(forward, torch.optim.AdamW(model.parameters()))),
        "Fira": raised(lambda: compress(fira[2], fira[1])),
        "gaussian": raised(lambda: compress(gaussian[2], gaussian[1])),
        "RSO": raised(lambda: compress(rso[2], rso[1])),
        "another model": raised(lambda: compress(build("ddp")[2], optimizer)),
        "another group": raised(lambda: inside(forward, optimizer, process_group=torch.distributed.new_group([0, 1]))),
        "left over": raised(lambda: inside(forward, lrk.GaLoreAdamW([{"params": [model.up.weight], "rank": 2}]))),
    }
    found["not told"] = raised(lambda: inside(model, optimizer))
    found["static graph"] = raised(lambda: inside(DistributedDataParallel(model, static_graph=True), optimizer))
    compiled = inside(torch.compile(forward, backend="eager"), optimizer)
    assert not forward.require_backward_grad_sync
    compiled.remove()
    compiled.remove()  # nothing happens
    dropped = lrk.GaLoreAdamW(lrk.param_groups(model, rank=RANK))
    inside(forward, dropped)
    del dropped
    assert forward.require_backward_grad_sync
    handle = inside(forward, optimizer)
    assert not forward.require_backward_grad_sync
    found["both"] = raised(lambda: compress(forward, optimizer))
    x, y = batch(0, torch.float64)
    model.up(x).square().mean().backward()
    found["not used"] = raised(optimizer.step)
    optimizer.zero_grad()
    handle.remove()
    assert forward.require_backward_grad_sync
    other = build("group", seed=rank)
    found["seeds"] = raised(lambda: other[2](x).square().mean().backward())
    return found


class Branches(torch.nn.Module):
    """Two equal layers, which the processes run in another order."""

    def __init__(self, rank, in_order):
        super().__init__()
        self.branches = torch.nn.ModuleList(torch.nn.Linear(12, 12, bias=False) for _ in range(2))
        self.reverse = rank == 1 and not in_order
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1 + self.reverse
        for branch in reversed(self.branches) if self.reverse else self.branches:
            x = torch.tanh(branch(x))
        return x


def of_branches(rank, in_order):
    """What step() raised, and a buffer that DDP would keep equal. The first forward pass comes before
    in_backward."""
    torch.manual_seed(0)
    model = Branches(rank, in_order)
    optimizer = lrk.GaLoreAdamW(lrk.param_groups(model, rank=2))
    forward = DistributedDataParallel(model)
    forward(batch(0)[0]).square().mean().backward()
    optimizer.zero_grad()
    lrk.in_backward(forward, optimizer)
    forward(batch(0)[0])
    model.seen.fill_(rank)
    forward(batch(0)[0]).square().mean().backward()
    return raised(optimizer.step), model.seen.item()


def late(rank):
    """Flags of waiting matrices that come late in one process. One matrix has no gradient but zero in the
    first step."""
    arriving = lrk.optim.arriving.Arriving
    had = arriving.has_arrived
    if rank == 1:
        arriving.has_arrived = lambda self: False
    try:
        model, optimizer, forward, _ = build("in ddp", micro=2)
        for step in range(6):
            for part in range(2):
                x, y = (each[rank * HALVES : (rank + 1) * HALVES] for each in batch(10 * step + part, torch.float64))
                loss = (forward(x) - y).square().mean()
                (loss * (0 if step == 0 else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        arriving.has_arrived = had
    return model.state_dict()


def left_alone(rank):
    """The gradients that a hook leaves once its optimizer is gone."""
    model, optimizer, forward, state = build("compress")
    for step in range(2):
        step_of(model, optimizer, forward, step, slice(rank * HALVES, (rank + 1) * HALVES), "compress")
    del optimizer
    x, y = (each[rank * HALVES : (rank + 1) * HALVES] for each in batch(1, torch.float64))
    (forward(x) - y).square().mean().backward()
    return torch.linalg.matrix_rank(model.layers[0].weight.grad).item()


def unscaled_first(rank):
    model, optimizer, forward, _ = build("ddp")
    scaler = torch.amp.GradScaler("cpu")
    lrk.in_backward(forward, optimizer, scaler=scaler)
    scaler.scale(forward(batch(0, torch.float64)[0]).sum()).backward()
    scaler.unscale_(optimizer)
    return raised(lambda: optimizer.clip_grad_norm_(1.0))


def scaled(rank, way):
    """The scales of eight steps in whose third the second process has an infinite gradient in one matrix."""
    model, optimizer, forward, _ = build("ddp")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    if way == "compress":
        lrk.distributed.compress_gradients(forward, optimizer)
    else:
        handle = lrk.in_backward(forward, optimizer, scaler=scaler)
    scales = []
    for step in range(8):
        x, y = (each[rank * HALVES : (rank + 1) * HALVES] for each in batch(step, torch.float64))
        loss = (forward(x) - y).square().mean()
        if step == 2 and rank == 1:
            loss = loss + (model.layers[1].weight * torch.tensor([float("inf")] + [0.0] * 39)).sum()
        scaler.scale(loss).backward()
        if way == "average":
            if step == 1:
                assert "must look at the mean" in raised(lambda: scaler.step(optimizer))
                scaler.update()
                optimizer.zero_grad()
                continue
            handle.average()
        elif way == "clip":
            optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return model.state_dict(), scales


def process(rank):
    found = {name: run(rank, **case) for name, case in CASES.items()}
    found["refusals"] = refusals(rank)
    found |= {f"branches, {in_order}": of_branches(rank, in_order) for in_order in (True, False)}
    found |= {"late": late(rank), "left alone": left_alone(rank), "unscaled first": unscaled_first(rank)}
    found |= {f"scaled, {way}": scaled(rank, way) for way in ("compress", "average", "clip")}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return gloo.results(process, tmp_path_factory.mktemp("gradients"), RANKS)


@pytest.mark.parametrize("name", CASES)
def test_processes_train_as_one(found, name):
    assert same_bits(found[0][name][0], found[1][name][0])
    if name != "compress, clip":  # in which a whole gradient counts with its own norm where a basis is due
        tolerance = 5e-3 if "8 bits" in name else 1e-8  # the last bit may choose another code
        for key, value in of_one_process(**CASES[name]).items():
            torch.testing.assert_close(found[0][name][0][key], value, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(found, name):
    for rank in range(RANKS):
        assert same_bits(found[rank][name][0], found[rank][name][1])


def test_clipping_changes_the_run(found):
    for clipped, free in (("compress, clip", "compress"), ("in backward, clip", "in backward")):
        assert not same_bits(found[0][clipped][0], found[0][free][0])


def test_bytes_sent(found):
    """r·n a matrix and the ordinary gradients; all of m·n too where a basis is due."""
    model = Net()
    matrices = [param for param in model.parameters() if param.dim() == 2]
    ordinary = sum(param.numel() for param in model.parameters() if param.dim() != 2)
    thin, whole = sum(RANK * max(param.shape) for param in matrices), sum(param.numel() for param in matrices)
    for name, at_refresh in {
        "compress": whole + ordinary,
        "compress, accumulate": whole + ordinary,
        "in backward": whole + thin + ordinary,
        "in backward, accumulate": whole + thin + ordinary,
        "immediately": whole + ordinary,
    }.items():
        expected = [8 * (at_refresh if step % 5 == 0 else thin + ordinary) for step in range(STEPS)]
        assert found[0][name][2] == expected, name
    staggered = found[0]["compress, importance and stagger"][2]
    assert max(staggered[1:]) < 8 * (whole + ordinary) and len(set(staggered[5:10])) > 1


REFUSALS = {
    "not DDP": "TypeError: model must be a DistributedDataParallel, got Net",
    "not low-rank": "TypeError: optimizer must be a low-rank optimizer of lowrank_kernels, got AdamW",
    "Fira": "ValueError: lift='residual' moves the weights by the part of the gradient outside of the subspace as well",
    "gaussian": "ValueError: selection='gaussian' draws bases with PᵀP ≠ I",
    "RSO": "ValueError: the gradients of coordinates are R already",
    "another model": "ValueError: no parameter of the model is in a low-rank group",
    "another group": "ValueError: process_group is not that of the DistributedDataParallel model",
    "left over": "parameters of the model are not in it, 'module.up.bias' for one",
    "not told": "ValueError: torch.distributed runs 2 processes: pass process_group",
    "static graph": "ValueError: DistributedDataParallel(static_graph=True) cannot",
    "both": "ValueError: the gradients of this optimizer are projected by in_backward",
    "not used": "has no gradient; the processes take the mean of all gradients together",
    "seeds": "RuntimeError: processes 0 and 1 have the same parameters, but their seeds or other settings",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(found, what):
    for rank in range(RANKS):
        assert REFUSALS[what] in found[rank]["refusals"][what]


@pytest.mark.parametrize("way", ["compress", "average", "clip"])
def test_all_processes_skip_a_step_that_one_of_them_must_skip(found, way):
    (weights, scales), (other_weights, other_scales) = (found[rank][f"scaled, {way}"] for rank in range(RANKS))
    assert scales == other_scales and min(scales) == 2.0**9 and same_bits(weights, other_weights)
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_gradients_that_come_in_another_order_are_found_out(found):
    for rank in range(RANKS):
        assert found[rank]["branches, True"] == ("nothing", 1.0)  # rank 0's buffer: rank 1 had counted from 1
        assert "RuntimeError: the gradients of two processes came in another order" in found[rank]["branches, False"][0]


def test_processes_agree_although_flags_arrive_late_in_one(found):
    assert same_bits(found[0]["late"], found[1]["late"])
    start = build("alone")[0].state_dict()
    assert all(not torch.equal(value, start[key]) for key, value in found[0]["late"].items())


def test_a_hook_whose_optimizer_is_gone_sends_whole_gradients(found):
    assert found[0]["left alone"] == found[1]["left alone"] > RANK


def test_unscaling_before_the_mean_is_refused(found):
    for rank in range(RANKS):
        assert "came before the mean over all processes" in found[rank]["unscaled first"]
