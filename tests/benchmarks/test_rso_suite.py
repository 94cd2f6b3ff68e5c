"""The rso suite: bytes and flops against counting by hand, what is measured, and that nothing wrong is timed
or shown."""

import json
import re

import pytest
import torch

import lowrank_kernels as lrk
from benchmarks import checks, iterations, readme, records, roofline, shapes, timing
from benchmarks.cases import Context, Selection, Unavailable
from benchmarks.iterations import CHECKPOINTED, DENSE, GALORE, UNSHARED
from benchmarks.records import OURS
from benchmarks.roofline import Cost, Machine, total
from benchmarks.suites import rso
from benchmarks.suites.rso import IterationCase, LargestCase

HALF, SINGLE = torch.bfloat16, torch.float32
MACHINE = Machine("made up", 10.0, {SINGLE: 0.1, HALF: 0.1, torch.float16: 0.1})
HERE = Context(on_gpu=False, seconds=0.05, machine=MACHINE)
LAYER = IterationCase((24, 40), 1, 16, 8, SINGLE)
BLOCK = IterationCase("tiny", 2, 8, 8, SINGLE)


def measured(case, chosen=None, patch=None):
    if chosen:
        patch.setattr(iterations, "BLOCK" if case.is_block else "LAYER", chosen)
    return {row["contender"]: row for row in rso.run(case, HERE)}


@pytest.fixture(scope="module")
def rows():
    """What was measured; galore-torch is an extra."""
    found = {case: measured(case) for case in (LAYER, BLOCK)}
    return {case: {name: row for name, row in of.items() if records.is_measured(row)} for case, of in found.items()}


# Formulas.


def test_bytes_of_a_layer_counted_by_hand():
    """16 tokens, 24 → 40, r = 8, fp32."""
    assert LAYER.saved_bytes()[OURS] == 16 * 8 * 4 and LAYER.saved_bytes()[DENSE] == 16 * 24 * 4
    assert LAYER.gradient_bytes()[OURS] == 8 * 40 * 4 and LAYER.gradient_bytes()[DENSE] == 24 * 40 * 4
    moments, coordinates, basis = 2 * 8 * 40 * 4 + 4, 8 * 40 * 4, 24 * 8 * 4
    assert LAYER.state_bytes()[OURS] == moments + coordinates + basis
    assert LAYER.state_bytes()[DENSE] == 2 * 24 * 40 * 4 + 4
    half = IterationCase((24, 40), 1, 16, 8, HALF)
    assert half.saved_bytes()[OURS] == 16 * 8 * 2 and half.gradient_bytes()[OURS] == 8 * 40 * 2
    assert half.state_bytes()[OURS] == moments + coordinates // 2 + basis // 2  # moments stay fp32


def test_bytes_of_a_block_counted_by_hand():
    """Widths 32 and 48: four layers 32 → 32, two 32 → 48, one 48 → 32, and two norms."""
    outputs, size = 5 * 32 + 2 * 48, 4
    assert BLOCK.saved_bytes()[DENSE] == 16 * (3 * 32 + 48) * size
    assert BLOCK.saved_bytes()[OURS] == 16 * 4 * 8 * size and BLOCK.saved_bytes()[UNSHARED] == 16 * 7 * 8 * size
    assert BLOCK.gradient_bytes()[OURS] == (8 * outputs + 64) * size
    assert BLOCK.gradient_bytes()[DENSE] == (4 * 32**2 + 3 * 32 * 48 + 64) * size
    norms = 2 * 64 * size + 2 * 4
    assert BLOCK.state_bytes()[OURS] == 3 * 8 * outputs * size + 7 * 4 + 8 * (3 * 32 + 48) * size + norms
    assert BLOCK.state_bytes()[UNSHARED] - BLOCK.state_bytes()[OURS] == 8 * 3 * 32 * size


def test_flops_of_a_layer_are_those_of_its_products():
    tokens, inputs, outputs, r = 16, 24, 40, 8
    works = {name: total(work).flops for name, work in LAYER.works().items()}
    assert works[DENSE] == 6 * tokens * inputs * outputs
    assert works[OURS] == 4 * tokens * inputs * outputs + 2 * r * (tokens * inputs + tokens * outputs + inputs * outputs)
    assert works[GALORE] == works[DENSE] + 4 * inputs * outputs * r
    assert works[OURS] == works[UNSHARED]


def test_flops_of_a_block_with_attention_and_what_sharing_and_checkpoints_change():
    tokens, sequence, hidden, r = 16, 8, 32, 8
    works = {name: total(work).flops for name, work in BLOCK.works().items()}
    matrices, attention = shapes.elements("tiny") // 3, tokens * sequence * hidden
    assert works[DENSE] == 6 * tokens * matrices + 6 * attention
    assert works[CHECKPOINTED] - works[DENSE] == 2 * tokens * matrices + 2 * attention
    assert works[UNSHARED] - works[OURS] == 2 * tokens * r * 3 * hidden


