"""python -m benchmarks.tune without a GPU: which candidate wins, what becomes of the table, what is left out,
and a dry walk."""

import functools
import operator
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import rereads, timing  # noqa: E402
from benchmarks.cases import Unavailable  # noqa: E402
from benchmarks.checks import WrongResult  # noqa: E402
from benchmarks.tune import __main__ as command  # noqa: E402
from benchmarks.tune import bench, candidates, compiling, contest  # noqa: E402
from benchmarks.tune.candidates import Shape, label  # noqa: E402
from lowrank_kernels.backends.triton import builtin, single_pass, split, tuned  # noqa: E402
from lowrank_kernels.backends.triton.configs import BackProjectConfig, ProjectMomentsConfig, SinglePassConfig, SplitConfig  # noqa: E402
from lowrank_kernels.backends.triton.dots import INTERPRETED  # noqa: E402
from lowrank_kernels.backends.triton.tuned import Key  # noqa: E402

ROOT = Path(__file__).parents[2]
KEY = Key("16bit", "fp32", "right", 64, "many")
NOW, *OTHERS = [SinglePassConfig(64, 2, 64, 64, 64, 4, stages) for stages in range(2, 9)]
SHAPES = [Shape(2, 64, 128), Shape(3, 64, 256)]
ORIGIN = {"commit": "abc1234", "versions": {"triton": "3.9.0"}}


class FakeBench:
    """`ms`: what a choice takes on each shape. `wrong`: choices that do not pass the check, and what they
    raise."""

    def __init__(self, ms, wrong=None):
        self.ms, self.wrong, self.rounds = ms, wrong or {}, []

    def __call__(self, key, shape):
        self.shape, self.bytes_moved = shape, 1e6 * shape.count
        return self

    def check(self, choice):
        if choice in self.wrong:
            raise self.wrong[choice]

    def times(self, choices, seconds):
        self.rounds.append((self.shape, list(choices.values())))
        took = {name: self.ms[choice][SHAPES.index(self.shape)] for name, choice in choices.items()}
        first = next(iter(took.values()))
        return {name: timing.Timing(ms, ms, ms, 7, ms / first) for name, ms in took.items()}


def run(ms, wrong=None, choices=OTHERS, serving=NOW):
    fake, said = FakeBench(ms, wrong), []
    return contest.contest(KEY, SHAPES, serving, choices, fake, said.append), fake, "\n".join(said)


def slow():
    return {choice: (10.0, 20.0) for choice in (NOW, *OTHERS)}


class TestContest:
    @pytest.mark.parametrize(("factor", "replaced"), [(1.0, False), (0.981, False), (0.979, True), (0.5, True), (1.5, False)])
    def test_a_row_is_replaced_only_by_what_is_over_2_percent_faster(self, factor, replaced):
        won, _, _ = run(slow() | {OTHERS[3]: (10 * factor, 20 * factor)})
        assert won.replaced == replaced and won.choice == (OTHERS[3] if replaced else NOW)
        assert won.gb_per_s == pytest.approx(5e6 / (30e6 * (factor if replaced else 1)))

    def test_all_shapes_count(self):
        """A gain of 3 % on one shape is none if another one loses as much."""
        won, _, _ = run(slow() | {OTHERS[0]: (9.7, 20.6)})
        assert not won.replaced

    def test_the_three_fastest_take_turns_with_what_serves_now(self):
        ms = {choice: (10.0 - number, 20.0) for number, choice in enumerate((NOW, *OTHERS))}
        _, fake, _ = run(ms)
        finalists = [NOW, OTHERS[5], OTHERS[4], OTHERS[3]]
        assert fake.rounds == [(SHAPES[0], [NOW, *OTHERS]), (SHAPES[0], finalists), (SHAPES[1], finalists)]

    @pytest.mark.parametrize("why", [WrongResult("W: 3 of 8192 elements out of bounds"), RuntimeError("out of resource: shared memory")])
    def test_what_is_wrong_or_does_not_run_is_left_out_and_said(self, why):
        won, fake, said = run(slow() | {OTHERS[1]: (1.0, 1.0), OTHERS[2]: (5.0, 5.0)}, {OTHERS[1]: why})
        assert won.choice == OTHERS[2] and all(OTHERS[1] not in choices for _, choices in fake.rounds)
        assert f"left out: {label(OTHERS[1])}: {type(why).__name__}: {why}" in said

    def test_what_serves_now_may_be_wrong(self):
        won, _, _ = run(slow(), {NOW: WrongResult("W")})
        assert won.replaced and won.choice in OTHERS
        assert run(slow(), dict.fromkeys((NOW, *OTHERS), WrongResult("W")))[0] is None

    def test_what_is_wrong_on_a_later_shape_is_left_out(self):
        class Later(FakeBench):
            def check(self, choice):
                if self.shape == SHAPES[1] and choice == OTHERS[0]:
                    raise WrongResult("W")

        won = contest.contest(KEY, SHAPES, NOW, OTHERS, Later(slow() | {OTHERS[0]: (1.0, 1.0), OTHERS[1]: (9.0, 18.0)}), lambda line: None)
        assert won.choice == OTHERS[1]

    def test_a_shape_that_does_not_fit_is_left_out(self):
        class Small(FakeBench):
            def __call__(self, key, shape):
                if shape == SHAPES[1]:
                    raise Unavailable("needs about 9 GB")
                return super().__call__(key, shape)

        said = []
        won = contest.contest(KEY, SHAPES, NOW, OTHERS, Small(slow() | {OTHERS[0]: (5.0, 99.0)}), said.append)
        assert won.choice == OTHERS[0] and won.gb_per_s == pytest.approx(2e6 / 5e6)
        assert any("is left out: needs about 9 GB" in line for line in said)

    def test_a_lost_gpu_names_the_candidate(self):
        with pytest.raises(contest.Lost, match=re.escape(label(OTHERS[2]))):
            run(slow(), {OTHERS[2]: RuntimeError("CUDA error: an illegal memory access was encountered")})


