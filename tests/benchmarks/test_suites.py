"""Every suite end to end on a tiny model: rows with all their fields, nothing wrong timed, nothing skipped
without a reason."""

import builtins
import contextlib
import dataclasses
import json
import math
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from matrix import pairwise

import lowrank_kernels as lrk
from benchmarks import __main__ as command
from benchmarks import cases, ceilings, checks, contenders, formulas, memory, records, shapes, suites, timing
from benchmarks.cases import Budget, Context, Selection, Unavailable
from benchmarks.roofline import Machine, total
from benchmarks.suites import gradients, host, kernel, refresh, step
from benchmarks.suites import memory as memory_suite
from lowrank_kernels.backends import reference

HALF, SINGLE = torch.bfloat16, torch.float32
MACHINE = Machine("made up", 10.0, {SINGLE: 0.1, HALF: 0.1, torch.float16: 0.1})
HERE = Context(on_gpu=False, seconds=0.05, machine=MACHINE)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What `python -m benchmarks` writes and prints for the tiny model in a second."""
    folder = tmp_path_factory.mktemp("results")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "print", lambda *words, **options: printed.append(" ".join(map(str, words))))
        patch.setitem(contenders.STEP, "formulas, torch.compile", unavailable)  # it would compile for half a minute
        patch.setattr(command, "print_rows", lambda rows: printed.append(f"{len(rows)} rows"))
        patch.setattr(Context, "measuring_s", lambda self: 0.03)
        command.main([*"--models tiny --ranks 8 --dtypes fp32 bf16 --seconds 500 --commit abc1234 --out".split(), str(folder)])
    [file] = folder.glob("*/*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert not records.failed(rows)
    return file, [row for row in rows if records.is_measured(row)], printed


def of_suite(rows, suite):
    return [row for row in rows if row["suite"] == suite]


def test_a_run_leaves_one_file_with_rows_of_every_suite(measured):
    file, rows, printed = measured
    assert file.name.endswith("-abc1234.jsonl") and file.parent.name == rows[0]["device"]
    assert {row["suite"] for row in rows} == set(suites.SUITES)
    assert all(row["case"].startswith(f"{row['suite']} ") and not row["quick"] for row in rows)
    assert len({(row["case"], row["contender"]) for row in rows}) == len(rows)
    for key in (
        "device",
        "time",
        "commit",
        "torch",
        "versions",
        "copy_gb_per_s",
        "matmul_tflop_per_s_float32",
        "matmul_tflop_per_s_bfloat16",
    ):
        assert all(row[key] for row in rows)
    assert all(row["rank"] == (host.RANK if row["suite"] == "host" else 8) and row["dtype"] in ("float32", "bfloat16") for row in rows)
    assert any("need one" in line and "Triton" in line for line in printed) == (not torch.cuda.is_available())


def test_timed_rows_have_all_their_figures(measured):
    timed = [row for row in measured[1] if row["suite"] != "memory"]
    for row in timed:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["rounds"] >= 1 and row["shapes"]
        assert (row["ratio_to_ours"] == 1) == (row["contender"] == "lowrank_kernels")
    for row in timed:
        if row["contender"].startswith("lowrank_kernels") and row["suite"] not in ("host", "gradients"):
            assert row["percent_of_ceiling"] == pytest.approx(100 * row["predicted_ms"] / row["p50_ms"])
            assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["p50_ms"] / 1e6)
            assert row["tflop_per_s"] == pytest.approx(row["flops"] / row["p50_ms"] / 1e9)
            baselines = [other for other in timed if other["case"] == row["case"] and not other["contender"].startswith("lowrank_kernels")]
            strongest = min(baselines, key=lambda other: other["p50_ms"])
            assert row["strongest_baseline"] == strongest["contender"]
            assert row["speedup"] == pytest.approx(strongest["p50_ms"] / row["p50_ms"])


def test_the_step_suite_compares_all_that_runs_here(measured):
    found = {
        dtype: [row["contender"] for row in of_suite(measured[1], "step") if row["dtype"] == dtype] for dtype in ("float32", "bfloat16")
    }
    for dtype, names in found.items():
        skipped = [name for name in contenders.STEP if any(f"{dtype}: {name} skipped: " in line for line in measured[2])]
        wanted = [name for name in contenders.STEP if contenders.applies(name, getattr(torch, dtype))]
        assert sorted(names + skipped) == sorted(wanted)
        assert {"lowrank_kernels", "lowrank_kernels, 8-bit states", "formulas in PyTorch", "AdamW(fused=True), full rank"} <= set(names)
    assert "lowrank_kernels, stochastic rounding" in found["bfloat16"] and "lowrank_kernels, stochastic rounding" not in found["float32"]
    assert all("update_error" in row for row in of_suite(measured[1], "step") if row["contender"] in contenders.OURS)


def test_the_kernel_suite_times_every_part_on_each_shape(measured):
    found = of_suite(measured[1], "kernel")
    assert {row["op"] for row in found} == ({"step"} | set(kernel.PARTS))
    assert {row["state_bits"] for row in found if row["op"] == "step"} == {32, 8}
    assert {row["side"] for row in found} == {"left", "right"}
    ours = [row for row in found if row["contender"] == "lowrank_kernels"]
    assert len(ours) == 3 * 2 * 5 and all("error" in row for row in ours)
    assert {row["contender"] for row in found} == {"lowrank_kernels", "formulas in PyTorch", "native products"}


def test_the_memory_suite_weighs_states_and_steps(measured):
    half = {row["contender"]: row for row in of_suite(measured[1], "memory") if row["dtype"] == "bfloat16"}
    elements = shapes.elements("tiny")
    assert half["AdamW, bfloat16 states"]["state_mb"] * 1e6 == pytest.approx(4 * elements, rel=0.01)  # and a counter each
    assert half["AdamW, float32 states"]["state_mb"] * 1e6 == pytest.approx(8 * elements, rel=0.01)
    for name in ("lowrank_kernels", "lowrank_kernels, 8-bit states"):
        assert half[name]["state_mb"] == half[name]["theory_mb"] > 0 and half[name]["step_peak_mb"] > 0
        assert half[name]["ratio_to_ours"] == half[name]["state_mb"] / half["lowrank_kernels"]["state_mb"]
    assert {row["contender"] for row in of_suite(measured[1], "memory") if row["dtype"] == "float32"} >= {"AdamW, float32 states"}


def test_the_gradients_suite_counts_what_is_sent_and_held(measured):
    half = {row["contender"]: row for row in of_suite(measured[1], "gradients") if row["dtype"] == "bfloat16"}
    assert set(half) == set(gradients.CONTENDERS)
    full, ours, inside = half[gradients.FULL], half["lowrank_kernels"], half[gradients.IN_BACKWARD]
    assert full["sent_mb"] == full["refresh_sent_mb"] == full["gradient_mb"] == ours["gradient_mb"] == ours["refresh_sent_mb"]
    assert ours["sent_mb"] * 2 == inside["sent_mb"] == inside["gradient_mb"] < full["sent_mb"]  # R is fp32 there
    assert half[gradients.AT_ONCE]["gradient_mb"] == 0 < half[gradients.RSO]["sent_mb"] < full["sent_mb"]


def test_the_gradients_suite_puts_no_times_of_a_cpu_under_a_gpus_name():
    with pytest.raises(cases.Unavailable, match="say nothing about a GPU"):
        gradients.run(gradients.GradientsCase("60m", 8, SINGLE), dataclasses.replace(HERE, on_gpu=True))


def test_results_are_appended(measured, tmp_path):
    path = tmp_path / "x.jsonl"
    for _ in range(2):
        command.append(path, measured[1][:3])
    assert len(path.read_text().splitlines()) == 6


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_labels_are_unique_and_name_their_suite(on_gpu, quick):
    for name, suite in suites.SUITES.items():
        labels = [case.label for case in suite.cases(Selection(quick=quick), on_gpu)]
        assert labels and len(set(labels)) == len(labels)
        assert all(label.startswith(f"{name} ") for label in labels)


def test_the_command_line_chooses_cases(capsys):
    selection = Selection(models=("tiny", "60m"), ranks=(16, 64, 512), dtypes=(HALF,))
    labels = [case.label for case in step.cases(selection, on_gpu=True)]
    assert labels == ["step tiny r=16 bfloat16", *(f"step 60m r={rank} bfloat16" for rank in (16, 64, 512))]
    assert "tiny r=64 skipped: its narrowest matrix has 32 directions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.parse(["--models", "70b"])
    assert "unknown model '70b'" in capsys.readouterr().err
    assert command.parse(["--suite", "step", "--suite", "memory"]).suite == ["step", "memory"]


def test_a_case_that_does_not_fit_is_skipped_with_its_size(monkeypatch):
    monkeypatch.setattr(cases, "free_bytes", lambda on_gpu: 10**6)
    monkeypatch.setattr(contenders, "make_params", None)
    for suite, case in (
        (step, step.StepCase("7b", 128, HALF)),
        (kernel, kernel.KernelCase("project", 32, 4096, 11008, 128, HALF)),
        (refresh, refresh.RefreshCase("7b", 128)),
    ):
        [row] = command.measure(suite, case, HERE)
        assert (row["case"], row["contender"]) == (case.label, records.ALL) and row["skipped"].startswith("needs about")
    rows = memory_suite.run(memory_suite.MemoryCase("7b", 128, HALF), HERE)
    assert rows and all(row["skipped"].startswith("needs about") for row in rows)


# A contender that is missing or fails.


def unavailable(params, rank):
    raise Unavailable("not on a Tuesday")


def failing(params, rank):
    raise RuntimeError("no such instruction\nand a long trace")


def test_what_cannot_run_is_skipped_with_a_reason(monkeypatch, capsys):
    chosen = {name: contenders.STEP[name] for name in ("lowrank_kernels", "AdamW(fused=True), full rank")}
    monkeypatch.setattr(contenders, "STEP", chosen | {"peer": unavailable, "other": failing})
    *rows, peer, other = step.run(step.StepCase("tiny", 8, SINGLE), HERE)
    assert [row["contender"] for row in rows] == list(chosen)
    origin = {"case": "step tiny r=8 float32", "suite": "step"}
    assert peer == origin | {"contender": "peer", "skipped": "not on a Tuesday"}
    assert other == origin | {"contender": "other", "failure": "RuntimeError: no such instruction"}
    printed = capsys.readouterr().out
    assert "step tiny r=8 float32: peer skipped: not on a Tuesday\n" in printed
    assert "step tiny r=8 float32: other FAILED: RuntimeError: no such instruction\n" in printed
    assert not records.failed([peer, other]), "neither is this package's"


def test_what_runs_out_of_memory_is_skipped_before_the_clock_starts(monkeypatch):
    def full(params, rank):
        def step():
            raise torch.OutOfMemoryError("tried to allocate much")

        return contenders.Built(step, {})

    monkeypatch.setattr(contenders, "STEP", {"lowrank_kernels": contenders.STEP["lowrank_kernels"], "large": full})
    ours, large = step.run(step.StepCase("tiny", 8, SINGLE), HERE)
    assert ours["contender"] == "lowrank_kernels" and large["skipped"] == "OutOfMemoryError: tried to allocate much"


def test_a_failure_of_ours_is_its_own_row_and_the_rest_goes_on(monkeypatch):
    """Of one variant; the others are timed. Without the first there is nothing to compare with, and nothing
    is."""
    chosen = {name: contenders.STEP[name] for name in ("lowrank_kernels", "AdamW(fused=True), full rank")}
    variant = "lowrank_kernels, 8-bit states"
    monkeypatch.setattr(contenders, "STEP", chosen | {variant: failing})
    *rows, broken = step.run(step.StepCase("tiny", 8, SINGLE), HERE)
    assert [row["contender"] for row in rows] == list(chosen) and all(row["p50_ms"] for row in rows)
    assert broken["contender"] == variant and broken["failure"] == "RuntimeError: no such instruction"
    assert records.failed([*rows, broken]) == [broken]
    monkeypatch.setattr(contenders, "STEP", chosen | {"lowrank_kernels": failing})
    [broken] = step.run(step.StepCase("tiny", 8, SINGLE), HERE)
    assert broken["contender"] == "lowrank_kernels"


def short_run(folder, *options):
    """Rows of `python -m benchmarks` for steps of two models and the kernel parts, and the exit status."""
    arguments = "--suite step --suite kernel --models tiny 3x16 --ranks 8 --dtypes fp32 --commit abc --out"
    code = 0
    try:
        command.main([*arguments.split(), str(folder), *options])
    except SystemExit as stopped:
        code = stopped.code
    [file] = folder.glob("*/*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()], code


@pytest.fixture
def no_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda on_gpu, seconds: {"copy_gb_per_s": 10.0, "matmul_tflop_per_s_float32": 0.1})


def test_a_run_goes_on_past_what_fails_and_exits_with_it(monkeypatch, tmp_path, no_ceilings):
    monkeypatch.setattr(contenders, "STEP", {name: contenders.STEP[name] for name in ("lowrank_kernels", "formulas in PyTorch")})
    monkeypatch.setattr(Context, "measuring_s", lambda self: 0.01)
    rows, code = short_run(tmp_path / "sound", "--seconds", "100")
    assert code == 0 and not any("failure" in row for row in rows)
    monkeypatch.setattr(step.StepCase, "bytes_needed", lambda self, with_baselines: 1 // 0)
    monkeypatch.setattr(kernel.cpu, "project", lambda bases, grads, right: [torch.zeros(8, 48)] * len(grads))
    rows, code = short_run(tmp_path / "broken", "--seconds", "100")
    wrong = [row for row in rows if "failure" in row]
    assert {row["contender"] for row in wrong if row["suite"] == "step"} == {records.ALL}
    assert {row["failure"].partition(":")[0] for row in wrong} >= {"ZeroDivisionError", "WrongResult"}
    assert "could not be measured" in str(code) and str(code).startswith(f"{len(wrong)} ")
    assert {row["op"] for row in rows if records.is_measured(row)} >= {"moments", "back_project"}
    [file] = (tmp_path / "broken").glob("*/*.jsonl")
    assert all("p50_ms" in row for row in records.read([file]))
    assert [row for row in records.read([file], measured=False) if "failure" in row] == [row | {"file": file.name} for row in wrong]


def test_seconds_bound_a_run_with_slow_set_ups(monkeypatch, tmp_path, no_ceilings, capsys):
    """Each of a step's takes a second of a clock that moves in no other way."""
    now = [0.0]
    monkeypatch.setattr(cases.time, "perf_counter", lambda: now[0])

    def slow(params, rank):
        now[0] += 1.0
        return contenders.Built(lambda: None, {})

    monkeypatch.setattr(step, "check_step", lambda *arguments: 0.0)
    monkeypatch.setattr(timing, "interleave", lambda runs, *_, **__: {name: timing.Timing(1, 1, 1, 5, 1) for name in runs})
    monkeypatch.setattr(contenders, "STEP", dict.fromkeys(("lowrank_kernels", "peer", "another"), slow))
    rows, code = short_run(tmp_path / "some", "--seconds", "3.5")
    assert code == 0 and now[0] == 3.0
    of_step = [(row["case"].split()[1], row["contender"], row.get("skipped")) for row in of_suite(rows, "step")]
    assert of_step[:3] == [("tiny", name, None) for name in contenders.STEP]
    late = "no time: 0 s of --seconds are left, and setting it up took 1 s before"
    assert of_step[3:] == [("3x16", name, late) for name in contenders.STEP]
    assert not any("no time" in row.get("skipped", "") for row in of_suite(rows, "kernel")), "they take none of that clock"
    rows, code = short_run(tmp_path / "none", "--seconds", "0.5")
    assert code == 0 and now[0] == 4.0
    assert [row["contender"] for row in rows if "no time" in row.get("skipped", "")].count("all") == 21
    assert "kernel moments 3x16x16 r=8 float32: all skipped: no time" in capsys.readouterr().out


