"""Tables of measured tile shapes: what is read, what serves a bucket, and what a broken table does."""

import json
import runpy
import warnings

import pytest
import steps
import torch
from steps import bucket, check

import lowrank_kernels as lrk
from lowrank_kernels import environment
from lowrank_kernels.backends.triton import adamw_step, back_project, builtin, choose, project_moments, single_pass, table, tuned
from lowrank_kernels.backends.triton.configs import BackProjectConfig, ProjectMomentsConfig, SinglePassConfig, SplitConfig
from lowrank_kernels.backends.triton.dots import INTERPRETED

NAME = "Some GPU 80GB/PCIe"
SINGLE = {"BLOCK_R": 32, "SLICES": 2, "BLOCK_N": 32, "BLOCK_K": 16, "BLOCK_M": 32, "num_warps": 4, "num_stages": 2, "W_STAGES": 2}
FIRST = {"BLOCK_R": 16, "SLICES": 1, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
SECOND = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
ROW = {
    "kind": "16bit", "moments": "fp32", "side": "left", "rank": 32, "waves": "many", "path": "single_pass", "config": SINGLE,
    "gb_per_s": 1.5, "commit": "abc1234", "versions": {"triton": "3.9.0"},
}  # fmt: skip
SPLIT = ROW | {"path": "split", "config": {"project_moments": FIRST, "back_project": SECOND}}
INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="the built-in rows of a GPU are others")
MANY = 8
"""Matrices of 128 columns that are many for the two multiprocessors of these tests."""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The folder in which tables are looked for, for a device of two multiprocessors that runs in the
    interpreter."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(choose, "device_name", lambda device: NAME)
    monkeypatch.setattr(choose, "multiprocessors", lambda device: 2)
    forget()
    yield tmp_path / "named"
    forget()


def forget():
    tuned.rows_of.cache_clear()
    choose._measured.cache_clear()


def lay(folder, *rows):
    """Writes a table, as by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "Some_GPU_80GB_PCIe.json"
    path.write_text(json.dumps(rows) if all(isinstance(row, dict) for row in rows) else rows[0])
    return path


def made(count=MANY, m=64, n=128, r=32, right=False, dtype=torch.bfloat16, coded=False, pad=16):
    return bucket(count, m, n, r, right, dtype, coded, pad=pad)


class Spy:
    """A kernel whose launches are seen."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.seen.append({name: value for name, value in options.items() if name != "enable_fp_fusion"})
            return self.kernel[grid](*arguments, **options)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """Options of the launches of a step, by kernel."""
    spies = {}
    for module, name in (
        (single_pass, "_adamw_step_kernel"),
        (project_moments, "_project_moments_kernel"),
        (back_project, "_back_project_kernel"),
    ):
        spies[name] = Spy(getattr(module, name))
        monkeypatch.setattr(module, name, spies[name])
    return lambda: {name: spy.seen for name, spy in spies.items() if spy.seen}


class Whole:
    """The step as the optimizer takes it, for `steps.check`."""

    @staticmethod
    def step(bucket, hyper, rows):
        adamw_step.step(bucket, hyper)


@INTERPRETER
class TestLaunches:
    @pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8-bit"])
    def test_a_row_reaches_the_single_pass(self, folder, launches, coded):
        config = SINGLE | {"BLOCK_N": 64}
        lay(folder, ROW | {"moments": "8-bit" if coded else "fp32", "config": config})
        check(Whole, made(coded=coded, r=32), False)
        assert launches() == {"_adamw_step_kernel": [config]}

    def test_a_row_reaches_both_launches_of_the_split(self, folder, launches):
        """Also of a rank that a built-in single pass covers."""
        lay(folder, SPLIT | {"side": "right"})
        check(Whole, made(right=True, r=32), True)
        assert launches() == {"_project_moments_kernel": [FIRST], "_back_project_kernel": [SECOND]}

    def test_parts_of_a_bucket_have_the_row_of_the_whole(self, folder, launches, monkeypatch):
        lay(folder, SPLIT)
        monkeypatch.setattr(table, "TEMPORARY_BYTES", 3 * 32 * 128 * 2)
        check(Whole, made(r=32), False)
        assert launches() == {"_project_moments_kernel": [FIRST] * 3, "_back_project_kernel": [SECOND] * 3}

    def test_without_a_table_the_built_in_rows_serve(self, launches):
        check(Whole, made(r=32), False)
        [seen] = launches()["_adamw_step_kernel"]
        assert SinglePassConfig(**seen) == builtin.SINGLE_PASS[None]["16bit", "fp32"][1]


