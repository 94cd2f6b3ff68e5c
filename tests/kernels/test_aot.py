"""What the compiler makes of every row of tiles, for GPUs that are not here."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.version.hip is not None:
    pytest.skip("examines NVIDIA machine code", allow_module_level=True)

from benchmarks import dry, sass  # noqa: E402
from benchmarks.aot import cases, compiling  # noqa: E402

MATRIX_UNITS = {80: "HMMA", 90: "HGMMA", 100: "UTC", 120: "HMMA", cases.AMD: "v_mfma"}
KERNELS = ("single_pass", "project_moments", "back_project", "project", "moments")
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


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
        return compiling.read(Path(path))
    options = [] if complete else ["--sample", "--workers", "1"]
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return compiling.compile_in_subprocess(*options)
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
            compiling.write(compiling.compile_in_subprocess(*options), unfinished)
        except BaseException as error:
            unfinished.write_text(json.dumps(f"{type(error).__name__}: {error}"))
            raise
        finally:
            unfinished.rename(result)
    found = json.loads(result.read_text())
    assert isinstance(found, list), found
    return compiling.read(result)


def failures(reports, is_bad):
    return [f"{report.name}: {reason}" for report in reports if (reason := is_bad(report))]


def nvidia(reports, *kernels):
    return [report for report in reports if report.arch != cases.AMD and (not kernels or report.kernel in kernels)]


def wide(reports, *kernels):
    return [report for report in nvidia(reports, *kernels) if report.shape == "wide"]


def threads(report):
    return 32 * report.config["num_warps"]


def copies(report, rows, columns, dtype):
    """16-byte accesses with which each thread moves its part of a tile."""
    return report.config[rows] * report.config[columns] * BYTES[dtype] // 16 // threads(report)


def elements(report):
    """Elements of M that a thread updates."""
    config = report.config
    tile = config["ROWS"] * config["COLUMNS"] if report.kernel == "moments" else config["BLOCK_R"] * config["BLOCK_N"]
    return tile // threads(report)


def test_every_case_has_a_report(reports, complete):
    chosen = cases.cases() if complete else cases.sample()
    assert [report.name for report in reports] == [case.name for case in chosen]
    assert len({case.name for case in cases.cases()}) == len(cases.cases()) > 300


def test_the_sample_has_what_each_kernel_can_do():
    for kernel in KERNELS:
        every, sample = ([case for case in found if case.kernel == kernel] for found in (cases.cases(), cases.sample()))
        assert 3 <= len(sample) <= 14 and set(sample) < set(every)
        for what in ("kind", "shape", "right"):
            found = {getattr(case, what) for case in sample}
            assert found == {getattr(case, what) for case in every if case.arch == 90}, (kernel, what)
        assert {option for case in sample for option in case.options} == {option for case in every for option in case.options}


def test_every_row_is_compiled():
    """On both sides where it is the architecture's own."""
    compiled = {(case.kernel, case.arch, case.config, case.right) for case in cases.cases()}
    for row in cases.rows():
        if row.arch is not None:
            assert all((row.kernel, row.arch, row.config, right) in compiled for right in (False, True)), row
        elif row.kernel != "single_pass":  # there it serves the interpreter alone
            sides = [{(row.kernel, target, row.config, right) for right in (False, True)} for target in cases.SMALL_TILE_TARGETS]
            assert all(side & compiled for side in sides), row


def test_every_kernel_has_every_option():
    """Of the rows of sm_90, the large ones included."""
    for row in cases.rows():
        if (row.kernel, row.arch, row.kind) == ("single_pass", 90, "16bit"):
            same = [case for case in cases.cases() if (case.kernel, case.arch, case.config) == (row.kernel, row.arch, row.config)]
            assert {option for case in same for option in case.options} >= {"stochastic", "lr on device", "R from memory"}, row


