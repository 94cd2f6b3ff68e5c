"""What the compiler makes of every configuration, for GPUs that are not here."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.version.hip is not None:
    pytest.skip("examines NVIDIA machine code", allow_module_level=True)

from benchmarks import aot, dry  # noqa: E402

MATRIX_UNITS = {80: "HMMA", 90: "HGMMA", 100: "UTC", 120: "HMMA"}


@pytest.fixture(scope="module")
def complete(request):
    """All cases are judged, not a sample: with --all, or of the file that AOT_REPORTS names."""
    return "AOT_REPORTS" in os.environ or request.config.getoption("--all")


@pytest.fixture(scope="module")
def reports(tmp_path_factory, complete):
    """Of the file that AOT_REPORTS names, which `python -m benchmarks.aot --json` wrote. Else compiled once a
    session: with several workers of pytest-xdist the first one to get here does it, the others wait for its
    file."""
    if path := os.environ.get("AOT_REPORTS"):
        return aot.read(Path(path))
    options = [] if complete else ["--sample", "--workers", "1"]
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return aot.compile_in_subprocess(*options)
    shared = tmp_path_factory.getbasetemp().parent
    result, unfinished = shared / "aot.json", shared / f"aot-{os.getpid()}.json"
    try:
        os.close(os.open(shared / "aot.lock", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        deadline = time.monotonic() + 1800
        while not result.exists():
            assert time.monotonic() < deadline, "the worker that compiles the kernels did not finish"
            time.sleep(0.5)
    else:
        try:
            aot.write(aot.compile_in_subprocess(*options), unfinished)
        except BaseException as error:
            unfinished.write_text(json.dumps(f"{type(error).__name__}: {error}"))
            raise
        finally:
            unfinished.rename(result)
    found = json.loads(result.read_text())
    assert isinstance(found, list), found
    return aot.read(result)


def failures(reports, is_bad):
    return [
        f"{r.kernel} sm_{r.arch} {r.side} {r.dtype} {r.kind} {'wide' if r.wide else 'narrow'} {r.options} {r.config}: {reason}"
        for r in reports
        if (reason := is_bad(r))
    ]


def test_every_case_has_a_report(reports, complete):
    assert len(reports) == len(aot.cases() if complete else aot.sample())
    assert len(aot.cases()) > 100


def test_the_sample_has_what_each_kernel_can_do():
    for kernel in ("project", "moments", "back_project", "single_pass"):
        all_cases, sample = ([case for case in cases if case.kernel == kernel] for cases in (aot.cases(), aot.sample()))
        assert 3 <= len(sample) <= 4 and set(sample) < set(all_cases)
        for what in ("kind", "wide", "right"):
            found = {getattr(case, what) for case in sample}
            assert found == {getattr(case, what) for case in all_cases if case.arch == 90}, (kernel, what)
        assert {option for case in sample for option in case.options} == {option for case in all_cases for option in case.options}


def test_every_configuration_is_compiled():
    covered = {(case.kernel, case.config) for case in aot.cases()}
    assert {(kernel, config) for kernel, _, config in aot.all_configs()} == covered
    for kernel, arch, config in aot.all_configs():
        if arch is not None:
            sides = {case.right for case in aot.cases() if (case.kernel, case.arch, case.config) == (kernel, arch, config)}
            assert sides == {False, True}, (kernel, arch, config)


def test_launchers_choose_the_row_that_is_meant(reports):
    assert not failures(reports, lambda r: r.config != r.wanted_config and f"meant {r.wanted_config}")


def test_nothing_spills(reports):
    assert not failures(reports, lambda r: r.local_accesses or r.local_bytes or r.stack_bytes)


def test_shared_memory_fits(reports):
    assert not failures(reports, lambda r: r.shared_bytes > dry.SHARED_LIMIT[r.arch] and r.shared_bytes)


def test_no_fp64(reports):
    assert not failures(reports, lambda r: r.fp64)


def test_tensor_cores(reports):
    """16-bit and tf32 dots run on the newest matrix unit, wgmma and tcgen05 included; ieee ones on none."""

    def wrong(report):
        units = list(report.tensor_cores)
        if report.kind in ("ieee", "elementwise"):
            return units
        return (not units or not all(unit.startswith(MATRIX_UNITS[report.arch]) for unit in units)) and f"uses {units}"

    assert not failures(reports, wrong)


def expected_narrow_accesses(report):
    """What a wide shape loads and stores in less than 16 bytes a thread: numbers of a matrix, and scales of
    8-bit moments."""
    coded, stochastic, on_device = (option in report.options for option in aot.OPTIONS)
    if report.kernel != "single_pass":
        # Addresses of two matrices, two rows of scales, a counter; the seed.
        counted = on_device and (stochastic or report.kernel == "moments")
        counts = {"LDG.E.64": 2 + 2 * coded + counted + stochastic, "LDG.E": report.found_inf + counted}
        counts["LDG.E"] += on_device and report.kernel == "back_project"  # lr
        if coded:
            # A thread has 4 neighbours: 16 bytes of R, and with its warp 128 bytes in a row of codes. More
            # would cost registers.
            counts["LDG.E"] += 2 + 2
            counts["STG.E"] = 2 + 2
            counts["STG.E.64"] = int(report.normalised == "bf16")
        return {name: count for name, count in counts.items() if count}
    # Addresses, the seed; t and the learning rate.
    counts = {"LDG.E.64": 5 + 2 * coded + stochastic + on_device}
    counts["LDG.E"] = report.found_inf + 2 * on_device
    if coded:
        # A slice has one scale a row for each 64 columns, and so fewer than there are threads.
        slices, threads = report.config["SLICES"], 32 * report.config["num_warps"]
        counts["LDG.E"] += 2 * slices
        counts["STG.E"] = 2 * slices
        elements = report.config["BLOCK_R"] // slices * report.config["BLOCK_N"] // threads
        if elements == 8:  # a slice of codes has no 16 bytes for each thread
            counts["LDG.E.64"] += 2 * slices
            counts["STG.E.64"] = 2 * slices
    return {name: count for name, count in counts.items() if count}


def test_wide_accesses(reports):
    """Aligned shapes move 16 bytes an access, but for numbers of a matrix: table, found_inf, steps, seeds,
    scales."""
    assert not failures(reports, lambda r: r.wide and r.narrow() != expected_narrow_accesses(r) and r.narrow())


def test_widths_are_read_off_the_instruction():
    widths = {"LDG.E.128": 128, "LDG.E.U16": 16, "LDGSTS.E.BYPASS.LTC128B.128": 128, "LDGSTS.E.LTC128B": 32, "STG.E": 32, "LDG.E.64": 64}
    assert {name: aot.access_bits(name) for name in widths} == widths