def test_what_others_wrote_is_set_up_once_where_that_takes_longer_than_a_case_has(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cases.time, "perf_counter", lambda: now[0])
    context = Context(False, 2.0, MACHINE, Budget(100))
    for name in ("torch.compile", "lowrank_kernels"):
        with context.setting_up("step", name):
            now[0] += 5.0
    with pytest.raises(Unavailable, match="setting it up took 5.0 s before, and a case has 2.0 s of --seconds"):
        context.setting_up("step", "torch.compile").__enter__()
    with context.setting_up("step", "lowrank_kernels"), context.setting_up("kernel", "torch.compile"):
        pass
    with Context(False, 2.0, MACHINE).setting_up("step", "torch.compile"):
        pass
    assert context.measuring_s() == 0.5  # its share is gone: a quarter of it
    now[0] = 99.9
    assert context.measuring_s() == pytest.approx(0.1)
    now[0] = 101
    assert context.measuring_s() == 0
    with pytest.raises(Unavailable, match="no time: 0 s of --seconds are left"):
        context.setting_up("step", "new").__enter__()


@pytest.mark.parametrize("module, build, hint", [
    ("apollo_torch", contenders.apollo_torch, "pip install apollo-torch"),
    ("bitsandbytes", contenders.adamw_8bit, "pip install bitsandbytes"),
    ("galore_torch", contenders.galore_torch, "pip install galore-torch; .*--wheels"),
])  # fmt: skip
def test_a_missing_peer_is_named(monkeypatch, module, build, hint):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.optim", None)
    with pytest.raises(Unavailable, match=hint):
        build(contenders.make_params([(8, 8)], SINGLE, "cpu"), 2)