def test_launchers_choose_the_row_that_is_meant(reports):
    assert not failures(reports, lambda r: r.config != r.wanted_config and f"{r.config}, meant {r.wanted_config}")


def test_no_local_memory_in_loops(reports):
    """Spills outside of loops are in the table. They are what two programs on a multiprocessor cost."""
    assert not failures(reports, lambda r: r.hot_spills)


def test_a_multiprocessor_has_room(reports):
    """For the shared memory of a program, and for the registers of its threads."""
    assert not failures(reports, lambda r: r.shared_bytes > dry.SHARED_LIMIT[r.arch] and r.shared_bytes)
    assert not failures(nvidia(reports), lambda r: r.programs < 1 and f"{r.registers} registers in each of {threads(r)} threads")


def test_warps_of_a_multiprocessor(reports):
    """On sm_90 in 16 bits the large tiles leave room for 16 warps, which overlap each other's waits. In the
    single pass at r = 256 they are 8: with 16 the right side spills in its loop."""

    def too_few(report):
        warps = report.programs * report.config["num_warps"]
        most = 8 if report.kernel == "single_pass" and report.config["BLOCK_R"] > 128 else 16
        return report.config["BLOCK_R"] >= 128 and warps < most and f"{warps} warps"

    large = [r for r in wide(reports, "single_pass", "project_moments") if r.arch == 90 and r.kind == "16bit"]
    assert not failures(large, too_few)


def test_no_fp64(reports):
    assert not failures(reports, lambda r: r.fp64)


def test_tensor_cores(reports):
    """16-bit and tf32 dots run on the newest matrix unit, wgmma and tcgen05 included; ieee ones on none."""

    def wrong(report):
        units = list(report.tensor_cores)
        if report.kind == "elementwise" or report.kind == "ieee" and report.arch != cases.AMD:
            return units
        return (not units or not all(unit.startswith(MATRIX_UNITS[report.arch]) for unit in units)) and f"uses {units}"

    assert not failures(reports, wrong)


def test_w_comes_by_the_pipeline(reports):
    """Where a row says so, the loop that updates W copies it asynchronously, and copies are under way while
    it waits. Else it loads the next tile into registers. P comes with W; on sm_80 the right side may load it,
    with the hint that it should stay in the cache."""

    def wrong(report):
        of_w, of_p = copies(report, "BLOCK_M", "BLOCK_N", report.dtype), copies(report, "BLOCK_M", "BLOCK_R", report.dtype)
        loop = report.w_loop
        if loop is None:
            return "no loop updates W"
        if loop.stores != of_w:
            return f"{loop.stores} stores of W, {of_w} expected"
        if report.config["W_STAGES"] is None:
            of_moments = 2 * elements(report) * BYTES["fp32"] // 16
            before = report.global_accesses.get("LDG.E.EF.128", 0) - of_moments - loop.loads
            return (before, loop.loads) != (of_w, of_w) and f"{loop.loads} loads of W, {before} before the loop, {of_w} expected"
        loads_p = report.arch == 80 and report.global_accesses.get("LDG.E.EL.128", 0) >= of_p
        if (loop.copies, loop.loads) != ((of_w, of_p) if loads_p else (of_w + of_p, 0)):
            return f"{loop.copies} asynchronous copies and {loop.loads} loads, {of_w} + {of_p} expected"
        return not loop.waits and f"waits for all but {loop.waits} copies"

    assert not failures([r for r in nvidia(reports, "single_pass") if r.shape != "narrow"], wrong)


def test_the_sum_over_m_is_pipelined(reports):
    """In the loop before, copies of P and G are under way while it waits."""

    def wrong(report):
        loop = next((loop for loop in report.loops if not loop.stores), None)
        return (loop is None or not loop.copies or not loop.waits) and f"{loop}"

    with_g = [r for r in wide(reports, "single_pass", "project_moments", "project") if "R from memory" not in r.options]
    assert not failures([r for r in with_g if r.kind != "ieee" and r.config["num_stages"] > 2], wrong)