KEYS = [KEY, KEY._replace(side="left"), KEY._replace(rank=16), KEY._replace(waves="few")]


def tune(path, benches, rows=(), left=lambda: 100.0, said=None, keys=KEYS):
    """benches: what opens a bench, by key."""
    return contest.tune(
        keys, path, rows, ORIGIN, left, shapes=lambda key: SHAPES, choices=lambda key: OTHERS,
        bench=lambda key, shape: benches[key](key, shape), say=[].append if said is None else said.append,
        serving=lambda key, table: found.config if (found := tuned.look_up(table, key)) else NOW,
    )  # fmt: skip


class TestTable:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "tuned" / "GPU.json"

    def test_it_is_written_after_each_key(self, path):
        """And not lost when a later key fails."""
        written = []

        def watched(key, shape):
            written.append([row.key for row in tuned.read(path)] if path.exists() else [])
            return FakeBench(slow())(key, shape)

        def broken(key, shape):
            raise ValueError("a mistake of the tuner's own")

        said = []
        outcome = tune(path, {KEYS[0]: watched, KEYS[1]: broken, KEYS[2]: watched, KEYS[3]: watched}, said=said)
        assert written == [[]] * 2 + [[KEYS[0]]] * 2 + [[KEYS[0], KEYS[2]]] * 2
        assert [row.key for row in tuned.read(path)] == [KEYS[0], KEYS[2], KEYS[3]]
        assert outcome == contest.Outcome(measured=3, replaced=0, failed=1)
        assert any("FAILED" in line and "a mistake of the tuner's own" in line for line in said)

    @pytest.mark.parametrize("end", [KeyboardInterrupt, contest.Lost("single_pass")], ids=["interrupted", "lost"])
    def test_a_run_that_ends_early_keeps_what_it_has(self, path, end):
        def ending(key, shape):
            raise end

        with pytest.raises(type(end) if isinstance(end, Exception) else end):
            tune(path, {KEYS[0]: FakeBench(slow()), KEYS[1]: ending})
        assert [row.key for row in tuned.read(path)] == [KEYS[0]]

    def test_rows_of_before_stay_and_what_was_measured_has_its_origin(self, path):
        old = tuned.Row(KEYS[1], OTHERS[4], 7.0, "old", {"triton": "3.6.0"})
        other = replace(old, key=KEYS[2])
        tune(path, {KEYS[1]: FakeBench(slow() | {OTHERS[4]: (9.9, 19.8)})}, rows=(old, other), keys=KEYS[1:2])
        kept, untouched = tuned.read(path)
        assert kept == replace(old, gb_per_s=kept.gb_per_s, **ORIGIN) and kept.gb_per_s == pytest.approx(5e6 / 29.7e6)
        assert untouched == other

    def test_the_time_is_kept(self, path):
        clock = iter([100.0, 100.0, 0.0, 0.0])
        said = []
        outcome = tune(path, {key: FakeBench(slow()) for key in KEYS}, left=lambda: next(clock), said=said)
        assert outcome.measured == 1 and "no time for 16bit fp32 left 64 many and the keys after it" in said

    def test_nothing_right_writes_nothing(self, path):
        outcome = tune(path, {KEY: FakeBench(slow(), dict.fromkeys((NOW, *OTHERS), WrongResult("W")))}, keys=[KEY])
        assert outcome.failed == 1 and not path.exists()