def test_costs_of_the_parts_counted_by_hand():
    assert roofline.product(2, 3, 5, HALF) == (Cost(2 * (6 + 15 + 10), 60),)
    assert roofline.forward_and_dx(2, 3, 5, SINGLE) == (Cost(4 * (6 + 15 + 10), 60),) * 2
    assert roofline.weight_gradient(2, 3, 5, SINGLE) == (Cost(4 * (10 + 6 + 15), 60),)
    assert roofline.coordinates_gradient(2, 5, 1, SINGLE) == (Cost(4 * (2 + 10 + 5), 20),)
    # dB: 5 numbers, P: 3, W: 15 read and written, M and V: 5 each, read and written in fp32.
    assert roofline.subspace_step(3, 5, 1, HALF) == (Cost(2 * (5 + 3 + 2 * 15) + 4 * 4 * 5, 30),)


# What is measured.


def test_every_contender_has_times_parts_and_bytes(rows):
    for case, found in rows.items():
        wanted = set(case.contenders()) - {"galore-torch"}  # an extra
        assert wanted <= set(found) <= set(case.contenders())
        for row in found.values():
            assert row["case"] == case.label and row["suite"] == "rso" and row["rank"] == 8 and row["dtype"] == "float32"
            assert all(row[f"{part}_ms"] > 0 for part in iterations.PARTS)
            assert row["tokens_per_s"] == pytest.approx(16e3 / row["p50_ms"])
            assert row["saved_mb"] > 0 and row["peak_mb"] >= row["gradient_mb"]
        assert all(found[name]["update_error"] <= checks.UPDATE_ERROR[SINGLE] for name in rso.RSO if name in found)


def test_bytes_are_those_of_the_formulas(rows):
    for found in rows.values():
        for row in found.values():
            for what in ("saved", "gradient", "state"):
                if f"{what}_theory_mb" in row:
                    assert row[f"{what}_mb"] == row[f"{what}_theory_mb"], (row["contender"], what)
        assert all(found[OURS][f"{what}_theory_mb"] for what in ("saved", "gradient", "state"))
    assert {name for name, row in rows[LAYER].items() if "saved_theory_mb" in row} >= {OURS, GALORE, DENSE}


def test_sharing_saves_three_zs_of_a_block_and_a_checkpoint_all_but_its_input(rows):
    found = rows[BLOCK]
    assert found[UNSHARED]["saved_mb"] - found[OURS]["saved_mb"] == pytest.approx(3 * 16 * 8 * 4 / 1e6)
    assert found[CHECKPOINTED]["saved_mb"] == pytest.approx(16 * 32 * 4 / 1e6)
    assert found[OURS]["saved_mb"] < found[DENSE]["saved_mb"] == found[GALORE]["saved_mb"]


# The choice of cases.


def test_the_command_line_chooses_layers_and_blocks(capsys):
    found = rso.cases(Selection(models=("tiny", "3x16"), ranks=(8, 64), dtypes=(HALF,)), on_gpu=False)
    assert [case.label for case in found] == [
        "rso linear 32→48 at 2048 tokens r=8 bfloat16",
        "rso linear 48→32 at 2048 tokens r=8 bfloat16",
        "rso tiny block at 8x256 tokens r=8 bfloat16",
        "rso linear 16→16 at 2048 tokens r=8 bfloat16",
    ]
    assert "tiny r=64 skipped" in capsys.readouterr().out
    assert {case.dtype for case in rso.cases(Selection(ranks=(8,)), on_gpu=False)} == {SINGLE, HALF}
    assert {case.model for case in rso.cases(Selection(ranks=(8,)), on_gpu=False)} == {(512, 1376), (1376, 512), "60m"}


def test_the_default_holds_the_layer_of_the_bar_and_largest_batches_are_a_gpus():
    on_cpu, quick = (rso.cases(Selection(quick=quick), on_gpu=False) for quick in (False, True))
    for dtype in (SINGLE, HALF):
        assert IterationCase((1024, 2736), 1, 2048, 128, dtype) in quick
    assert set(quick) <= set(on_cpu) and not any(isinstance(case, LargestCase) for case in on_cpu)
    on_gpu = rso.cases(Selection(), on_gpu=True)
    assert {(case.model, case.sequence) for case in on_gpu if isinstance(case, IterationCase) and case.is_block} == {
        (model, sequence) for model in ("350m", "1b") for sequence in (256, 2048)
    }
    assert any(isinstance(case, LargestCase) for case in on_gpu)