def test_the_right_side_is_turned(reports):
    """Tiles of W are updated as they are stored. Turning each of them would take more barriers."""
    on_the_right = [r for r in wide(reports, "single_pass") if r.side == "right" and r.arch == 90 and r.kind == "16bit"]
    assert not failures([r for r in on_the_right if "stochastic" not in r.options], lambda r: r.w_loop.barriers > 4 and r.w_loop.barriers)


def test_back_projection_asks_for_w_first(reports):
    """Before it sums over the directions."""
    assert not failures(wide(reports, "back_project"), lambda r: r.loads_after_loops)


def test_one_division_an_element(reports):
    """N takes one correctly rounded division. Those by the two bias corrections are products. 8-bit moments
    take one for each scale that a thread needs."""

    def wrong(report):
        slices = report.config.get("SLICES", 1)
        most = elements(report) + 4 + 2 * slices * ("8-bit" in report.options)
        return report.reciprocals > most and f"{report.reciprocals} reciprocals, {most} at most"

    assert not failures(wide(reports, "single_pass", "project_moments", "moments"), wrong)


def test_cache_hints_and_slices(reports):
    """W and the moments leave the cache first, P stays. The moments are loaded and stored slice by slice."""

    def wrong(report):
        found = report.evictions
        if report.kernel == "back_project":
            return found != {"load first": 1, "store first": 1} and found
        slices, of_w = report.config["SLICES"], report.kernel == "single_pass"
        stores = found.get("store first", 0) - 2 * slices  # of W; where the loop's last turn stands behind it, two
        good = stores in ((1, 2) if of_w else (0,)) and found.get("load first", 0) >= 2 * slices + of_w
        if of_w:  # G, P, W and the moments have hints; scales and R do not
            good &= report.loads_without == 2 * slices * ("8-bit" in report.options) + slices * ("R from memory" in report.options)
        return not (good and found.get("load last")) and f"{found} and {report.loads_without} without, in {slices} slices"

    assert not failures(nvidia(reports, "single_pass", "project_moments", "back_project"), wrong)


def test_barrier_before_scales(reports):
    """All warps have loaded a block's scale of 8-bit moments before one of them stores it."""

    def wrong(report):
        stores = 2 * report.config.get("SLICES", 1)
        if report.scale_stores != stores:
            return f"{report.scale_stores} stores of scales, {stores} expected"
        return report.unguarded_scale_stores

    assert not failures([r for r in reports if "8-bit" in r.options], wrong)


def expected_narrow_accesses(report):
    """What a wide shape loads and stores in less than 16 bytes a thread: numbers of a matrix, scales of 8-bit
    moments, and what a slice has less than 16 bytes of for each thread. Names are those of instructions."""
    coded, stochastic, on_device, from_memory = (option in report.options for option in cases.OPTIONS[:4])
    counted = report.kernel in ("single_pass", "project_moments", "moments")
    again = stochastic and report.kernel == "back_project"  # the count, for the rounding
    addresses = {"single_pass": 6, "project_moments": 5, "moments": 4, "back_project": 2, "project": 2}[report.kernel]
    counts = {"LDG.E.64": addresses + 2 * coded + again + stochastic}
    counts["LDG.E"] = (report.kernel != "project") + counted + again + on_device  # found_inf and lr among them
    if counted:
        slices = report.config.get("SLICES", 1)
        hint = "" if report.kernel == "moments" else ".EF"
        of_a_slice = elements(report) // slices

        def moved(operation, bytes_, times):
            if bytes_ < 16:
                name = operation + {4: "", 8: ".64"}[bytes_]
                counts[name] = counts.get(name, 0) + times

        moved("LDG.E", 4, 2 * slices * coded)
        moved("STG.E", 4, 2 * slices * coded)
        moved(f"LDG.E{hint}", of_a_slice * (1 if coded else 4), 2 * slices)
        moved(f"STG.E{hint}", of_a_slice * (1 if coded else 4), 2 * slices)
        if report.kernel != "single_pass":
            moved("STG.E", of_a_slice * BYTES[report.normalised], slices)
        if report.kernel == "moments" or from_memory:
            moved("LDG.E", of_a_slice * BYTES[report.normalised if report.kernel == "moments" else report.dtype], slices)
    return {name: count for name, count in counts.items() if count}