def test_a_graph_needs_a_gpu_and_replays_one_captured_step(monkeypatch, measured):
    assert any("lowrank_kernels, CUDA graph skipped: it needs a GPU" in line for line in measured[2])
    steps, captured, replays = [], [], []

    class Graph:
        def replay(self):
            replays.append(len(steps))

    @contextlib.contextmanager
    def capture(graph):
        captured.append(len(steps))
        yield
        captured.append(len(steps))

    class Optimizer:
        state = {}

        def step(self):
            steps.append(1)

    monkeypatch.setattr(contenders, "low_rank_optimizer", lambda params, rank, keys: keys == {"capturable": True} and Optimizer())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    built = contenders.STEP["lowrank_kernels, CUDA graph"]([], 8)
    built.step()
    assert captured == [1, 2] and replays == [2] and len(steps) == 2  # nothing but the replay is timed


def test_apollo_is_asked_as_its_documentation_says(monkeypatch):
    asked = {}

    class APOLLOAdamW(torch.optim.SGD):
        def __init__(self, groups, lr):
            asked.update(groups[0])
            super().__init__([{"params": groups[0]["params"]}], lr=lr)

    monkeypatch.setitem(sys.modules, "apollo_torch", type(torch)("apollo_torch"))
    sys.modules["apollo_torch"].APOLLOAdamW = APOLLOAdamW
    built = contenders.apollo_torch(contenders.make_params([(8, 12)], SINGLE, "cpu"), 2)
    built.step()
    assert {"params", "rank", "proj", "scale_type", "scale", "update_proj_gap", "proj_type"} == set(asked)
    assert asked["rank"] == 2 and asked["update_proj_gap"] == contenders.NEVER


