"""The kernels on the parts of matrices that processes hold: narrow ones, uneven ones, and none. Two processes
run in this one, step by step, and a wire carries what they send."""

import pytest
import torch

from lowrank_kernels import GaLoreAdamW, backends
from lowrank_kernels.backends import Bucket
from lowrank_kernels.sharded import Sharding
from lowrank_kernels.sharded import step as sharded_step

pytestmark = pytest.mark.gpu
PROCESSES, COUNT, RANK = 2, 3, 4
SHAPES = {"even": (40, 64), "uneven": (25, 33), "unaligned": (6, 7), "no row for one": (1, 40)}
"""m and n."""


class Mesh:
    """What Sharding asks of a mesh, for one of the processes. A group is (wire, process)."""

    def __init__(self, wire, process):
        self.wire, self.process = wire, process

    def get_group(self, mesh_dim):
        return self.wire, self.process

    def get_local_rank(self, mesh_dim):
        return self.process

    def size(self, mesh_dim):
        return PROCESSES


class Wire:
    """Holds the messages of each process until the other one has sent its own."""

    def __init__(self):
        self.sent = [[] for _ in range(PROCESSES)]

    def reduce_scatter(self, out, values, group, async_op):
        process, number = self._send(values, group)
        return Arriving(lambda: out.copy_(sum(self._all(number)).chunk(PROCESSES)[process]))

    def all_gather(self, out, values, group, async_op):
        _, number = self._send(values, group)
        return Arriving(lambda: out.copy_(torch.cat(self._all(number))))

    def _send(self, values, group):
        wire, process = group
        assert wire is self
        self.sent[process].append(values.clone())
        return process, len(self.sent[process]) - 1

    def _all(self, number):
        return [messages[number] for messages in self.sent]


class Arriving:
    def __init__(self, wait):
        self.wait = wait


@pytest.fixture
def wire(monkeypatch):
    found = Wire()
    monkeypatch.setattr(sharded_step, "reduce_scatter", found.reduce_scatter)
    monkeypatch.setattr(sharded_step, "all_gather", found.all_gather)
    monkeypatch.setitem(backends.BACKENDS, "cpu", backends.BACKENDS["cuda"])
    return found


def tensors(m, n, right, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (n, m) if right else (m, n)
    weights, grads = (torch.randn(COUNT, *shape, generator=generator).to(dtype) for _ in range(2))
    bases = torch.linalg.qr(torch.randn(COUNT, m, min(RANK, m), generator=generator))[0].to(dtype)
    return weights, grads, bases


def bucket_of(weights, grads, bases, columns, right):
    moments = {name: [torch.zeros(bases.shape[-1], columns) for _ in range(COUNT)] for name in ("exp_avg", "exp_avg_sq")}
    lists = ([matrix.clone(memory_format=torch.contiguous_format) for matrix in batch] for batch in (weights, bases, grads))
    weights, bases, grads = lists
    return Bucket(weights, bases, moments, [torch.zeros(()) for _ in range(COUNT)], right=right, grads=grads)


def part_of(batch, sharding, dim):
    return batch.narrow(dim, *sharding.piece(batch.shape[dim]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("cut", ["m", "n"])
@pytest.mark.parametrize("shape", [pytest.param("even", marks=pytest.mark.slow), "uneven", "unaligned", "no row for one"])
def test_two_steps_of_two_processes_are_those_of_one(wire, shape, cut, right, dtype):
    m, n = SHAPES[shape]
    weights, grads, bases = tensors(m, n, right, dtype)
    param = torch.nn.Parameter(weights[0])
    optimizer = GaLoreAdamW([dict(params=[param], rank=min(RANK, m))], lr=1e-2)
    hyper = optimizer._hyper(optimizer.param_groups[0])
    whole = bucket_of(weights, grads, bases, n, right)
    dim = int((cut == "n") != right)
    shardings = [Sharding(Mesh(wire, process), weights[0].shape, 0, dim) for process in range(PROCESSES)]
    parts = []
    for sharding in shardings:
        rows = part_of(bases, sharding, 1) if cut == "m" else bases
        mine = part_of(weights, sharding, 1 + dim), part_of(grads, sharding, 1 + dim)
        parts.append(bucket_of(*mine, rows, sharding.piece(n)[1], right))
    for _ in range(2):
        backends.step(whole, hyper)
        steps = [sharded_step.step(part, hyper, sharding, n) for part, sharding in zip(parts, shardings, strict=True)]
        sharded_step.overlapped(in_step(steps))
        for bucket in (whole, *parts):
            torch._foreach_add_(bucket.steps, 1)
    unit = torch.finfo(dtype).eps
    for index, expected in enumerate(whole.weights):
        found = torch.cat([part.weights[index] for part in parts], dim=dim)
        # Both steps move by lr·P·N, |N| ≤ 1 / √(1 − β2); N is rounded to the weights' dtype, and so is W.
        assert (found - expected).abs().max() <= 4 * unit * (expected.abs().max() + 2 * 1e-2 * 32)
        assert not torch.equal(found, weights[index])


def in_step(generators):
    """One generator that lets each process go on by one message in turn."""

    def together():
        alive = list(generators)
        while alive:
            alive = [generator for generator in alive if next(generator, generator) is not generator]
            yield

    return [together()]
