"""From results to text and pictures: compare, readme, plot, and which results count."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import compare, plot, readme, records
from benchmarks.provenance import short
from lowrank_kernels.optim import keys

ORIGIN = {
    "device": "cpu-a",
    "time": "2026-01-02T10:00:00+00:00",
    "commit": "abc1234",
    "torch": "2.13.0",
    "copy_gb_per_s": 40.0,
    "matmul_tflop_per_s_float32": 0.4,
}
TIMES = {"lowrank_kernels": 10.0, "lowrank_kernels, 8-bit states": 12.0, "galore-torch": 20.0, "formulas in PyTorch": 30.0, "AdamW": 5.0}


def timed(times=TIMES, case="step 60m r=128 float32", **fields):
    rows = []
    for name, ms in times.items():
        row = ORIGIN | {"case": case, "contender": name, "p20_ms": ms, "p50_ms": ms, "p80_ms": ms, "rounds": 5}
        row["ratio_to_ours"] = ms / times["lowrank_kernels"]
        if name == "lowrank_kernels":
            row |= {"gb_per_s": 8.0, "tflop_per_s": 0.2, "percent_of_ceiling": 50.0, "predicted_ms": ms / 2}
        rows.append(row | fields)
    return rows


def counted(ours=10.0, peak=1.0, **fields):
    held = {"lowrank_kernels": ours, "AdamW, float32 states": 80.0}
    base = ORIGIN | {"case": "memory 28x512 r=128 bfloat16", "step_peak_mb": peak} | fields
    return [base | {"contender": name, "state_mb": mb, "ratio_to_ours": mb / ours} for name, mb in held.items()]


def write(path, *groups):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for rows in groups for row in rows))
    return path


def judged(tmp_path, before, after, *options):
    files = [write(tmp_path / name, rows) for name, rows in (("a.jsonl", before), ("b.jsonl", after))]
    return compare.main([*map(str, files), *options])


class TestCompare:
    def test_the_same_results_pass(self, tmp_path, capsys):
        assert judged(tmp_path, timed() + counted(), timed() + counted()) == 0
        assert "0 of 4 figures" in capsys.readouterr().out

    def test_a_slower_step_fails_past_the_threshold(self, tmp_path, capsys):
        slower = timed(TIMES | {"lowrank_kernels": 11.5})
        assert judged(tmp_path, timed(), slower) == 1
        printed = capsys.readouterr().out
        assert printed.count("WORSE") == 1 and "+15.0 %" in printed
        assert judged(tmp_path, timed(), slower, "--threshold", "0.2") == 0
        assert judged(tmp_path, slower, timed()) == 0
        assert "better" in capsys.readouterr().out

    def test_so_does_a_slower_variant_of_ours(self, tmp_path, capsys):
        assert judged(tmp_path, timed(), timed(TIMES | {"lowrank_kernels, 8-bit states": 15.0})) == 1
        assert capsys.readouterr().out.count("WORSE") == 1

    def test_a_slower_machine_is_no_regression(self, tmp_path):
        assert judged(tmp_path, timed(), timed({name: 3 * ms for name, ms in TIMES.items()})) == 0

    def test_nor_is_one_baseline_that_became_faster(self, tmp_path):
        assert judged(tmp_path, timed(), timed(TIMES | {"galore-torch": 10.0})) == 0

    def test_without_a_common_baseline_the_time_itself_counts(self, tmp_path):
        def alone(ms):
            return timed({"lowrank_kernels": ms})

        assert judged(tmp_path, alone(10.0), alone(10.9)) == 0
        assert judged(tmp_path, alone(10.0), alone(11.1)) == 1

    def test_baselines_may_move(self, tmp_path, capsys):
        others = {name: 2 * ms for name, ms in TIMES.items() if not name.startswith("lowrank")}
        assert judged(tmp_path, timed(), timed(TIMES | others)) == 0
        assert "+100.0 %" in capsys.readouterr().out

    def test_more_memory_fails(self, tmp_path, capsys):
        assert judged(tmp_path, counted(10.0), counted(11.5)) == 1
        assert "state_mb" in capsys.readouterr().out
        assert judged(tmp_path, counted(peak=1.0), counted(peak=1.5)) == 1
        assert judged(tmp_path, counted(peak=0.0), counted(peak=0.5)) == 1

    def test_other_machines_are_named_and_not_judged(self, tmp_path, capsys):
        assert judged(tmp_path, timed(), timed(TIMES | {"lowrank_kernels": 20.0}, device="nvidia-x", torch="3")) == 0
        printed = capsys.readouterr().out
        assert "different machines: cpu-a → nvidia-x" in printed and "not judged" in printed
        assert "torch: 2.13.0 → 3" in printed

    def test_what_only_one_has_is_listed(self, tmp_path, capsys):
        fewer = {name: ms for name, ms in TIMES.items() if name != "galore-torch"}
        assert judged(tmp_path, timed() + counted(), timed(fewer) + timed(case="step 7b r=128 float32")) == 0
        printed = capsys.readouterr().out
        assert "only in A: step 60m r=128 float32: galore-torch" in printed
        assert "only in A: memory 28x512 r=128 bfloat16: lowrank_kernels" in printed
        assert "only in B: step 7b r=128 float32: lowrank_kernels" in printed
        assert judged(tmp_path, timed(), counted()) == 0
        assert "nothing in common" in capsys.readouterr().out

    def test_of_a_repeated_case_the_last_counts(self, tmp_path):
        slower = timed(TIMES | {"lowrank_kernels": 20.0})
        assert judged(tmp_path, timed(), timed() + slower) == 1
        assert judged(tmp_path, timed(), slower + timed()) == 0

    def test_what_fails_in_b_is_a_regression_on_any_machine(self, tmp_path, capsys):
        broken = ORIGIN | {"case": timed()[0]["case"], "contender": "lowrank_kernels", "failure": "WrongResult: M is off"}
        assert judged(tmp_path, timed(), [broken]) == 1
        assert "failed in B: step 60m r=128 float32: lowrank_kernels: WrongResult: M is off" in capsys.readouterr().out
        assert judged(tmp_path, timed(), [broken | {"contender": "all"}]) == 1
        assert judged(tmp_path, timed(), [broken | {"contender": "galore-torch"}]) == 0
        assert judged(tmp_path, [broken], timed()) == 0
        assert judged(tmp_path, counted(), [broken]) == 0, "A did not measure that"

    def test_the_command_exits_with_it(self, tmp_path):
        files = [write(tmp_path / "a.jsonl", timed()), write(tmp_path / "b.jsonl", timed(TIMES | {"lowrank_kernels": 20.0}))]
        with pytest.raises(SystemExit) as stopped:
            command.main(["compare", *map(str, files)])
        assert stopped.value.code == 1


def markers(name, text="old"):
    return f"<!-- {name}: begin -->\n{text}\n<!-- {name}: end -->"


class TestPages:
    @pytest.fixture
    def root(self, tmp_path):
        """README and pages of docs/ with nothing but their markers."""
        for name, blocks in readme.PAGES.items():
            page = tmp_path / "pages" / name
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text("\nbetween\n".join(["before", *map(markers, blocks), "after\n"]))
        return tmp_path / "pages"

    def run(self, root, results, *options):
        return readme.main(["--root", str(root), "--results", str(results), *options])

    def shown(self, root, results):
        """docs/benchmarks.md as it is then written, its lines joined."""
        assert self.run(root, results) == 0
        return " ".join((root / "docs" / "benchmarks.md").read_text().split())

    def test_figures_are_those_of_the_file(self, root, tmp_path):
        write(tmp_path / "results" / "cpu-a" / "2026-01-02-abc1234.jsonl", timed(), counted())
        found = self.shown(root, tmp_path / "results")
        assert found.startswith("before between <!-- benchmarks: begin --> Generated from ") and "old" not in found
        assert found.endswith("<!-- benchmarks: end --> between after")
        assert "| LLaMA 60M | 128 | fp32 | 10.0 | 12.0 (1.20×) | 20.0 (2.00×) | 30.0 (3.00×) | 5.00 (0.50×) | 50.0 | 5.00 |" in found
        assert "| 28 × 512² | 128 | bf16 | 10.0 (1.00) | 80.0 (1.00) |" in found
        assert readme.table("memory", counted(peak=1e-5)).endswith("| 10.0 (0) | 80.0 (0) |")
        assert "`2026-01-02-abc1234.jsonl`; torch 2.13.0; measured ceilings: copy 40 GB/s, fp32 products 0.4 TFLOP/s" in found
        assert "Not measured yet on this device: `kernel`, `refresh`, `rso`, `gradients`, `host`." in found
        assert "**H100: not measured yet.**" in found

    def test_readme_has_a_line_a_headline_with_what_it_is_compared_with(self, root, tmp_path):
        folder = tmp_path / "results" / "cpu-a"
        write(folder / "2026-01-02-abc1234.jsonl", timed(), timed({"galore-torch": 1.0, "lowrank_kernels": 2.0}, "step 60m r=128 bfloat16"))
        self.run(root, tmp_path / "results")
        header, rule, *lines = (line for line in (root / "README.md").read_text().splitlines() if line.startswith("|"))
        link = "[abc1234](benchmarks/results/cpu-a/2026-01-02-abc1234.jsonl)"
        assert lines == [
            f"| a step, ms | LLaMA 60M, r = 128, fp32 | 10.0 | galore-torch 20.0 | `cpu-a` | {link} |",
            f"| a step, ms | LLaMA 60M, r = 128, bf16 | 2.00 | galore-torch 1.00 | `cpu-a` | {link} |",
        ]
        assert len(rule.split("|")) == len(header.split("|")) == len(lines[0].split("|"))

    def test_a_headline_is_of_one_device_a_gpu_first(self, tmp_path):
        write(tmp_path / "cpu-a" / "x.jsonl", timed())
        peers = [row for row in timed(device="nvidia-h100-80gb") if row["contender"] != "lowrank_kernels"]
        write(tmp_path / "nvidia-h100-80gb" / "x.jsonl", peers)
        assert "`cpu-a`" in readme.headlines(tmp_path), "without a figure of this package there is nothing to compare"
        write(tmp_path / "nvidia-h100-80gb" / "x.jsonl", timed(device="nvidia-h100-80gb"))
        assert "`nvidia-h100-80gb`" in readme.headlines(tmp_path) and "cpu-a" not in readme.headlines(tmp_path)

    def test_every_headline_is_measured(self):
        lines = readme.headlines().splitlines()
        assert len(lines) == 2 + len(readme.HEADLINES) and len(readme.HEADLINES) <= 7
        assert all(name in line for line, headline in zip(lines[2:], readme.HEADLINES, strict=True) for name in headline.others)

    def test_tables_of_keys_are_those_of_the_declarations(self, root, tmp_path):
        self.run(root, tmp_path / "none")
        page = (root / "docs" / "group-keys.md").read_text()
        assert keys.table(keys.LOW_RANK) in page and keys.table((*keys.ADAMW, keys.CAPTURABLE)) in page
        assert keys.table(keys.RSO) in (root / "docs" / "rso.md").read_text()

    def test_columns_of_ours_come_first_and_versions_are_of_what_is_shown(self, root, tmp_path):
        late = timed(TIMES | {"lowrank_kernels, stochastic rounding": 11.0}, case="step 60m r=128 bfloat16")
        versions = {"galore-torch": "1.0", "bitsandbytes": "9", "triton": "3"}
        write(tmp_path / "results" / "cpu-a" / "x.jsonl", [row | {"versions": versions} for row in timed() + late])
        found = self.shown(root, tmp_path / "results")
        assert "| this | this, 8-bit states | this, stochastic rounding | galore-torch |" in found
        assert "torch 2.13.0, galore-torch 1.0; measured" in found

    def test_what_has_no_figure_is_in_no_table(self, root, tmp_path):
        """Neither a contender that failed, nor a suite that another file measured."""
        folder = tmp_path / "results" / "cpu-a"
        late = {"time": "2026-01-02T12:00:00+00:00", "case": "step 60m r=128 float32"}
        failed = ORIGIN | late | {"contender": "all", "failure": "RuntimeError: a long story"}
        skipped = ORIGIN | late | {"case": "step 7b r=128 float32", "contender": "galore-torch", "skipped": "no module"}
        write(folder / "a.jsonl", timed(), counted())
        write(folder / "b.jsonl", [failed, skipped])
        found = self.shown(root, tmp_path / "results")
        assert "20.0 (2.00×)" in found and "`a.jsonl`" in found and "b.jsonl" not in found and "7B" not in found

    def test_times_with_the_hosts_launches_in_them_say_so(self):
        rows = timed()
        assert "20.0 (2.00×) with launches" in readme.table("kernel", [row | {"launches": "visible"} for row in rows])
        assert "launches" not in readme.table("kernel", [row | {"launches": "hidden"} for row in rows])

    def test_without_results_it_says_so(self, root, tmp_path):
        found = self.shown(root, tmp_path / "none")
        assert "**H100: not measured yet.**" in found and "|" not in found
        for name, block in (("README.md", "results"), ("docs/rso.md", "methods")):
            assert markers(block, "\nNot measured yet.\n") in (root / name).read_text()

    def test_a_gpu_comes_first_and_is_then_measured(self, root, tmp_path):
        write(tmp_path / "results" / "cpu-a" / "x.jsonl", timed())
        write(tmp_path / "results" / "nvidia-h100-80gb" / "x.jsonl", timed(device="nvidia-h100-80gb"))
        found = self.shown(root, tmp_path / "results")
        assert found.index("nvidia-h100-80gb") < found.index("cpu-a") and "H100: not" not in found

    def test_each_suite_is_of_the_file_that_measured_it_last(self, root, tmp_path):
        folder = tmp_path / "results" / "cpu-a"
        late = {"time": "2026-01-02T12:00:00+00:00"}
        write(folder / "2026-01-02-fff.jsonl", timed(), counted())
        write(folder / "2026-01-02-aaa.jsonl", timed(TIMES | {"galore-torch": 44.0}, **late))  # later, though its name is before
        found = self.shown(root, tmp_path / "results")
        assert "44.0 (4.40×)" in found and "`2026-01-02-fff.jsonl`" in found

    @pytest.mark.parametrize("fields", [{"quick": True}, {"commit": "abc1234-dirty"}])
    def test_quick_runs_and_uncommitted_code_do_not_count(self, root, tmp_path, fields):
        folder = tmp_path / "results" / "cpu-a"
        write(folder / "a.jsonl", timed())
        write(folder / "b.jsonl", timed(TIMES | {"galore-torch": 44.0}, time="2027-01-02T12:00:00+00:00", **fields))
        found = self.shown(root, tmp_path / "results")
        assert "20.0 (2.00×)" in found and "44.0" not in found

    @pytest.mark.parametrize("name", readme.PAGES)
    def test_check_writes_nothing_and_fails_where_a_page_is_old(self, root, tmp_path, capsys, name):
        write(tmp_path / "results" / "cpu-a" / "x.jsonl", timed())
        self.run(root, tmp_path / "results")
        assert self.run(root, tmp_path / "results", "--check") == 0
        page = root / name
        old = page.read_text().replace(" | ", " | 9", 1)
        page.write_text(old)
        assert self.run(root, tmp_path / "results", "--check") == 1
        assert page.read_text() == old and f"{page} is not what" in capsys.readouterr().err

    @pytest.mark.parametrize("broken", ["nothing", "{end}{begin}", "{begin}{end}{end}"])
    def test_markers_that_are_missing_or_crossed_are_an_error(self, broken):
        text = broken.format(begin="<!-- methods: begin -->", end="<!-- methods: end -->")
        with pytest.raises(ValueError, match="page.md needs one"):
            readme.replaced(text, "methods", "x", Path("page.md"))

    def test_the_pages_are_what_the_results_and_declarations_say(self):
        assert readme.main(["--check"]) == 0

    def test_every_result_in_the_repository_can_be_shown(self):
        for folder in records.folders():
            for suite, rows in records.newest(folder).items():
                if suite in readme.SUITES:
                    timed = [row for row in rows if "largest_batch" not in row]
                    assert len(readme.table(suite, timed).splitlines()) == 2 + len({row["case"] for row in timed})
                    assert all(readme.tables(suite, rows))


@pytest.mark.parametrize("case, expected", [
    ("step 28x512 r=128 float32", ("28 × 512²", "128", "fp32")),
    ("memory 13b r=64 bfloat16", ("LLaMA 13B", "64", "bf16")),
    ("refresh 512x1376 r=128 noise", ("512 × 1376", "128", "Gaussian noise")),
    ("refresh 28x512 r=128 float32", ("28 × 512²", "128", "fp32")),
    ("kernel project 8x512x1376 r=128 float16", ("project 8 × 512 × 1376", "128", "fp16")),
    ("kernel step 8x512x1376 r=128 float16 8-bit states", ("step 8 × 512 × 1376", "128", "fp16 8-bit states")),
])  # fmt: skip
def test_titles(case, expected):
    assert records.title({"case": case}) == expected


@pytest.mark.parametrize(
    "value, expected", [(0.1234, "0.123"), (5.0, "5.00"), (23.04, "23.0"), (99.96, "100"), (4339.6, "4340"), (0.0, "0.00")]
)
def test_short_numbers_have_three_digits(value, expected):
    assert short(value) == expected


def test_the_terminal_shows_times_and_bytes(capsys):
    records.print_rows(timed() + counted())
    printed = capsys.readouterr().out
    for shown in ("lowrank_kernels", "galore-torch", "20.0", "2.00", "50", "state MB", "80.00"):
        assert shown in printed


def test_the_terminal_says_what_was_not_measured_and_why(capsys):
    rows = [{"case": f"step {model}", "contender": "galore-torch", "skipped": "no module"} for model in ("60m", "7b")]
    records.print_rows([*rows, {"case": "step 7b", "contender": "all", "failure": "WrongResult: M is off"}])
    printed = capsys.readouterr().out
    for shown in ("not measured", "galore-torch", "2 ×", "no module", "FAILED in step 7b: WrongResult: M is off"):
        assert shown in printed


class TestPlot:
    def test_pictures_of_everything_a_file_holds(self, tmp_path, capsys):
        file = write(tmp_path / "x.jsonl", timed(), timed(case="step 60m r=256 float32"), counted())
        assert plot.main([str(file), "--out", str(tmp_path / "plots")]) == 0
        printed = capsys.readouterr().out
        pictures = sorted((tmp_path / "plots" / "cpu-a").iterdir())
        assert [path.name for path in pictures] == ["memory.png", "roofline.png", "speedup.png"]
        for path in pictures:
            assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 and str(path) in printed

    def test_nothing_is_drawn_of_nothing(self, tmp_path):
        file = write(tmp_path / "x.jsonl", counted())
        plot.main([str(file), "--out", str(tmp_path / "plots")])
        assert {path.name for path in (tmp_path / "plots" / "cpu-a").iterdir()} == {"memory.png"}

    def test_devices_are_kept_apart(self, tmp_path):
        file = write(tmp_path / "x.jsonl", counted(), counted(device="nvidia-x"))
        plot.main([str(file), "--out", str(tmp_path / "plots")])
        assert {path.name for path in (tmp_path / "plots").iterdir()} == {"cpu-a", "nvidia-x"}

    def test_bars_are_the_ratios_and_regressions_are_red(self, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(plot, "_saved", lambda figure, path: drawn.append(figure))
        plot.speedup(timed(), tmp_path / "x.png")
        [axes] = drawn[0].axes
        widths = [bar.get_x() + bar.get_width() if bar.get_width() > 0 else 1 + bar.get_width() for bar in axes.patches]
        assert widths == pytest.approx([2.0, 3.0, 0.5])  # galore-torch, formulas, AdamW
        red = plot._pyplot().matplotlib.colors.to_rgba("tab:red")
        assert [bar.get_facecolor() == red for bar in axes.patches] == [False, False, True]