def test_galore_keeps_what_it_would_keep_of_an_svd_without_taking_one(monkeypatch):
    pytest.importorskip("galore_torch")
    monkeypatch.setattr(torch.linalg, "svd", lambda *arguments, **options: pytest.fail("an SVD was taken"))
    [param] = contenders.make_params([(24, 40)], SINGLE, "cpu")
    built = contenders.galore_torch([param], 4)
    before = param.detach().clone()
    built.step()
    assert not torch.equal(before, param)
    assert memory.tensor_bytes(list(built.state.values())) == 4 * (2 * 4 * 40 + 24 * 24)  # moments, and a slice of U that holds all of U


@pytest.mark.skipif(
    not (shutil.which("c++") and Path(sysconfig.get_path("include"), "Python.h").exists()), reason="nothing to compile with"
)
@pytest.mark.slow
def test_the_compiled_formulas_are_the_formulas():
    params = {name: contenders.make_params([(12, 20), (20, 12)], SINGLE, "cpu") for name in ("plain", "compiled")}
    torch.manual_seed(0)
    contenders.formulas(params["plain"], 4).step()
    torch.manual_seed(0)
    contenders.compiled_formulas(params["compiled"], 4).step()
    start = contenders.make_params([(12, 20), (20, 12)], SINGLE, "cpu")
    for plain, compiled, before in zip(*params.values(), start, strict=True):
        assert not torch.equal(plain, before)
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-7)