def test_wide_accesses_of_lifts(reports):
    """Tiles of W, G, P, R and N move 16 bytes an access. Narrow are numbers of a matrix, and those of
    columns: factors, and sums of squares, in fp32."""

    def wrong(report):
        if report.kernel == "project_moments":
            return report.narrow().get("STG.E") != 3 and f"{report.narrow()}"
        narrow = report.narrow()
        tile = {"residual": ("BLOCK_M", "BLOCK_N"), "residual_norm": ("BLOCK_M", "BLOCK_N"), "scaling": ("ROWS", "COLUMNS")}[report.kernel]
        of_tile = copies(report, *tile, report.dtype)
        moved = sum(count for name, count in report.global_accesses.items() if sass.access_bits(name) >= 128)
        least = of_tile * (1 if report.kernel == "residual_norm" else 3)  # G; W in and out
        strange = narrow.keys() - {"LDG.E", "LDG.E.64", "STG.E"}
        return (strange or narrow.get("STG.E", 0) > 4 or moved < least) and f"{narrow}, {moved} of 16 bytes"

    of_lifts = [r for r in wide(reports, "project_moments") if {"R to memory", "squares of G"} & set(r.options)]
    assert not failures([*of_lifts, *wide(reports, "residual", "residual_norm", "scaling")], wrong)


def test_wide_accesses(reports):
    """Aligned shapes move 16 bytes an access, but for what is named above."""

    def wrong(report):
        expected = expected_narrow_accesses(report)
        return report.narrow() != expected and f"{report.narrow()}, expected {expected}"

    of_steps = [r for r in wide(reports, *KERNELS) if not {"R to memory", "squares of G"} & set(r.options)]
    assert not failures(of_steps, wrong)


def test_a_ragged_n_keeps_the_wide_accesses(reports):
    """(5461, 2048) on the right side: W, G and P move 16 bytes an access. The moments, whose rows are 5461
    long, cannot."""

    def wrong(report):
        of_g, of_p = copies(report, "BLOCK_K", "BLOCK_N", report.dtype), copies(report, "BLOCK_K", "BLOCK_R", report.dtype)
        return report.loops[0].copies != of_g + of_p and f"{report.loops[0].copies} copies of G and P"

    ragged = [report for report in nvidia(reports, "single_pass", "project_moments") if report.shape == "ragged"]
    assert ragged and {report.kernel for report in ragged} == {"single_pass", "project_moments"}
    assert not failures(ragged, wrong)  # test_w_comes_by_the_pipeline has W


def test_every_kernel_is_compiled_for_amd():
    """Both sides and both kinds of moments."""
    found = [case for case in cases.cases() if case.arch == cases.AMD]
    assert {case.kernel for case in found} == {*KERNELS, "residual"}
    for kernel in KERNELS[:4]:
        assert {case.right for case in found if case.kernel == kernel} == {False, True}
    for kernel in ("single_pass", "project_moments", "moments"):
        assert {case.has("8-bit") for case in found if case.kernel == kernel} == {False, True}


def test_widths_are_read_off_the_instruction():
    widths = {"LDG.E.128": 128, "LDG.E.U16": 16, "LDGSTS.E.BYPASS.LTC128B.128": 128, "LDGSTS.E.LTC128B": 32, "STG.E": 32, "LDG.E.64": 64}
    assert {name: sass.access_bits(name) for name in widths} == widths
