"""Rules on batches of states, against reference.py, which takes one matrix after the other."""

import pytest
import torch

from lowrank_kernels.backends import Bucket, Hyper, foreach, reference
from lowrank_kernels.lifts.back_projection import BackProjection
from lowrank_kernels.rules.adafactor import Adafactor, Factored
from lowrank_kernels.rules.adam_mini import AdamMini
from lowrank_kernels.rules.adamw import AdamW
from lowrank_kernels.rules.sgd import SGD
from lowrank_kernels.storage import EightBit, Plain

RULES = {rule.name: rule for rule in (Adafactor(), Factored(), AdamMini(), AdamW(), SGD())}
OPTIONS = {"betas": (0.8, 0.95), "eps": 1e-8, "momentum": 0.9, "beta2_decay": -0.8, "clip_threshold": 1.0}
CASES = [
    (name, storage) for name in RULES for storage in (Plain(), EightBit()) if storage.name == "plain" or name not in ("factored", "sgd")
]


def bucket_of(rule, storage, dtype=torch.float32, found_inf=None):
    """Five matrices, each with a count of its own."""
    states = {
        name: [torch.zeros(shape, dtype=kind) for _ in range(5)] for name, (shape, kind) in storage.layout(rule.state(6, 70), dtype).items()
    }
    return Bucket(
        weights=[torch.zeros(20, 70, dtype=dtype)] * 5,
        bases=[torch.zeros(20, 6, dtype=dtype)] * 5,
        states=states,
        steps=[torch.tensor(float(count)) for count in (0, 3, 0, 700, 2)],
        right=False,
        projected=[],
        found_inf=found_inf,
    )


@pytest.mark.parametrize("chunk", [1, 2 * 6 * 70, 2**26])
@pytest.mark.parametrize("name, storage", CASES, ids=lambda part: getattr(part, "name", part))
def test_batched_is_one_after_the_other(name, storage, chunk, monkeypatch):
    monkeypatch.setattr(foreach, "CHUNK_ELEMENTS", chunk)
    rule = RULES[name]
    hyper = Hyper(rule, BackProjection(), storage, lr=0.1, options={key: OPTIONS[key] for key in rule.keys})
    batch, apart = bucket_of(rule, storage), bucket_of(rule, storage)
    for _ in range(3):
        projected = [torch.randn(6, 70) for _ in range(5)]
        found = foreach.batched(batch, hyper, projected)
        expected = reference.update(apart, hyper, projected)
        assert found.dtype == expected.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
        for key in apart.states:
            for one, other in zip(batch.states[key], apart.states[key], strict=True):
                # A code may fall on the other side of a threshold.
                assert (
                    (one == other).float().mean() > 0.99 if one.dtype == torch.uint8 else torch.allclose(one, other, rtol=1e-5, atol=1e-6)
                )
        for kept in (*batch.steps, *apart.steps):
            kept += 1


@pytest.mark.parametrize("name", RULES)
def test_a_skipped_step_leaves_the_states(name):
    rule = RULES[name]
    hyper = Hyper(rule, BackProjection(), Plain(), lr=0.1, options={key: OPTIONS[key] for key in rule.keys})
    for found_inf, moves in ((torch.ones(1), False), (torch.zeros(1), True)):
        bucket = bucket_of(rule, Plain(), found_inf=found_inf)
        foreach.batched(bucket, hyper, [torch.randn(6, 70) for _ in range(5)])
        assert all(tensor.any() == moves for tensors in bucket.states.values() for tensor in tensors)


@pytest.mark.parametrize("name", RULES)
def test_in_fp64(name):
    rule = RULES[name]
    hyper = Hyper(rule, BackProjection(), Plain(), lr=0.1, options={key: OPTIONS[key] for key in rule.keys})
    batch, apart = bucket_of(rule, Plain(), torch.float64), bucket_of(rule, Plain(), torch.float64)
    projected = [torch.randn(6, 70, dtype=torch.float64) for _ in range(5)]
    found = foreach.batched(batch, hyper, projected)
    assert found.dtype == torch.float64 and torch.allclose(found, reference.update(apart, hyper, projected), rtol=1e-12)