# A wrong result is refused, and nothing is timed.


@pytest.fixture
def no_clock(monkeypatch):
    def timed(*arguments, **options):
        pytest.fail("something wrong was timed")

    monkeypatch.setattr(timing, "interleave", timed)


def refused(rows, contender, complaint):
    [row] = records.failed(rows)
    assert row["contender"] == contender and re.match(f"WrongResult: {complaint}", row["failure"])


def with_scale(step, factor):
    """A step whose update is `factor` times as long."""
    return lambda bucket, hyper: step(bucket, dataclasses.replace(hyper, scale=factor * hyper.scale))


def with_spoilt_moment(step):
    """A step that leaves M as it should not be; W is right."""

    def wrong(bucket, hyper):
        step(bucket, hyper)
        for exp_avg in bucket.states["exp_avg"]:
            exp_avg.copy_(exp_avg * 1.01 if exp_avg.is_floating_point() else exp_avg ^ 3)

    return wrong


@pytest.mark.parametrize("variant", [name for name in contenders.OURS if "graph" not in name])
@pytest.mark.parametrize("spoil, complaint", [(lambda right: with_scale(right, 1.05), "the update of"), (with_spoilt_moment, "M of")])
def test_a_wrong_step_is_refused(monkeypatch, no_clock, variant, spoil, complaint):
    monkeypatch.setattr(contenders, "STEP", {variant: contenders.STEP[variant]})
    monkeypatch.setattr(lrk.backends, "step", spoil(lrk.backends.step))
    refused(step.run(step.StepCase("tiny", 8, HALF), HERE), variant, f"{complaint} .* not timed")


def test_a_right_step_passes_in_every_dtype():
    for dtype in shapes.DTYPES.values():
        for name, keys in contenders.OURS.items():
            if contenders.applies(name, dtype):
                error = checks.check_step(shapes.model_shapes("tiny")[:7], 8, dtype, "cpu", keys)
                assert 0 < error <= checks.UPDATE_ERROR[dtype] / 2


@pytest.mark.parametrize("op, name", [("project", "project"), ("moments", "update_moments_"), ("back_project", "back_project_")])
def test_a_wrong_part_is_refused(monkeypatch, no_clock, op, name):
    sound = getattr(kernel.cpu, name)

    def wrong(*arguments, **options):
        options |= {"scale": 1.05 * options["scale"]} if "scale" in options else {}
        result = sound(*arguments, **options)
        return result if result is None else result * 1.05

    monkeypatch.setattr(kernel.cpu, name, wrong)
    refused(kernel.run(kernel.KernelCase(op, 2, 24, 40, 8, HALF), HERE), "lowrank_kernels", ".* is off by 0.0.* not timed")