def test_a_case_that_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr("benchmarks.cases.free_bytes", lambda on_gpu: 10**6)
    monkeypatch.setattr(iterations, "make_module", None)
    with pytest.raises(Unavailable, match="needs about .* GB and 0.0 GB are free"):
        rso.run(IterationCase("7b", 8, 256, 128, HALF), HERE)


# What is wrong is refused, and nothing is timed.


@pytest.fixture
def no_clock(monkeypatch):
    monkeypatch.setattr(timing, "interleave", lambda *arguments, **options: pytest.fail("something wrong was timed"))


def refused(case, complaint):
    row = next(row for row in records.failed(rso.run(case, HERE)) if row["contender"] == OURS)
    assert row["case"] == case.label and re.match(f"WrongResult: {complaint}", row["failure"])


@pytest.mark.parametrize("case", [LAYER, BLOCK], ids=["layer", "block"])
@pytest.mark.parametrize("dtype", list(shapes.DTYPES.values()))
def test_a_right_iteration_passes_in_every_dtype(case, dtype):
    case = IterationCase(case.model, case.batch, case.sequence, case.rank, dtype)
    for share in ("auto", None):
        assert 0 < checks.check_iteration(iterations.rso(share)(case, case.batch, "cpu"), dtype) <= checks.UPDATE_ERROR[dtype] / 2


@pytest.mark.parametrize("what", ["y", "dx", "dB", "the update", "exp_avg"])
@pytest.mark.parametrize("case", [LAYER, BLOCK], ids=["layer", "block"])
def test_a_wrong_iteration_is_refused(monkeypatch, no_clock, case, what):
    """Each by five hundredths, in one layer."""

    def build(case, batch, device):
        training = iterations.rso("auto")(case, batch, device)
        layer = next(iter(iterations.layers(training.module).values()))
        [optimizer] = training.optimizers
        step = optimizer.step

        def wrong_step():
            before = layer.weight.clone()
            step()
            if what == "the update":
                layer.weight.add_(layer.weight - before, alpha=0.05)
            else:
                optimizer.state[layer.coordinates]["exp_avg"].mul_(1.05)

        if what == "dx":
            training.x.register_hook(lambda grad: 1.05 * grad)
        elif what == "dB":
            layer.coordinates.register_hook(lambda grad: 1.05 * grad)
        elif what != "y":
            optimizer.step = wrong_step
        return training

    if what == "y":
        sound = lrk.SubspaceLinear.forward
        monkeypatch.setattr(lrk.SubspaceLinear, "forward", lambda self, x: 1.05 * sound(self, x))
    monkeypatch.setitem(iterations.BLOCK if case.is_block else iterations.LAYER, OURS, build)
    refused(case, f"{what} .*not timed")


def test_saving_the_input_is_refused(monkeypatch, no_clock):
    """A layer that is right, and keeps x as well as Z."""
    sound = lrk.SubspaceLinear.forward
    monkeypatch.setattr(lrk.SubspaceLinear, "forward", lambda self, x: sound(self, x) + 0 * (x * self.coordinates[0, :1]).sum())
    refused(LAYER, "it has [0-9]* saved bytes, the formula says 512")
    refused(BLOCK, "it has [0-9]* saved bytes, the formula says")


def test_states_of_another_size_are_refused(monkeypatch, no_clock):
    def build(case, batch, device):
        training = iterations.rso("auto")(case, batch, device)
        training.optimizers[0].state["more"] = torch.zeros(3)
        return training

    monkeypatch.setattr(rso, "_checked", lambda case, build, device: 0.0)
    monkeypatch.setitem(iterations.LAYER, OURS, build)
    expected = LAYER.state_bytes()[OURS]
    refused(LAYER, f"it has {expected + 12} state bytes, the formula says {expected}")


def test_what_fails_is_a_row_of_its_own(monkeypatch):
    def failing(case, batch, device):
        raise RuntimeError("no such instruction")

    chosen = {OURS: iterations.LAYER[OURS], DENSE: iterations.LAYER[DENSE], "peer": failing}
    found = measured(LAYER, chosen, monkeypatch)
    assert set(found) == set(chosen) and found[DENSE]["p50_ms"] > 0
    assert found["peer"]["failure"] == "RuntimeError: no such instruction" and not records.failed(found.values())
    found = measured(LAYER, {DENSE: iterations.LAYER[DENSE], OURS: failing}, monkeypatch)
    assert set(found) == {OURS} and records.failed(found.values())


# The largest batch.