class TestCandidates:
    def test_every_key_has_candidates_that_a_table_takes(self, tmp_path):
        rows = []
        for key in candidates.keys():
            choices = [*candidates.single_passes(key), *candidates.splits(key)]
            assert len(choices) == len(set(map(label, choices))) > 3
            assert any(isinstance(choice, SplitConfig) for choice in choices)
            for choice in choices:
                tuned.write(tmp_path / "x.json", [tuned.Row(key, choice, None, "", {})])
                rows += tuned.read(tmp_path / "x.json")
        assert {row.key for row in rows} == set(candidates.keys())

    def test_what_serves_now_is_among_them(self):
        """The built-in rows of sm_90, so that a table never holds what was not tried."""
        for key in candidates.keys():
            shape = candidates.shapes(key, 132)[0]
            found = candidates.serving(key, shape, 90, (), 132)
            assert found in [*candidates.single_passes(key), *candidates.splits(key)], (key, found)

    def test_a_row_of_the_table_serves_before_a_built_in_one(self):
        row = tuned.Row(KEY, OTHERS[0], 1.0, "abc", {})
        assert candidates.serving(KEY, Shape(32, 4096, 4096), 90, [row], 132) == OTHERS[0]
        single, few = (candidates.serving(KEY, Shape(count, 512, 512), 90, (), 132) for count in (100, 2))
        assert single in builtin.SINGLE_PASS[90]["16bit", "fp32"] and isinstance(few, SplitConfig)

    @pytest.mark.parametrize("multiprocessors", [16, 56, 108, 132, 188, 256])
    def test_shapes_are_of_their_waves(self, multiprocessors):
        for key in candidates.keys():
            for shape in candidates.shapes(key, multiprocessors):
                assert tuned.waves(shape.n, shape.count, multiprocessors) == key.waves and key.rank <= shape.m

    def test_keys(self):
        found = candidates.keys()
        assert found[0] == Key("16bit", "fp32", "right", 128, "many") and len(set(found)) == len(found)
        assert candidates.keys([64], quick=True) == [KEY]


TILES = SinglePassConfig(64, 2, 64, 32, 32, 4, 2)
PAIR = SplitConfig(ProjectMomentsConfig(32, 2, 64, 32, 4, 2), BackProjectConfig(32, 64, 32, 4, 2))


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the tuner itself runs")
class TestCheck:
    """The real check, on what Triton's interpreter computes."""

    @pytest.fixture(
        params=[(side, moments, kind) for side in ("left", "right") for moments, kind in (("fp32", "16bit"), ("8-bit", "tf32"))]
    )
    def tested(self, request):
        side, moments, kind = request.param
        before = torch.get_float32_matmul_precision()
        yield bench.Bench(Key(kind, moments, side, 48, "many"), Shape(3, 80, 96), "cpu")
        torch.set_float32_matmul_precision(before)

    def test_right_results_pass_again_and_again(self, tested):
        for choice in (TILES, PAIR, TILES):
            tested.check(choice)

    @pytest.mark.parametrize("choice", [TILES, PAIR], ids=["single pass", "split"])
    def test_wrong_ones_do_not(self, tested, choice, monkeypatch):
        """One element of W or M that is off, in the first or in the last matrix, and a step that does
        nothing."""
        path = single_pass if choice is TILES else split
        step = path.step

        def damaged(change):
            def run(bucket, *arguments):
                step(bucket, *arguments)
                change(bucket)

            monkeypatch.setattr(path, "step", run)
            with pytest.raises(WrongResult):
                tested.check(choice)

        damaged(lambda bucket: bucket.weights[0][-1, -1].mul_(1.1))
        damaged(lambda bucket: bucket.weights[2][0, 5].fill_(float("nan")))
        damaged(
            lambda bucket: bucket.states["exp_avg"][2].view(-1)[-1].add_(3 if bucket.states["exp_avg"][2].dtype == torch.uint8 else 1e-4)
        )
        monkeypatch.setattr(path, "step", lambda *_: None)
        with pytest.raises(WrongResult):
            tested.check(choice)
        monkeypatch.setattr(path, "step", step)
        tested.check(choice)

    def test_what_serves_now_can_be_left_out_too(self):
        """Else a run that begins anew without it would meet it again."""
        tested = bench.Bench(KEY, Shape(1, 64, 64), "cpu", without=[label(TILES)])
        with pytest.raises(Unavailable, match="--without"):
            tested.check(TILES)
        tested.check(PAIR)

    def test_times_are_of_all_choices(self, tested):
        found = tested.times({"a": TILES, "b": PAIR}, 0.01)
        assert set(found) == {"a", "b"} and tested.bytes_moved > 3 * 3 * 80 * 96 * 2