@pytest.mark.parametrize("bits", [32, 8])
def test_a_wrong_step_of_the_kernel_suite_is_refused(monkeypatch, no_clock, bits):
    case = kernel.KernelCase("step", 2, 24, 80, 8, SINGLE, bits)
    for spoil, complaint in ((lambda right: with_scale(right, 1.05), "ΔW"), (with_spoilt_moment, "M")):
        with monkeypatch.context() as patch:
            patch.setattr(kernel.cpu, "step", spoil(kernel.cpu.step))
            refused(kernel.run(case, HERE), "lowrank_kernels", f"{complaint} is off")


def test_a_state_of_another_size_is_refused(monkeypatch):
    monkeypatch.setattr(memory_suite, "tensor_bytes", lambda state: 17)
    rows = memory_suite.run(memory_suite.MemoryCase("tiny", 8, SINGLE), HERE)
    ours = [row for row in rows if row["contender"].startswith("lowrank_kernels")]
    assert len(ours) == 2 and all("holds 17 bytes of state, the formula says" in row["failure"] for row in ours)


def test_a_bad_basis_is_refused(monkeypatch, no_clock):
    def unrelated(grad, rank, **options):
        return torch.linalg.qr(torch.randn(grad.shape[-2], rank, generator=torch.Generator().manual_seed(0)))[0], None

    monkeypatch.setattr(lrk.ops, "range_finder", unrelated)
    refused(refresh.run(refresh.RefreshCase((64, 96), 16), HERE), "lowrank_kernels", "the basis has .* not timed")


# The pieces.


RUNS = [*((part, 32) for part in kernel.PARTS), *((path, bits) for path in ("split", "single_pass") for bits in (32, 8))]


@pytest.mark.parametrize("of, dtype, shape", pairwise(RUNS, [SINGLE, HALF], [(48, 80), (96, 64)]))
def test_the_launchers_that_a_gpu_runs_pass_the_check(of, dtype, shape):
    """In Triton's interpreter, which the suite never uses."""
    op, bits = of
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the suite itself runs them here")
    bucket = kernel.Bucket(kernel.KernelCase(op, 2, *shape, 16, dtype, bits), "cpu")
    with torch.no_grad():
        try:
            run = kernel.triton_runs(bucket)
        except Unavailable as reason:
            assert op == "single_pass" and "splits" in str(reason)
            pytest.skip(str(reason))
        assert kernel.check(bucket, run) < checks.UPDATE_ERROR[dtype]


def test_work_of_a_kernel_case_is_that_of_its_bucket():
    case = kernel.KernelCase("split", 5, 80, 48, 16, HALF)
    assert case.right and case.extents == (48, 80, 16)
    assert total(case.work()).flops == 5 * 4 * 48 * 80 * 16
    assert len(case.work()) == 2


def test_refresh_of_a_model_covers_it_in_chunks(monkeypatch):
    monkeypatch.setattr(refresh, "CHUNK_BYTES", 5 * 32 * 48 * 4)
    case = refresh.RefreshCase("tiny", 8)
    chunks = case.chunks()
    assert sum(count for count, _, _ in chunks) == 21
    assert max(count * m * n * 4 for count, m, n in chunks) <= refresh.CHUNK_BYTES
    assert total(case.work()).flops == sum(4 * 2 * m * n * 16 for m, n in shapes.model_shapes("tiny"))
    grads = refresh.make_gradients(case, "cpu")
    assert all(grad.shape[-2] <= grad.shape[-1] for grad in grads)
    rows = refresh.run(case, HERE)
    assert [row["contender"] for row in rows] == ["lowrank_kernels", "PyTorch version", "torch.svd_lowrank"]
    assert all(row["captured_energy"] > 0.95 and row["peak_mb"] > 0 for row in rows)


def test_eigenproblems_are_timed_by_solver():
    """What a CPU does not have is skipped."""
    *rows, jacobi, cusolver = refresh.run(refresh.EigenCase(24, 3), HERE)
    assert [row["contender"] for row in rows] == ["lowrank_kernels", "torch.linalg.eigh"]
    assert all(row["defect"] <= refresh.BACKWARD_ERROR and row["shapes"] == [(3, 24, 24)] for row in rows)
    assert all("LAPACK" in row["skipped"] for row in (jacobi, cusolver))
    assert records.title(rows[0])[0] == "eigenproblem 3 × 24 × 24"