def test_largest_batches_of_a_model_that_has_room_for_so_many_tokens(monkeypatch):
    builds = iterations.BLOCK
    room = {OURS: 8, UNSHARED: 6, GALORE: 4, DENSE: 0, CHECKPOINTED: 12}

    def limited(name):
        def build(case, batch, device):
            assert case.depth == 3
            if batch > room[name]:
                raise torch.OutOfMemoryError("full")
            return builds[name](case, batch, device)

        return build

    monkeypatch.setattr(iterations, "BLOCK", {name: limited(name) for name in room})
    case = LargestCase("tiny", 4, 8, SINGLE)
    found = {row["contender"]: row for row in rso.run(case, HERE)}
    assert found.pop(DENSE)["skipped"] == "one sequence does not fit"
    assert {name: row["largest_batch"] for name, row in found.items()} == {name: most for name, most in room.items() if most}
    assert found[CHECKPOINTED]["ratio_to_ours"] == 1.5 and all(row["tokens_per_s"] > 0 for row in found.values())


# What is shown.


ORIGIN = {"device": "nvidia-x", "time": "2026-01-02T10:00:00+00:00", "commit": "abc1234", "torch": "2.13.0", "copy_gb_per_s": 40.0}


def test_the_page_shows_times_then_bytes_then_batches(rows, tmp_path):
    batches = [
        {
            "case": LargestCase("1b", 2048, 256, HALF).label,
            "contender": name,
            "largest_batch": most,
            "tokens_per_s": 1e4,
            "ratio_to_ours": 1,
        }
        for name, most in ((OURS, 24), (DENSE, 16))
    ]
    path = tmp_path / "nvidia-x" / "x.jsonl"
    path.parent.mkdir()
    found = [*rows[LAYER].values(), *rows[BLOCK].values(), *batches]
    path.write_text("".join(json.dumps(ORIGIN | row) + "\n" for row in found))
    text = readme.block(tmp_path)
    joined = " ".join(text.split())
    times, held, largest = (line for line in text.split("\n\n") if line.startswith("| what | r |"))
    assert readme.HELD in joined and readme.LARGEST in joined and readme.ABOUT["rso"] in joined
    assert len(times.splitlines()) == len(held.splitlines()) == 4 and len(largest.splitlines()) == 3
    assert times.splitlines()[0].startswith("| what | r | dtype | this | this, GaLoreAdamW | this, share=None | ")
    assert "| linear 24→40 at 16 tokens | 8 | fp32 |" in times and "predicted ms" in times and "predicted" not in held
    mine = rows[LAYER][OURS]
    cell = f"| {readme.short(mine['p50_ms'])} | {readme.short(rows[LAYER][GALORE]['p50_ms'])} ("
    assert cell in times
    bytes_of = [readme._megabytes(mine[key]) for key in ("saved_mb", "gradient_mb", "state_mb", "peak_mb")]
    assert "| {} / {} / {} ({}) |".format(*bytes_of) in held
    assert "| LLaMA 1B: largest batch of 2048 tokens | 256 | bf16 | 24 (1e+04) | 16 (1e+04) |" in largest


def test_the_page_compares_the_methods_on_a_block(rows, tmp_path):
    path = tmp_path / "cpu-x" / "x.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(ORIGIN | row) + "\n" for row in rows[LAYER].values()))
    assert readme.methods(tmp_path) == "Not measured yet."
    path.write_text("".join(json.dumps(ORIGIN | row) + "\n" for row in [*rows[LAYER].values(), *rows[BLOCK].values()]))
    header, line, *lines = (line for line in readme.methods(tmp_path).splitlines() if line.startswith("|"))
    assert len(line.split("|")) == len(header.split("|")) and len(lines) == len(set(readme.METHODS) & set(rows[BLOCK])) == 4
    mine = rows[BLOCK][OURS]
    shown = [readme._megabytes(mine[key]) for key in ("saved_mb", "gradient_mb", "state_mb", "peak_mb")]
    assert lines[-1] == "| `RSOAdamW` | " + " | ".join(shown) + f" | {readme.short(mine['p50_ms'])} |"


def test_titles_name_the_model():
    assert records.title({"case": IterationCase("60m", 8, 256, 128, HALF).label}) == ("LLaMA 60M block at 8 × 256 tokens", "128", "bf16")
    assert records.title({"case": LAYER.label}) == ("linear 24→40 at 16 tokens", "8", "fp32")


def test_the_terminal_shows_parts_bytes_and_batches(rows, capsys):
    batch = {"case": "rso x", "contender": OURS, "largest_batch": 24, "tokens_per_s": 12345.6, "ratio_to_ours": 1.0}
    records.print_rows([*rows[LAYER].values(), batch])
    printed = capsys.readouterr().out
    for shown in ("forward", "backward", "saved", "gradients", "largest batch", "12346", "24"):
        assert shown in printed
