"""DistributedDataParallel over gloo, two processes: only coordinates and what is not converted travel; every
rank has the same P."""

import gloo
import pytest
import torch
import torch.distributed as dist
from nn.layers import Block, projection
from torch.nn.parallel import DistributedDataParallel

import lowrank_kernels as lrk

RANKS = 2


def inputs(rank, step):
    return torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))


def converted():
    torch.manual_seed(0)
    model = lrk.to_subspace(Block(), rank=3)
    return model, lrk.RSOAdamW(model.parameters(), lr=1e-2, inner_steps=2)


def process(rank):
    sent = []

    def count(state, bucket):
        sent.append(bucket.buffer().numel())
        dist.all_reduce(bucket.buffer().div_(RANKS))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model, optimizer = converted()
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, count)
    for convert in (lambda: lrk.to_subspace(parallel, rank=2), lambda: lrk.to_dense(parallel)):
        with pytest.raises(ValueError, match="DistributedDataParallel.* convert it first"):
            convert()
    for step in range(5):
        parallel(inputs(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [model.state_dict(), [projection(layer) for layer in model.children()], sum(sent)]


def test_two_processes_train_as_one(tmp_path):
    found = gloo.results(process, tmp_path, RANKS)
    model, optimizer = converted()
    for step in range(5):
        torch.stack([model(inputs(rank, step)).square().mean() for rank in range(RANKS)]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(found[0][0][name], found[1][0][name])
        assert torch.allclose(found[0][0][name], value, rtol=1e-9, atol=1e-12)
    for layer, first, second in zip(model.children(), found[0][1], found[1][1], strict=True):
        assert torch.equal(first, second) and torch.equal(first, projection(layer))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found[0][2] == found[1][2] == 5 * trained < 5 * sum(layer.weight.numel() for layer in model.children())