def row_of(aligned=True, **shape):
    lists = made(**shape)
    built, _ = steps.bucket_of(lists, shape.get("right", False))
    return choose.measured(built, aligned)


class TestLookUp:
    def test_the_smallest_rank_that_covers(self, folder):
        slices = {128: 4, 32: 1, 64: 2}
        lay(folder, *(ROW | {"rank": rank, "config": SINGLE | {"BLOCK_R": 128, "SLICES": each}} for rank, each in slices.items()))
        assert [row_of(r=rank).SLICES for rank in (16, 32, 48, 64)] == [1, 1, 2, 2]
        assert row_of(m=144, r=128).SLICES == 4
        assert row_of(m=144, r=144) is None

    @pytest.mark.parametrize(
        "other",
        [
            dict(right=True), dict(dtype=torch.float32), dict(coded=True), dict(count=1), dict(count=3), dict(n=136),
            dict(pad=3), dict(aligned=False),
        ],
        ids=str,
    )  # fmt: skip
    def test_other_buckets_have_no_row(self, folder, other):
        lay(folder, ROW)
        assert row_of() is not None and row_of(**other) is None

    def test_r_from_memory_and_mixed_dtypes_have_no_row(self, folder):
        lay(folder, ROW)
        lists = made()
        for changed in (
            {"grads": [grad.float() for grad in lists["grads"]]},
            {"projected": [torch.zeros(32, 128) for _ in range(MANY)]},
        ):
            built, _ = steps.bucket_of(lists | changed, False)
            assert choose.measured(built, True) is None

    def test_a_split_wants_16_bytes_along_n_a_single_pass_does_not(self, folder):
        """On the right side, where n is not along a row of W."""
        lay(folder, ROW | {"side": "right"}, SPLIT | {"side": "right", "rank": 64})
        assert isinstance(row_of(n=130, right=True), SinglePassConfig)
        assert isinstance(row_of(n=128, right=True, r=48), SplitConfig) and row_of(n=130, right=True, r=48) is None

    @pytest.mark.parametrize(
        ("n", "count", "multiprocessors", "waves"),
        [
            (512, 16, 132, None),
            (512, 33, 132, "few"),
            (4096, 16, 132, "few"),
            (4096, 17, 132, "many"),
            (64, 132, 132, "few"),
            (1, 132, 132, "few"),
        ],
    )
    def test_waves(self, n, count, multiprocessors, waves):
        assert tuned.waves(n, count, multiprocessors) == waves

    def test_the_name_of_a_file(self):
        assert tuned.file_name("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3.json"
        assert tuned.file_name("../NVIDIA A100-SXM4-40GB (x)") == ".._NVIDIA_A100-SXM4-40GB_x_.json"

    def test_a_device_that_is_no_gpu_has_no_table(self, monkeypatch):
        monkeypatch.undo()
        assert choose.device_name(torch.device("cpu")) is None


BROKEN = {
    "no JSON": ("[{", "is no JSON"),
    "no list": ("{}", "must hold a list of rows, got dict"),
    "no object": ("[3]", "row 1: a row must be an object, got 3"),
    "an unknown field": (ROW | {"gb_per_sec": 1.0}, "row 1: a row has no field gb_per_sec"),
    "a field missing": ({name: value for name, value in ROW.items() if name != "waves"}, "row 1: a row lacks waves"),
    "an unknown value": (ROW | {"moments": "fp16"}, "row 1: moments must be one of fp32, 8-bit, got 'fp16'"),
    "an unknown path": (ROW | {"path": "three_pass"}, "row 1: path must be one of single_pass, split, got 'three_pass'"),
    "a rank of text": (ROW | {"rank": "32"}, "row 1: rank must be a positive int, got '32'"),
    "a rate of zero": (ROW | {"gb_per_s": 0}, "row 1: gb_per_s must be a positive number or null, got 0"),
    "a commit of nothing": (ROW | {"commit": None}, "row 1: commit must be a string, got None"),
    "versions of numbers": (ROW | {"versions": {"triton": 3.9}}, "row 1: versions must be strings by name"),
    "a rank that is not covered": (ROW | {"rank": 48}, "row 1: a single pass covers ranks up to its BLOCK_R of 32, and the row's rank is"),
    "an unknown constexpr": (ROW | {"config": SINGLE | {"BLOCK_Q": 3}}, "row 1: SinglePassConfig has no field BLOCK_Q"),
    "a constexpr missing": (ROW | {"config": {"BLOCK_R": 32}}, "row 1: SinglePassConfig lacks BLOCK_K, BLOCK_M"),
    "a constexpr of text": (ROW | {"config": SINGLE | {"num_warps": True}}, "row 1: num_warps must be a positive int, got True"),
    "no power of two": (ROW | {"config": SINGLE | {"BLOCK_K": 48}}, "row 1: BLOCK_K must be a power of two from 16 on, got 48"),
    "too small a tile": (ROW | {"config": SINGLE | {"BLOCK_M": 8}}, "row 1: BLOCK_M must be a power of two from 16 on, got 8"),
    "half a block of 8-bit moments": (
        ROW | {"moments": "8-bit", "config": SINGLE | {"BLOCK_N": 32}}, "row 1: BLOCK_N must be a power of two from 64 on, got 32",
    ),
    "too many slices": (ROW | {"config": SINGLE | {"SLICES": 64}}, "row 1: SLICES must be 32 at most, the BLOCK_R, got 64"),
    "half a split": (ROW | {"path": "split", "config": {"project_moments": FIRST}}, "row 1: config of a split lacks back_project"),
    "a single pass as a split": (ROW | {"path": "split"}, "row 1: config of a split has no field BLOCK_K"),
}  # fmt: skip


class TestBroken:
    @pytest.mark.parametrize("broken", BROKEN)
    def test_reading_says_the_file_and_what_is_wrong(self, folder, broken):
        content, message = BROKEN[broken]
        path = lay(folder, content)
        with pytest.raises(ValueError) as error:
            tuned.read(path)
        assert str(error.value).startswith(str(path)) and message in str(error.value)

    def test_a_key_twice(self, folder):
        path = lay(folder, ROW, ROW | {"rank": 16}, ROW)
        with pytest.raises(ValueError, match="row 3: .* has a row already"):
            tuned.read(path)

    @INTERPRETER
    def test_a_step_warns_once_and_takes_the_built_in_rows(self, folder, launches):
        path = lay(folder, ROW | {"rank": 48})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check(Whole, made(r=32), False)
            check(Whole, made(r=16), False)
        [warning] = [each for each in caught if "lowrank_kernels" in str(each.message)]
        assert warning.category is RuntimeWarning and str(path) in str(warning.message) and "covers ranks up to" in str(warning.message)
        assert "The built-in rows serve" in str(warning.message)
        rows = builtin.SINGLE_PASS[None]["16bit", "fp32"]
        assert [SinglePassConfig(**seen) for seen in launches()["_adamw_step_kernel"]] == [rows[1], rows[0]]

    def test_it_does_not_make_room_for_another_folders_table(self, folder, tmp_path):
        lay(tmp_path / "packaged", ROW)
        lay(folder, "[")
        with pytest.warns(RuntimeWarning, match="is no JSON"):
            assert row_of() is None

    def test_a_file_that_cannot_be_read(self, folder, monkeypatch):
        lay(folder, ROW)
        monkeypatch.setattr(tuned, "read", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(path))))
        with pytest.warns(RuntimeWarning, match="Permission denied"):
            assert row_of() is None


