"""The quality study measures what it says, and fails where a bar is missed."""

import math
import sys
from pathlib import Path

import pytest
import torch

import lowrank_kernels as lrk
from benchmarks import quality, sampling


@pytest.fixture
def decaying():
    """(G, exact U) of 60 × 150, σᵢ = 1/i, fp64's truth of it."""
    grad = quality.with_spectrum(60, 150, 1 / torch.arange(1.0, 61), torch.Generator().manual_seed(0))
    return grad, quality.Truth.of(grad)


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """The study puts the example's modules on the path."""
    monkeypatch.setattr(sys, "path", sys.path[:])


def random_basis(m, rank, seed=0):
    return torch.linalg.qr(torch.randn(m, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


@pytest.mark.parametrize("shape", [(60, 150), (150, 60)])
def test_truth_is_the_svd_of_either_orientation(shape):
    grad = quality.with_spectrum(*shape, 1 / torch.arange(1.0, 61), torch.Generator().manual_seed(0))
    truth = quality.Truth.of(grad)
    assert truth.sigma.tolist() == pytest.approx([1 / i for i in range(1, 61)], abs=1e-6)
    length = (truth.vectors.mT @ grad.double()).norm(dim=1)
    assert torch.allclose(length, truth.sigma, atol=1e-12)


def test_the_exact_basis_has_energy_one_and_a_random_one_its_share(decaying):
    _, truth = decaying
    exact = truth.vectors[:, :15]
    assert quality.captured_energy(exact, truth) == pytest.approx(1, abs=1e-12)
    assert quality.overlap(exact, truth) == pytest.approx(1, abs=1e-12)
    assert quality.defect(exact) <= 1e-13
    noise = torch.eye(60, 150, dtype=torch.float64)
    flat = quality.Truth.of(noise)
    energies = [quality.captured_energy(random_basis(60, 15, seed), truth) for seed in range(40)]
    share = 15 / 60 * truth.sigma.square().sum().item() / truth.sigma[:15].square().sum().item()
    assert sum(energies) / len(energies) == pytest.approx(share, rel=0.2)  # E‖PᵀG‖² = r/m·‖G‖²
    assert quality.captured_energy(random_basis(60, 15), flat) == pytest.approx(1)  # all directions alike: any basis is the best


def test_a_zero_gradient_has_energy_one_and_nothing_to_compare():
    truth = quality.Truth.of(torch.zeros(20, 30))
    basis = random_basis(20, 5)
    assert quality.captured_energy(basis, truth) == 1
    assert quality.overlap(basis, truth) is None
    assert quality.sigma_errors(torch.zeros(5), truth) == (None, 0)
    assert quality.sigma_errors(torch.ones(5), truth)[1] > 1


def test_defect_is_the_spectral_norm(decaying):
    basis = random_basis(60, 15)
    basis[:, 3] *= 1 + 1e-4
    assert quality.defect(basis) == pytest.approx(2e-4, rel=1e-3)
    basis[:, 4] = basis[:, 3]
    assert quality.defect(basis) == pytest.approx(1, rel=1e-3)
    assert math.isnan(quality.defect(basis.fill_(math.nan)))


def test_sigma_errors_are_of_the_leading_half_and_above_the_floor(decaying):
    _, truth = decaying
    found = truth.sigma[:15].clone()
    assert quality.sigma_errors(found, truth) == (0, None)
    found[14] *= 2  # in the trailing half
    assert quality.sigma_errors(found, truth) == (0, None)
    found[7] *= 1.03
    assert quality.sigma_errors(found, truth)[0] == pytest.approx(0.03)

    sigma = torch.cat([torch.ones(5), torch.full((55,), 1e-9)]).double()
    steep = quality.Truth(truth.grad, truth.vectors, sigma)
    found = sigma[:20].clone()
    found[6] = 3e-9
    relative, under = quality.sigma_errors(found, steep)
    assert relative == 0
    assert under == pytest.approx(2e-9)
    assert quality.overlap(truth.vectors[:, :20], steep) == pytest.approx(1)  # of the five directions above the floor


def test_the_families_have_the_spectra_that_they_are_named_for():
    matrices = list(quality.synthetic([(64, 96)], [0]))
    names = {(matrix.family, matrix.spectrum): torch.linalg.svdvals(matrix.grad.double()) for matrix in matrices}
    assert {family for family, _ in names} == {"decaying", "flat", "stepped", "rank-deficient"}
    assert names["decaying", "i^-2"][9] == pytest.approx(0.01, rel=1e-4)
    assert names["decaying", "geometric to 1e-4"][-1] == pytest.approx(1e-4, rel=1e-2)
    assert names["stepped", "r at 1, rest at 0.1"][15:17].tolist() == pytest.approx([1, 0.1], rel=1e-4)
    assert names["rank-deficient", "rank r/2, 1/i"][8] < 1e-6
    assert len(matrices) == len(names) == 26


def few_rows(quick):
    matrices = [matrix for matrix in quality.synthetic([(64, 96)], [0]) if matrix.spectrum in ("i^-1.5", "i^-2", "all equal")]
    return list(quality.study(matrices, quality.settings_of))


def test_a_study_ends_with_its_verdict_and_keeps_a_row_a_case(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(quality, "all_rows", few_rows)
    monkeypatch.setattr(sampling, "rows", lambda quick: [])
    assert quality.main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed and printed.count("PASS") == len(quality.BARS)
    (file,) = tmp_path.iterdir()
    assert file.read_text().count('"captured_energy"') == 3
    assert all(f'"{key}"' in file.read_text() for key in ("device", "commit", "time", "torch"))


def scaled_basis(basis, sigma):
    return basis * 1.0001, sigma


def scaled_sigma(basis, sigma):
    return basis, sigma * 1.02


def unrelated_basis(basis, sigma):
    return random_basis(*basis.shape).to(basis.dtype), sigma


def nothing(basis, sigma):
    return basis * math.nan, sigma * math.nan


@pytest.mark.parametrize("spoil, failures", [(scaled_basis, 1), (scaled_sigma, 2), (unrelated_basis, 1), (nothing, 5)])
def test_a_bad_basis_fails_the_study(monkeypatch, capsys, spoil, failures):
    sound = lrk.ops.range_finder
    monkeypatch.setattr(lrk.ops, "range_finder", lambda *arguments, **options: spoil(*sound(*arguments, **options)))
    monkeypatch.setattr(quality, "all_rows", few_rows)
    monkeypatch.setattr(sampling, "rows", lambda quick: [])
    assert quality.main(["--out", "-"]) == 1
    assert capsys.readouterr().out.count("FAIL") == failures


@pytest.fixture(scope="module")
def gradients():
    before = sys.path[:]
    captured = quality.captured_gradients((0, 2), data=Path(__file__), batch_size=2, seq_len=16)
    sys.path[:] = before
    return captured


def test_captured_gradients_are_those_of_the_projected_weights(gradients):
    assert len(gradients) == 14
    hidden, intermediate = 128, 352
    for name, by_step in gradients.items():
        assert list(by_step) == [0, 2]
        rows = intermediate if "gate" in name or "up_proj" in name else hidden
        columns = intermediate if "down" in name else hidden
        for grad in by_step.values():
            assert grad.shape == (rows, columns) and grad.dtype == torch.float32
            assert grad.isfinite().all() and grad.norm() > 0
        assert not torch.equal(by_step[0], by_step[2])


def small_case(rank=None):
    sigma = 1 / torch.arange(1.0, 25)
    return sampling.Case("1/i", quality.with_spectrum(24, 40, sigma[:rank], torch.Generator().manual_seed(0)), rank)


def row_of(law, bases):
    return {"spectrum": "1/i", "rows": 24, "columns": 40, "rank_share": "m/4", "way": "operator"} | sampling.measure(law, bases)


def test_exact_draws_hold_and_the_leading_directions_do_not(monkeypatch, capsys):
    law = sampling.Law(small_case(), 6)
    drawn = [(seed, law.vectors[:, law.with_noise(seed) > 0]) for seed in range(200)]
    leading = [(seed, law.vectors[:, :6]) for seed in range(200)]
    good, bad = row_of(law, drawn), row_of(law, leading)
    assert good["top"] == pytest.approx(good["top_exact"]) and good["mass"] == pytest.approx(good["mass_exact"])
    assert sampling.holds(good) and not sampling.holds(bad)
    assert not sampling.holds(good | {"top": math.nan})
    monkeypatch.setattr(quality, "all_rows", few_rows)
    for row, verdict in ((good, 0), (bad, 1)):
        monkeypatch.setattr(sampling, "rows", lambda quick, row=row: [row])
        assert quality.main(["--out", "-"]) == verdict
        printed = capsys.readouterr().out
        assert f"{row['top_exact']:.3f}" in printed and ("FAIL" in printed) == bool(verdict)


def test_null_space_counts_only_what_could_be_avoided():
    law = sampling.Law(small_case(rank=4), 6)
    assert law.null(law.of_basis(law.vectors[:, :6])) == pytest.approx(0, abs=1e-9)
    assert law.null(law.of_basis(law.vectors[:, 1:7])) == pytest.approx(1 / 6)


def test_equal_values_share_what_their_directions_have():
    law = sampling.Law(sampling.Case("flat", torch.eye(24, 40)), 6)
    assert law.top(law.of_basis(law.vectors[:, :6])) == pytest.approx(0.25)
    assert law.mass(law.of_basis(law.vectors[:, :6])) == pytest.approx(0.5)
