"""python -m benchmarks.gpu without a GPU: whatever its stages do, all of them run, in time, and evidence is
left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import __main__ as benchmarks_command
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import evidence, runner, smoke, stages
from benchmarks.gpu.runner import Command, Stage
from benchmarks.tune import __main__ as tune_command

ROOT = Path(__file__).parents[2]


def shell(name, line, weight=1, log=evidence.MACHINE, **environment):
    return Stage(name, weight, log, [Command(["sh", "-c", line], environment)])


def lines_of(summary):
    """Outcome by stage, and its headline."""
    found = [re.split(r"  +", line, maxsplit=3) for line in summary.splitlines()[1:]]
    return {name: (state, *rest) for name, state, *rest in found}


@pytest.fixture
def files(tmp_path):
    return evidence.Files(tmp_path / "out", "abc1234")


class TestStages:
    def test_each_runs_whatever_the_others_do(self, files, capsys):
        plan = [
            shell("right", "echo all is well"),
            shell("wrong", "echo oh no; exit 3"),
            shell("crash", "kill -SEGV $$"),
            Stage("absent", 1, evidence.MACHINE, [Command(["/no/such/program"])]),
            shell("noisy", "head -c 100000 /dev/zero | tr '\\0' x; echo; echo last"),
            shell("environment", 'echo "$A, $(basename $PWD | wc -l)"', A="b"),
        ]
        outcomes = runner.run(plan, files, 60)
        assert [outcome.state for outcome in outcomes] == ["ok", "FAILED (exit status 3)", "FAILED (SIGSEGV)", "missing", "ok", "ok"]
        assert [outcome.headline for outcome in outcomes][-2:] == ["last", "b, 1"]
        assert outcomes[1].headline == "oh no" and outcomes[3].headline == "/no/such/program cannot be run here: No such file or directory"
        assert [outcome.bad for outcome in outcomes] == [False, True, True, False, False, False]
        assert files.path(evidence.SUMMARY).read_text() == evidence.summary(outcomes) + "\n"
        assert "FAILED (exit status 3) oh no" in capsys.readouterr().out

    def test_what_hangs_is_interrupted_then_killed_with_its_children(self, files, tmp_path):
        """In the time of its part; the later stages have theirs."""
        marker = tmp_path / "marker"
        stubborn = f"trap '' INT; (trap '' INT; sleep 4; touch {marker}) & echo begun; sleep 100"
        polite = "import time\ntry: time.sleep(100)\nexcept KeyboardInterrupt: print('what is known so far')"
        start = time.monotonic()
        plan = [
            shell("stubborn", stubborn),
            Stage("polite", 1, "tests.txt", [Command([sys.executable, "-c", polite])]),
            shell("next", "echo here"),
        ]
        outcomes = runner.run(plan, files, 9)
        assert time.monotonic() - start < 9
        assert [outcome.state for outcome in outcomes] == ["TIME OUT", "TIME OUT", "ok"]
        assert [outcome.headline for outcome in outcomes] == ["begun", "what is known so far", "here"]
        assert 2 < outcomes[0].seconds < 4.5
        time.sleep(max(0, start + 5 - time.monotonic()))
        assert not marker.exists(), "a child of what was killed went on"

    def test_output_and_summary_are_written_as_they_come(self, files):
        seen = f"cat {files.path(evidence.MACHINE)}; cat {files.path(evidence.SUMMARY)}"
        runner.run([shell("first", "echo one; exit 1"), shell("second", seen, log=evidence.TESTS)], files, 30)
        text = files.path(evidence.TESTS).read_text()
        assert "\none\n" in text and "first   FAILED (exit status 1)" in text and "second  running" in text

    def test_a_stage_gets_what_earlier_ones_leave_but_no_more_than_thrice_its_part(self, files):
        plan = [shell("long", "true", weight=90), shell("short", "echo {seconds}", weight=5), shell("last", "echo {seconds}", weight=5)]
        outcomes = runner.run(plan, files, 1000)
        assert [int(outcome.headline) for outcome in outcomes[1:]] == [round(0.8 * 3 * 50 - runner.GRACE_S / 2)] * 2

    def test_every_command_of_a_stage_runs_and_the_worst_counts(self, files):
        lines = [Command(["sh", "-c", line]) for line in ("exit 2", "sleep 60", "echo after all")]
        [outcome] = runner.run([Stage("several", 1, evidence.MACHINE, lines)], files, 6)
        assert (outcome.state, outcome.headline) == ("FAILED (exit status 2)", "after all") and outcome.seconds < 6


class TestEvidence:
    def test_long_files_keep_head_and_tail(self, tmp_path):
        path = tmp_path / "long.txt"
        path.write_text("".join(f"line {number}\n" for number in range(200_000)))
        size = path.stat().st_size
        evidence.trim(path, 1 << 20)
        text = path.read_text()
        assert path.stat().st_size <= 1 << 20
        assert text.startswith("line 0\nline 1\n") and text.endswith("line 199999\n")
        gone = int(re.search(r"\[\.\.\. (\d+) bytes are left out here", text).group(1))
        assert size - gone < 1 << 20 < size
        evidence.trim(path, 1 << 20)
        assert path.read_text() == text

    def test_a_run_trims_what_a_stage_wrote(self, files, monkeypatch):
        monkeypatch.setattr(evidence, "MOST_BYTES", 10_000)
        runner.run([shell("noisy", "seq 1 100000; echo the end")], files, 30)
        path = files.path(evidence.MACHINE)
        assert path.stat().st_size <= 10_000 and path.read_text().endswith("100000\nthe end\n")

    def test_eight_files_with_plain_names(self, files):
        assert len(evidence.ALL_FILES) <= evidence.MOST_FILES
        odd = evidence.Files(files.folder, "v1 (mine)/é")
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", odd.path(name).name) for name in evidence.ALL_FILES)
        plan = stages.all_stages(stages.Settings(files))
        assert {stage.log for stage in plan} <= set(evidence.ALL_FILES)
        assert [stage.name for stage in plan] == list(stages.NAMES)

    def test_the_headline_of_figures(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_text('{"case": "step old", "contender": "lowrank_kernels"}\n')
        headline = evidence.NewRows(path)
        ours = {"case": "step 7b r=128 bfloat16", "contender": "lowrank_kernels", "p50_ms": 12.345, "speedup": 2.5}
        rows = [
            ours | {"strongest_baseline": "AdamW"},
            {"case": "step 7b", "contender": "peer", "skipped": "no module"},
            {"case": "step 1b", "contender": "lowrank_kernels", "failure": "WrongResult: M is off"},
        ]
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        expected = "1 figures; 1 FAILED, first step 1b: lowrank_kernels: WrongResult: M is off; step 7b r=128 bfloat16 12.3 ms, 2.50× AdamW"
        assert headline("printed") == expected
        assert headline("printed\nlast\n") == "last"

    def test_last_lines(self):
        assert evidence.last_line("a\n==== 3 failed, 5 passed in 2.0s ====\n\n") == "3 failed, 5 passed in 2.0s"
        assert evidence.last_line("===== build: x\n") == ""
        text = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 2 errors\n13 checks\n"
        assert evidence.sanitizer_line(text) == "ERROR SUMMARY: 2 errors"
        assert evidence.sanitizer_line("no such tool\n") == "no such tool"

    def test_where_files_go(self, monkeypatch, tmp_path):
        monkeypatch.delenv("OUT", raising=False)
        monkeypatch.setattr(evidence, "gpu_name", lambda: "nvidia-x")
        assert command.default_folder(dry=False) == evidence.RESULTS / "nvidia-x"
        monkeypatch.setenv("OUT", str(tmp_path))
        assert command.default_folder(dry=False) == tmp_path
        assert command.default_folder(dry=True) == ROOT / "runs" / "gpu-dry"


class TestPlan:
    def argv(self, name, files, **settings):
        [stage] = [stage for stage in stages.all_stages(stages.Settings(files, **settings)) if stage.name == name]
        return [(list(each.argv), dict(each.environment)) for each in stage.commands]

    def test_every_file_with_a_test_for_a_gpu_is_among_the_tests(self):
        found = stages.gpu_tests()
        assert {"tests/test_step_parts.py", "tests/csrc/test_operators.py", "tests/optim/test_training.py", "tests/test_fuzz.py"} <= set(
            found
        )
        assert not any(path.startswith(("tests/examples", "tests/benchmarks")) for path in found), "they need what a GPU machine lacks"

    def test_commands(self, files, monkeypatch, tmp_path):
        monkeypatch.setattr(os, "cpu_count", lambda: 16)
        monkeypatch.delenv("LOWRANK_KERNELS_BUILD", raising=False)
        (build, environment), (registered, _) = self.argv("build", files)
        assert build[1:] == ["setup.py", "--quiet", "build_ext", "--inplace"] and environment == {"LOWRANK_KERNELS_BUILD": "cuda"}
        assert registered[-1] == "--registered"
        [(tests, environment)] = self.argv("tests", files)
        text = " ".join(tests)
        assert "--all -v -m gpu" in text and "-n 14 --dist worksteal" in text and " -x " not in text and "--junitxml=" in text
        assert environment["OMP_NUM_THREADS"] == "1"
        [(fuzz, _)] = self.argv("fuzz", files)
        assert fuzz[-4:] == ["--cases", "150", "--workers", "12"]
        for tool in ("memcheck", "racecheck"):
            [(argv, _)] = self.argv(tool, files)
            text = " ".join(argv)
            assert f"compute-sanitizer --tool {tool}" in text and "--kernel-name kns=lowrank_kernels" in text
            assert "--report-api-errors no" in text and "--operators" in text
        for name in ("headline", "step", "refresh", "host", "full"):
            [(argv, _)] = self.argv(name, files, commit="abc", wheels=tmp_path)
            assert argv[-4:] == ["--commit", "abc", "--wheels", str(tmp_path)] and argv[argv.index("--seconds") + 1] == "{seconds}"
            understood = benchmarks_command.parse([word.replace("{seconds}", "3") for word in argv[argv.index("benchmarks") + 1 :]])
            assert understood.commit == "abc" and understood.wheels == tmp_path
        [(full, environment)] = self.argv("full", files)
        assert not {"--suite", "--models", "--quick"} & set(full) and environment == {"LOWRANK_KERNELS_TUNED": str(files.folder)}
        [(tune, _)] = self.argv("tune", files, commit="abc")
        assert tune[1:5] == ["-m", "benchmarks.tune", "--minutes", "{minutes}"]
        monkeypatch.setattr(tune_command.dry, "interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        understood = tune_command.parse([word.replace("{minutes}", "7.5") for word in tune[3:]])
        assert (understood.minutes, understood.out, understood.commit, understood.dry) == (7.5, files.folder, "abc", False)
        [(tune, _)] = self.argv("tune", files, dry=True)
        understood = tune_command.parse([word.replace("{minutes}", "0.5") for word in tune[3:]])
        assert understood.dry and understood.quick and understood.out is None
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None)
        [(tests, _)] = self.argv("tests", files)
        assert "-n" not in tests
        monkeypatch.undo()
        assert "nvidia-smi" in str(self.argv("facts", files)) and not re.search(r"-pm|-lgc|-r\b|-ac|-pl", str(self.argv("facts", files)))

    def test_stages_that_are_chosen_and_replaced(self, capsys, tmp_path):
        replaced = ["--replace", "facts=exit 5", "--replace", "tune=echo tuned for {minutes}"]
        code = command.main(["--dry", "--out", str(tmp_path), "--stages", "tune,facts", "--commit", "abc", *replaced])
        found = lines_of(capsys.readouterr().out.partition("stage ")[2])
        assert code == 1 and set(found) == {"facts", "tune"}
        assert found["facts"][0] == "FAILED (exit status 5)" and re.fullmatch(r"tuned for \d\.\d\d", found["tune"][2])
        with pytest.raises(SystemExit):
            command.main(["--stages", "build,nothing"])
        assert "there is no stage 'nothing'" in capsys.readouterr().err

    def test_its_imports_are_the_standard_librarys(self):
        """Torch may be broken on the machine, and the runner is to say so."""
        missing = "sys.modules.update(torch=None, numpy=None, triton=None)"
        program = f"import sys; {missing}; import benchmarks.gpu.__main__ as m; print(m.stages.NAMES)"
        done = subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "build" in done.stdout, done.stderr


class TestSmoke:
    def test_every_check_passes_here(self, capsys):
        names = [name for name, _ in [*smoke.operator_checks(False), *smoke.step_checks(True)]]
        assert [name for name in names if "jacobi" in name] == [f"jacobi, {rows} rows" for rows in (64, 500, 2000)]
        assert [name for name in names if "cusolver" in name] == [f"cusolver, {rows} rows" for rows in (1, 64, 500, 2056)]
        assert [name for name in names if "cholesky" in name] == [f"cholesky_inverse, {l} columns" for l in (1, 33, 240, 300, 400)]
        assert {"normal, bit for bit", "gumbel", "a step in a CUDA graph"} <= set(names)
        small = [*smoke.operator_checks(True), *smoke.step_checks(True)]
        assert smoke.run((name, check) for name, check in small if "1030" not in name) == 0
        assert f"{len(small) - 1} checks on {smoke.DEVICE}, 0 failed" in capsys.readouterr().out

    def test_what_fails_is_told_and_the_next_check_runs_unless_the_gpu_is_lost(self, capsys):
        def wrong():
            raise smoke.checks.WrongResult("σ is off by 2")

        def lost():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        assert smoke.run([("a", wrong), ("b", lambda: "fine")]) == 1
        printed = capsys.readouterr().out
        assert "a: FAILED: WrongResult: σ is off by 2" in printed and "b: fine" in printed and "2 checks" in printed
        assert smoke.run([("a", lost), ("b", lambda: pytest.fail("on a lost GPU"))]) == 1
        assert "the GPU is lost" in capsys.readouterr().out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="spoils the operators of a CPU")
    def test_wrong_operators_are_seen(self, monkeypatch):
        spoilt = {
            "range_finder": lambda found: (found[0] * 1.001, found[1] * 1.001),
            "orthonormalise": lambda found: found.roll(1, 0),
            "sample_importance": lambda found: found.roll(1, 0),
            "choose_bases": lambda found: [basis.roll(1, 0) for basis in found],
        }
        for name, spoil in spoilt.items():
            sound = getattr(smoke.ops, name)
            monkeypatch.setattr(smoke.ops, name, lambda *a, sound=sound, spoil=spoil, **k: spoil(sound(*a, **k)))
        solve = smoke.parts.eigh
        monkeypatch.setattr(smoke.parts, "eigh", lambda *arguments: (solve(*arguments)[0].roll(1, -1), solve(*arguments)[1]))
        for check in (
            lambda: smoke.eigenproblem("jacobi", 64),
            lambda: smoke.cholesky(33),
            lambda: smoke.sketch(torch.float32),
            smoke.normals,
            smoke.gumbels,
        ):
            with pytest.raises(smoke.checks.WrongResult):
                check()

    def test_an_operator_without_a_kernel_is_a_loud_line(self, monkeypatch, capsys):
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: "orthonormalise" not in name)
        assert not smoke.registered()
        printed = capsys.readouterr().out
        assert "orthonormalise NO" in printed and "!!!!!" in printed and "leading yes" in printed


def dry(folder, *options, **popen):
    arguments = ["-m", "benchmarks.gpu", "--dry", "--out", str(folder), "--commit", "abc1234", *options]
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, **popen)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_a_dry_run_walks_all_stages_past_one_that_fails_and_one_that_hangs(tmp_path):
    """Those that cost most are replaced here; `python -m benchmarks.gpu --dry` runs them."""
    cheap = [f"--replace={name}=echo {name}" for name in ("headline", "step", "host", "fuzz")]
    start = time.monotonic()
    process = dry(tmp_path, "--minutes", "4", "--replace", "smoke=echo begun; exit 3", "--replace", "racecheck=sleep 1000", *cheap)
    printed, _ = process.communicate()
    assert process.returncode == 1 and time.monotonic() - start < 240
    found = lines_of(printed.partition("\nstage ")[2])
    assert list(found) == [name for name in stages.NAMES if name not in stages.LATER]
    sanitizer = "ok" if shutil.which("compute-sanitizer") else "missing"
    assert {name: state for name, (state, *_) in found.items()} == dict.fromkeys(found, "ok") | {
        "smoke": "FAILED (exit status 3)", "memcheck": sanitizer, "racecheck": "TIME OUT",
        "facts": "ok" if shutil.which("nvidia-smi") else "missing",
    }  # fmt: skip
    assert found["build"][2].startswith("kernels for CPU: leading") and "passed in" in found["tests"][2]
    left = {path.name.split("-abc1234-")[1]: path for path in tmp_path.iterdir()}
    assert set(left) == set(evidence.ALL_FILES)
    assert printed.endswith(left["summary.txt"].read_text())
    assert len(list(ElementTree.parse(left["tests.xml"]).iter("testcase"))) >= 4
    rows = [json.loads(line) for line in left["benchmarks.jsonl"].read_text().splitlines()]
    assert {row["commit"] for row in rows} == {"abc1234"} and {row["suite"] for row in rows} == {"refresh"}
    assert "===== refresh: " in left["benchmarks.txt"].read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_runner_that_is_told_to_end_leaves_a_summary_and_no_process(tmp_path, number):
    marker = tmp_path / "marker"
    line = f"echo begun; (sleep 2; touch {marker}) & sleep 100"
    process = dry(tmp_path, "--stages", "smoke,fuzz", "--replace", f"smoke={line}", "--replace", "fuzz=true", stderr=subprocess.PIPE)
    [log] = wait_for(lambda: list(tmp_path.glob("*machine.txt")))
    wait_for(lambda: "begun\n" in log.read_text())
    process.send_signal(number)
    printed, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and f"ended by {signal.Signals(number).name}" in printed and "Traceback" not in errors
    found = lines_of(printed.partition("\nstage ")[2])
    assert found["smoke"][0] == "INTERRUPTED" and found["fuzz"][0] == "not run"
    [summary] = tmp_path.glob("*summary.txt")
    assert printed.endswith(summary.read_text())
    time.sleep(2)
    assert not marker.exists()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found
