"""Philox4x32-10: the published vectors, purity in (seed, stream, element), and the distributions made from
it."""

import math

import pytest
import torch

from lowrank_kernels import philox

# Random123's known-answer file, philox4x32 10.
VECTORS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_known_answers(counter, key, expected):
    as_tensors = [[torch.tensor(word, device=DEVICE) for word in words] for words in (counter, key)]
    assert [int(word) for word in philox.philox4x32(*as_tensors)] == expected


@pytest.mark.gpu
def test_same_words_on_every_device():
    seeds = [3, -1, 1 << 63]
    here, there = (philox.words(philox.seed_tensor(seeds, device), 1001, philox.SKETCH).cpu() for device in ("cpu", DEVICE))
    assert torch.equal(here, there)


def test_a_row_depends_on_its_seed_alone():
    batch = philox.words(philox.seed_tensor([7, 8, 9], "cpu"), 37, philox.TAIL)
    alone = philox.words(philox.seed_tensor([8], "cpu"), 100, philox.TAIL)
    assert torch.equal(batch[1], alone[0, :37])
    other_stream = philox.words(philox.seed_tensor([8], "cpu"), 100, philox.GUMBEL)
    assert not (alone == other_stream).any()


def test_all_64_bits_of_a_seed_count():
    seeds = [0, 1, 1 << 32, 1 << 63, (1 << 64) - 1]
    words = philox.words(philox.seed_tensor(seeds, "cpu"), 8, 0)
    assert len({tuple(row) for row in words.tolist()}) == len(seeds)
    assert torch.equal(philox.seed_tensor([-1], "cpu"), philox.seed_tensor([(1 << 64) - 1], "cpu"))


def test_derived_seeds_differ():
    seeds = {philox.derive_seed(seed, refresh, place) for seed in (0, 1, -1) for refresh in range(20) for place in range(20)}
    assert len(seeds) == 3 * 400
    assert philox.derive_seed(0, 1, 2) != philox.derive_seed(0, 2, 1)


def _kolmogorov(sample, cdf):
    sample = sample.double().sort().values
    ranks = torch.arange(1, len(sample) + 1, dtype=torch.float64) / len(sample)
    return (cdf(sample) - ranks).abs().max().item()


def test_normal_and_gumbel_distributions():
    count = 200_000
    bound = 2.7 / math.sqrt(count)  # Kolmogorov's statistic exceeds it with probability 1e-6
    seeds = philox.seed_tensor([12345], "cpu")
    normal = philox.normal(seeds, (count,), philox.SKETCH, torch.float32)[0]
    assert _kolmogorov(normal, torch.special.ndtr) < bound
    assert abs(torch.corrcoef(torch.stack([normal[0::2], normal[1::2]]))[0, 1]) < 5 / math.sqrt(count / 2)
    gumbel = philox.gumbel(seeds, count, philox.GUMBEL)[0]
    assert _kolmogorov(gumbel, lambda x: torch.exp(-torch.exp(-x))) < bound


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_finite_at_the_ends_of_the_integers(word, monkeypatch):
    monkeypatch.setattr(philox, "words", lambda seeds, count, stream, first=0: torch.full((1, count), word))
    assert philox.normal(None, (4,), 0, torch.float32).isfinite().all()
    assert philox.gumbel(None, 4, 0).isfinite().all()