def test_wrong_eigenvectors_are_refused(monkeypatch, no_clock):
    right = refresh.parts.eigh
    monkeypatch.setattr(refresh.parts, "eigh", lambda *arguments: (right(*arguments)[0].roll(1, -1), right(*arguments)[1]))
    refused(refresh.run(refresh.EigenCase(24, 3), HERE), "lowrank_kernels", ".* is .* not timed")


def test_peak_bytes_sees_what_an_operator_allocates_inside():
    grad = torch.randn(96, 200)
    result, peak = memory.peak_bytes(lambda: [grad + grad], on_gpu=False)
    assert peak == result[0].nbytes
    _, peak = memory.peak_bytes(lambda: [grad + grad, grad + grad][:1], on_gpu=False)
    assert peak == 2 * grad.nbytes
    _, peak = memory.peak_bytes(lambda: [torch.linalg.svd(grad, full_matrices=False)[0]], on_gpu=False)
    assert peak > (96 * 96 + 96 + 96 * 200) * 4  # U, σ, Vᵀ and LAPACK's workspace


def test_tensor_bytes_count_each_storage_once_wherever_it_is():
    class Holder:
        def __init__(self, tensor):
            self.tensor = tensor

    base = torch.zeros(10, 10)
    assert memory.tensor_bytes([{"a": base, "b": base[:1]}, (base.T,), Holder(base), 3, "x", None]) == 400
    assert memory.tensor_bytes({"a": base[0], "b": Holder(torch.zeros(3, dtype=HALF))}) == 406


