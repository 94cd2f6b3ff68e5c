"""What the compiler makes of every configuration, for GPUs that are not here."""

import pytest
import torch

pytest.importorskip("triton")
if torch.version.hip is not None:
    pytest.skip("examines NVIDIA machine code", allow_module_level=True)

from benchmarks import aot  # noqa: E402

MATRIX_UNITS = {80: "HMMA", 90: "HGMMA", 100: "UTC", 120: "HMMA"}


@pytest.fixture(scope="module")
def reports():
    return aot.compile_all_in_subprocess()


def failures(reports, is_bad):
    return [
        f"{r.kernel} sm_{r.arch} {r.side} {r.dtype} {r.kind} {'wide' if r.wide else 'narrow'} {r.config}: {reason}"
        for r in reports
        if (reason := is_bad(r))
    ]


def test_every_case_has_a_report(reports):
    assert len(reports) == len(aot.cases()) > 100


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
    assert not failures(reports, lambda r: r.shared_bytes > aot.SHARED_LIMIT[r.arch] and r.shared_bytes)


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


def test_wide_accesses(reports):
    """Aligned shapes move 16 bytes an access, but for the two addresses of the table and found_inf."""

    def wrong(report):
        expected = {"LDG.E.64": 2} | ({"LDG.E": 1} if report.found_inf else {})
        return report.wide and report.narrow() != expected and report.narrow()

    assert not failures(reports, wrong)


def test_widths_are_read_off_the_instruction():
    widths = {"LDG.E.128": 128, "LDG.E.U16": 16, "LDGSTS.E.BYPASS.LTC128B.128": 128, "LDGSTS.E.LTC128B": 32, "STG.E": 32, "LDG.E.64": 64}
    assert {name: aot.access_bits(name) for name in widths} == widths