class TestPool:
    """A compiler that hangs or takes its process down costs its own candidate."""

    def test_results_failures_crashes_and_hangs(self):
        pool = compiling.Pool(1)
        try:
            assert pool.submit(sum, (1, 2)).result() == 3
            crash, after = pool.submit(os._exit, 3), pool.submit(divmod, 7, 2)
            with pytest.raises(compiling.NotCompiled, match="the compiler's process ended with 3"):
                crash.result()
            assert after.result() == (3, 1)
            with pytest.raises(compiling.NotCompiled, match="ZeroDivisionError: "):
                pool.submit(divmod, 1, 0).result()
            pool.seconds = 0.5
            with pytest.raises(compiling.NotCompiled, match="not compiled in 0 s"):
                pool.submit(time.sleep, 60).result()
        finally:
            pool.end()

    def test_what_does_not_compile_is_no_candidate(self, monkeypatch, capsys):
        """Neither alone nor in a pair, and it is said once."""
        failing = candidates.splits(KEY)[0].back_project

        monkeypatch.setattr(FakePool, "failing", (failing, candidates.single_passes(KEY)[1]))
        monkeypatch.setattr(command, "Pool", FakePool)
        settings = SimpleNamespace(workers=1, quick=False, without=[label(candidates.single_passes(KEY)[0])])
        compilers = command.Compilers([KEY], 90, settings, lambda: 100.0)
        found = compilers.compiling(KEY)
        singles = [choice for choice in found if isinstance(choice, SinglePassConfig)]
        assert singles == candidates.single_passes(KEY)[2:]
        assert all(choice.back_project != failing for choice in found if isinstance(choice, SplitConfig)) and len(found) > len(singles)
        said = Counter(line.partition(",")[0] for line in capsys.readouterr().out.splitlines() if "left out" in line)
        assert said == {f"  left out: {label(failing)}": 1, f"  left out: {label(candidates.single_passes(KEY)[1])}": 1}


class FakePool:
    """Everything compiles but `failing`."""

    failing = ()

    def __init__(self, workers): ...

    def submit(self, call, *arguments):
        def result(timeout=None):
            if getattr(arguments[0], "config", None) in self.failing:
                raise compiling.NotCompiled("CompilationError: no")
            return compiling.Compiled(128, 0, 1 << 16)

        return SimpleNamespace(result=result)

    def end(self): ...