class TestFolders:
    def test_order(self, folder, tmp_path):
        found = []
        for place in (tmp_path / "packaged", tmp_path / "cache" / "lowrank_kernels" / "tuned", folder):
            lay(place, ROW)
            found.append(tuned.find(NAME).parent)
        assert found == [tmp_path / "packaged", tmp_path / "cache" / "lowrank_kernels" / "tuned", folder]

    def test_zero_means_the_built_in_rows(self, tmp_path, monkeypatch):
        lay(tmp_path / "packaged", ROW)
        monkeypatch.setenv(tuned.VARIABLE, "0")
        assert tuned.find(NAME) is None and row_of() is None
        assert tuned.describe(NAME) == "built-in rows (LOWRANK_KERNELS_TUNED is 0)"

    def test_where_a_new_table_goes(self, folder, tmp_path, monkeypatch):
        def parent():
            return tuned.target(NAME).parent

        assert parent() == folder
        monkeypatch.delenv(tuned.VARIABLE)
        (tmp_path / "packaged").mkdir()
        assert parent() == tmp_path / "packaged"
        access = tuned.os.access
        monkeypatch.setattr(tuned.os, "access", lambda path, mode: "packaged" not in str(path) and access(path, mode))
        assert parent() == tuned.user_folder()
        lay(tmp_path / "packaged", ROW)
        assert parent() == tuned.user_folder()
        monkeypatch.undo()

    def test_the_table_that_serves_is_rewritten(self, folder, tmp_path, monkeypatch):
        """It would hide one that is written elsewhere."""
        monkeypatch.delenv(tuned.VARIABLE)
        (tmp_path / "packaged").mkdir()
        path = lay(tuned.user_folder(), ROW)
        assert tuned.target(NAME) == path

    def test_written_and_read(self, folder):
        rows = tuned.read(lay(folder, ROW, SPLIT | {"side": "right", "gb_per_s": None}))
        path = folder / "new" / "x.json"
        tuned.write(path, rows)
        tuned.write(path, rows)
        assert tuned.read(path) == rows and [each.name for each in path.parent.iterdir()] == ["x.json"]
        assert len(path.read_text().splitlines()) == 4, "a row a line"
        assert rows[1].config == SplitConfig(ProjectMomentsConfig(**FIRST), BackProjectConfig(**SECOND))

    def test_a_table_that_cannot_be_written_stays(self, folder, monkeypatch):
        path = lay(folder, ROW)
        before = path.read_text()
        monkeypatch.setattr(tuned.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(OSError):
            tuned.write(path, tuned.read(path))
        assert path.read_text() == before

    def test_the_tables_of_the_package(self, monkeypatch):
        monkeypatch.undo()
        for path in tuned.PACKAGED.glob("*.json"):
            assert tuned.read(path)


class TestReport:
    @pytest.fixture(autouse=True)
    def a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: NAME)
        monkeypatch.setattr(environment, "_gpus", lambda: "two")

    def line(self, capsys):
        runpy.run_module("lowrank_kernels", run_name="__main__")
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tile shapes")]
        return line.removeprefix("tile shapes").strip()

    def test_a_table(self, folder, capsys):
        path = lay(folder, ROW, SPLIT | {"side": "right", "gb_per_s": None, "commit": "fff"})
        assert self.line(capsys) == f"{NAME}: 2 rows of {path}, 1 of them timed, at abc1234, fff (triton 3.9.0)"

    def test_no_table(self, folder, capsys):
        assert self.line(capsys).startswith(f"{NAME}: built-in rows (no Some_GPU_80GB_PCIe.json in {folder}, ")

    def test_a_broken_table(self, folder, capsys):
        path = lay(folder, "[")
        assert self.line(capsys).startswith(f"{NAME}: built-in rows ({path} is no JSON")

    def test_without_triton(self, monkeypatch):
        monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
        assert environment.tile_shapes() == "none (Triton is missing)"


def test_without_a_gpu_no_table_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "chosen on a GPU" in environment.report() and lrk.__version__