class Clock:
    """perf_counter that moves by a second at every look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def test_interleave_reports_quantiles_and_the_median_of_ratios(monkeypatch):
    times = {"a": iter([9, 9, 1.0, 2.0, 3.0, 4.0, 5.0]), "b": iter([9, 9, 2.0, 4.0, 6.0, 8.0, 50.0])}
    monkeypatch.setattr(timing, "time_once_ms", lambda run, on_gpu: next(times[run]))
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    monkeypatch.setattr(timing.time, "perf_counter", Clock())
    found = timing.interleave({"a": "a", "b": "b"}, on_gpu=False, seconds=3.0)
    assert (found["a"].p50, found["a"].rounds, found["a"].ratio) == (3.0, 5, 1.0)
    assert (found["a"].p20, found["a"].p80) == pytest.approx((1.8, 4.2))
    assert found["b"].ratio == 2.0  # of 2, 2, 2, 2, 10
    assert found["b"].p50 == 6.0


def test_the_least_rounds_take_no_more_than_twice_the_budget(monkeypatch):
    monkeypatch.setattr(timing, "time_once_ms", lambda run, on_gpu: 1.0)
    monkeypatch.setattr(timing.time, "perf_counter", Clock())
    assert timing.interleave({"a": "a"}, on_gpu=False, seconds=1.5)["a"].rounds == 3
    assert timing.interleave({"a": "a"}, on_gpu=False, seconds=1.5, least_rounds=2)["a"].rounds == 2


@pytest.mark.parametrize("first, rounds", [(1e5, 5), (0.001, 5)])
def test_a_slow_first_call_makes_nobody_slow(monkeypatch, first, rounds):
    """It compiled."""
    calls = []

    def once(run, on_gpu):
        calls.append(run)
        return first if len(calls) == 1 else 0.001

    monkeypatch.setattr(timing, "time_once_ms", once)
    found = timing.interleave({"a": "a"}, on_gpu=False, seconds=0.02)["a"]
    assert found.rounds >= rounds and found.p80 == 0.001


def test_a_slow_contender_is_timed_once(monkeypatch):
    ran = {"fast": 0, "slow": 0}
    milliseconds = {"fast": 0.001, "slow": 1e5}

    def once(run, on_gpu):
        ran[run] += 1
        return milliseconds[run]

    monkeypatch.setattr(timing, "time_once_ms", once)
    found = timing.interleave({name: name for name in ran}, on_gpu=False, seconds=0.02)
    assert found["slow"].rounds == 1 and ran["slow"] == 2  # the first might have compiled
    assert found["fast"].rounds >= 5 and found["slow"].ratio == pytest.approx(1e8)
    assert found["fast"].launches is None
    alone = timing.interleave({"slow": "slow"}, on_gpu=False, seconds=0.02)["slow"]
    assert (alone.rounds, alone.ratio, alone.p50) == (1, 1.0, 1e5)


class Gpu:
    """What timing.py asks of a GPU. A run's launches take the host `launch_cycles`; of more than a queue of
    1000 it waits for the GPU."""

    def __init__(self, monkeypatch, launch_cycles=0, launches=10, capturable=True):
        self.order, self.launch_cycles, self.launches, self.capturable = [], launch_cycles, launches, capturable
        self.cycles = 0
        self.buffer = torch.ones(4)
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.order.append("event")

            def synchronize(self):
                gpu.order.append("wait for event")

            def query(self):
                return gpu.launches > 1000 or gpu.cycles <= gpu.launch_cycles

            def elapsed_time(self, end):
                return 1.5

        class Graph:
            def replay(self):
                gpu.order.append("replay")

        @contextlib.contextmanager
        def capture(graph):
            if not capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            yield
            gpu.launches, gpu.launch_cycles = 1, 0

        monkeypatch.setattr(timing, "_flushed", lambda: self.order.append("flush") or self.buffer)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.order.append("idle"))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)

    def sleep(self, cycles):
        self.order.append("busy")
        self.cycles = cycles

    def run(self):
        self.order.append("run")


@pytest.mark.parametrize("device_only", [False, True])
def test_on_a_gpu_the_cache_is_cold_and_the_events_enclose_the_run_alone(monkeypatch, device_only):
    gpu = Gpu(monkeypatch)
    clock = timing._Shielded(gpu.run) if device_only else timing._Waiting(gpu.run, True)
    assert clock.once_ms() == 1.5
    assert gpu.order == ["flush", "busy" if device_only else "idle", "event", "run", "event", "wait for event"]
    assert not gpu.buffer.any()


def test_the_shield_is_longer_than_the_host_takes_to_launch(monkeypatch):
    for launch_cycles in (10**6, 10**7, 10**8):
        gpu = Gpu(monkeypatch, launch_cycles)
        found = timing.interleave({"a": gpu.run}, True, 0.01, device_only=True)["a"]
        assert found.launches == timing.HIDDEN and gpu.cycles >= 2 * launch_cycles and gpu.cycles <= 4 * max(launch_cycles, 10**6)


def test_more_launches_than_a_stream_takes_are_captured_in_a_graph_or_told(monkeypatch, capsys):
    gpu = Gpu(monkeypatch, launches=2000)
    assert timing.interleave({"a": gpu.run}, True, 0.01, device_only=True)["a"].launches == timing.GRAPH
    assert gpu.order[-3:] == ["replay", "event", "wait for event"]
    gpu = Gpu(monkeypatch, launches=2000, capturable=False)
    found = timing.interleave({"a": gpu.run}, True, 0.01, device_only=True)
    assert found["a"].launches == timing.VISIBLE and "not captured in a graph" in capsys.readouterr().out
    [row] = records.timed_rows("kernel step 1x8x8 r=8 float32", SINGLE, found, {}, MACHINE)
    assert row["launches"] == "visible"
    records.print_rows([row])
    assert "with the host's launches" in capsys.readouterr().out


def test_the_reference_of_coded_moments_starts_from_the_same_codes():
    """The bound of 8-bit moments would not hold against moments that were never coded."""
    bucket = kernel.Bucket(kernel.KernelCase("step", 1, 24, 80, 8, SINGLE, 8), "cpu")
    state = bucket.states[0] | {"basis": bucket.bases[0]}
    _, moments = checks.exact_step(bucket.weights[0], bucket.grads[0], state, step=2, lr=1.0, scale=0.25)
    uncoded = checks.decoded(bucket.states[0])
    formulas.update_moments_(*uncoded, reference.project(bucket.bases[0].double(), bucket.grads[0].double(), False), **kernel.ADAM)
    error = checks.relative_error(moments[0], uncoded[0])
    assert checks.MOMENT_ERROR[8][SINGLE] < error < 0.016 and math.isfinite(error)  # the coding itself


def test_the_host_suite_runs_what_a_gpu_runs(measured):
    """Buckets, tables and launch code for 224 matrices, with gradients where they were and with new ones."""
    found = {row["contender"]: row for row in of_suite(measured[1], "host")}
    assert set(found) == {"lowrank_kernels", "lowrank_kernels, new gradients"}
    assert all(0.02 < row["p50_ms"] < 50 and row["rounds"] >= 25 for row in found.values())
    assert sum(count for count, *_ in next(iter(found.values()))["shapes"]) == 224


def test_the_host_suite_says_why_it_could_not_run(monkeypatch):
    monkeypatch.setattr(host.sys, "executable", "/bin/false")
    [case] = host.cases(Selection(), on_gpu=False)
    [row] = command.measure(host, case, HERE)
    assert row["failure"] == "RuntimeError: no message" and records.failed([row])


def test_the_ceiling_of_a_slow_product_is_measured_on_a_smaller_one(monkeypatch):
    for trial_ms, width in ((0.1, 1536), (30.0, 768), (200.0, 384)):
        monkeypatch.setattr(ceilings, "time_once_ms", lambda run, on_gpu, trial_ms=trial_ms: trial_ms)
        assert ceilings._affordable_width(HALF, 1.0) == width