class TestCommand:
    def test_without_a_gpu_it_says_so(self, capsys, monkeypatch):
        monkeypatch.setattr(command.dry, "interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            command.main(["--minutes", "1"])
        assert "--dry walks through all but the timing" in capsys.readouterr().err

    def test_a_lost_gpu_begins_anew_without_the_candidate(self, monkeypatch, capsys):
        def lost(settings, left):
            raise contest.Lost("split 1/2 + 3")

        begun = []
        monkeypatch.setattr(command.dry, "interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(command, "measure", lost)
        monkeypatch.setattr(os, "execv", lambda program, argv: begun.append(argv))
        command.main(["--minutes", "8", "--out", "x"])
        [argv] = begun
        again = command.parse(argv[3:])
        assert again.without == ["split 1/2 + 3"] and 7.9 < again.minutes <= 8 and again.out == Path("x")
        assert command.main(["--minutes", "0.1"]) == 1 and len(begun) == 1

    @pytest.fixture
    def a_gpu(self, monkeypatch, tmp_path):
        """All that a run asks of a GPU. Returns the keys in the order in which they were opened."""
        opened = []

        class Fake:
            bytes_moved = 1e6

            def __init__(self, key, shape, without):
                opened.append(key)

            def check(self, choice): ...

            def times(self, choices, seconds):
                times = [1.0 if isinstance(choice, SplitConfig) else 2.0 for choice in choices.values()]
                return {name: timing.Timing(ms, ms, ms, 7, ms / times[0]) for name, ms in zip(choices, times, strict=True)}

        monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "named"))
        monkeypatch.setattr(command.dry, "interpreted", lambda: False)
        for name, found in (("is_available", True), ("current_device", 0)):
            monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
        for name, found in (("device_name", "GPU X"), ("architecture", 90), ("multiprocessors", 132)):
            monkeypatch.setattr(command.choose, name, lambda device, found=found: found)
        monkeypatch.setattr(command.ceilings, "measure", lambda on_gpu: {"copy_gb_per_s": 1.0})
        monkeypatch.setattr(command.ceilings, "rereads_gb_per_s", lambda: 2.0)
        monkeypatch.setattr(command.provenance, "provenance", lambda on_gpu: {"commit": "abc", "lowrank_kernels": "0.1.0"})
        monkeypatch.setattr(command, "Pool", FakePool)
        monkeypatch.setattr(bench, "Bench", Fake)
        return opened

    def test_a_run_writes_the_table_that_is_looked_for_and_the_next_one_begins_with_other_keys(self, a_gpu, tmp_path, capsys):
        assert command.main(["--quick", "--ranks", "64"]) == 0
        path = tmp_path / "named" / "GPU_X.json"
        [row] = tuned.read(path)
        assert row.key == KEY and isinstance(row.config, SplitConfig) and row.commit == "abc"
        assert row.versions["torch"] == torch.__version__ and set(row.versions) == {"lowrank_kernels", "torch", "triton"}
        printed = capsys.readouterr().out
        assert '"l2_rereads_gb_per_s": 2.0' in printed and "NEW: split" in printed
        assert printed.splitlines()[-1] == f"1 of 1 keys measured, 1 rows new, 0 keys failed: {path}"
        a_gpu.clear()
        assert command.main(["--quick", "--ranks", "64", "128"]) == 0
        assert list(dict.fromkeys(a_gpu)) == [KEY._replace(rank=128), KEY] and len(tuned.read(path)) == 2
        a_gpu.clear()
        assert command.main(["--quick", "--ranks", "64", "128", "--commit", "other", "--out", str(tmp_path / "out")]) == 0
        assert list(dict.fromkeys(a_gpu)) == [KEY, KEY._replace(rank=128)]
        rows = tuned.read(tmp_path / "out" / "GPU_X.json")
        assert {row.commit for row in rows} == {"other"} and {row.commit for row in tuned.read(path)} == {"abc"}

    def test_an_interrupted_run_says_so(self, a_gpu, monkeypatch, capsys):
        monkeypatch.setattr(command, "tune", lambda *arguments, **options: os.kill(os.getpid(), signal.SIGINT))
        assert command.main(["--quick"]) == 130
        assert capsys.readouterr().out.splitlines()[-1] == "interrupted: the table has the keys that were measured before"

    def test_a_broken_table_is_not_written_over(self, tmp_path):
        path = tmp_path / "GPU.json"
        path.write_text("[{]")
        with pytest.raises(SystemExit, match="Mend the file or remove it"):
            command._rows_so_far(path, "GPU")


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU it is timed")
def test_rereads_read_the_whole_matrix():
    """Each of three programs: what an even number of them finds cancels."""
    matrix, found = torch.randint(0, 1 << 30, (3 * rereads.BLOCK,), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rereads.launch(matrix, 3, found)
    assert found.item() == functools.reduce(operator.xor, matrix.tolist())


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA GPUs")
def test_a_dry_walk_compiles_and_writes_nothing(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {tuned.VARIABLE: str(tmp_path / "named"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = ["--dry", "--quick", "--ranks", "64", "--workers", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tune", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("P re-reads from L2: compiled: ")
    assert len([line for line in lines if line.startswith("  compiled: ")]) == 6
    assert "16bit fp32 right 64 many: would check and time 6 candidates on 32 x 4096 x 4096" in lines
    assert lines[-1] == "1 of 1 keys walked for sm_90; nothing was timed and no table was written"
    assert not re.search(r"GB/s| ms\b", done.stdout) and "Warning" not in done.stderr
    assert not list(tmp_path.rglob("*.json"))
