"""The registry, and the model of costs against counting by hand and against what optimizers really hold."""

import math

import pytest
import torch

import lowrank_kernels as lrk
from benchmarks import contenders, memory, roofline, shapes
from benchmarks.roofline import Cost, Machine, total

HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("model, billions", [("60m", 0.0253), ("350m", 0.302), ("1b", 1.208), ("7b", 6.476), ("13b", 12.688)])
def test_models_have_the_projected_weights_that_their_names_promise(model, billions):
    hidden, intermediate, layers = shapes.LLAMA[model]
    assert shapes.elements(model) == layers * (4 * hidden**2 + 3 * hidden * intermediate)
    assert shapes.elements(model) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert sum(count for count, _, _ in shapes.buckets(model)) == len(shapes.model_shapes(model)) == 7 * layers


def test_a_model_may_be_a_number_of_squares_and_nothing_else():
    assert shapes.model_shapes("3x20") == [(20, 20)] * 3
    assert shapes.buckets("3x20") == [(3, 20, 20)]
    for name in ("70b", "x512", "3x", "3x20x4", "ax5"):
        with pytest.raises(ValueError, match=f"unknown model '{name}': it is one of 60m"):
            shapes.model_shapes(name)


def test_costs_of_a_matrix_counted_by_hand():
    m, n, r = 2, 3, 1  # P: 2 numbers, G and W: 6, R, M, V and N: 3
    assert roofline.project(m, n, r, SINGLE) == (Cost(4 * (2 + 6 + 3), 2 * 2 * 3),)
    assert roofline.moments(m, n, r, SINGLE) == (Cost(4 * (3 + 2 * 3 + 2 * 3 + 3)),)
    assert roofline.back_project(m, n, r, SINGLE) == (Cost(4 * (2 + 3 + 6 + 6), 2 * 2 * 3),)
    assert total(roofline.single_pass(m, n, r, SINGLE)).bytes_moved == 4 * (6 + 2 * 6 + 2 + 4 * 3)
    assert roofline.moments(m, n, r, HALF) == (Cost(4 * (3 + 2 * 3 + 2 * 3) + 2 * 3),)
    assert roofline.back_project(m, n, r, HALF)[0].bytes_moved == 2 * (2 + 3 + 6 + 6)
    assert roofline.moments(m, n, r, SINGLE, 8)[0].bytes_moved == 4 * 3 + 2 * 2 * (3 + 4) + 4 * 3  # a byte each, a scale a row
    assert roofline.adamw(m, n, HALF, 2)[0].bytes_moved == 14 * 6
    assert roofline.adamw(m, n, HALF, 4)[0].bytes_moved == 22 * 6
    assert roofline.adamw(m, n, SINGLE, 4)[0].bytes_moved == 28 * 6


def test_the_split_costs_n_more_than_a_single_pass():
    m, n, r = 96, 200, 16
    for dtype, bits in ((SINGLE, 32), (HALF, 32), (HALF, 8)):
        two, one = roofline.split(m, n, r, dtype, bits), total(roofline.single_pass(m, n, r, dtype, bits))
        assert len(two) == 2
        through_memory = 2 * dtype.itemsize * r * n + m * r * dtype.itemsize  # N, and P for the second product
        assert total(two).bytes_moved - one.bytes_moved == through_memory
        assert total(two).flops == one.flops == 4 * m * n * r


def test_what_fira_and_apollo_move_beyond_a_single_pass():
    m, n, r, size = 96, 200, 16, 2
    one = total(roofline.single_pass(m, n, r, HALF))
    fira, apollo = (total(of(m, n, r, HALF)) for of in (roofline.residual, roofline.scaling))
    # G twice more, P twice more; N written and read, R written and read twice.
    assert fira.bytes_moved - one.bytes_moved == size * (2 * m * n + 2 * m * r + 5 * r * n)
    assert fira.flops == 6 * m * n * r
    assert apollo.bytes_moved - one.bytes_moved == size * m * n  # G once more
    assert apollo.flops == 2 * m * n * r


def test_l2_bytes_are_what_programs_read_again():
    """Against a loop over the programs of each launch."""
    m, n, r, size = 300, 700, 260, 2
    basis, grad, normalised = m * r * size, m * n * size, r * n * size
    columns, rows, directions = (math.ceil(extent / tile) for extent, tile in ((n, 128), (m, 128), (r, 256)))
    project = sum(basis / directions + grad / columns for _ in range(columns) for _ in range(directions))
    assert roofline.project(m, n, r, HALF)[0].l2_bytes == pytest.approx(project - basis - grad)
    back_project = sum(basis / rows + normalised / columns for _ in range(columns) for _ in range(rows))
    assert roofline.back_project(m, n, r, HALF)[0].l2_bytes == pytest.approx(back_project - basis - normalised)
    for rank, width in ((128, 128), (256, 128)):
        programs = math.ceil(n / width)
        assert roofline.single_pass(m, n, rank, HALF)[0].l2_bytes == 2 * programs * m * rank * size - m * rank * size


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (64, 64), (30, 129)])
def test_state_bytes_are_what_the_optimizer_holds(shape, bits, dtype):
    [param] = contenders.make_params([shape], dtype, "cpu")
    optimizer = lrk.GaLoreAdamW([{"params": [param], "rank": 8, "state_bits": bits}])
    optimizer.step()
    state = optimizer.state[param]
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values() if isinstance(tensor, torch.Tensor))
    assert roofline.state_bytes(shape, 8, dtype, bits) == held == memory.tensor_bytes(dict(state))
    m, n = sorted(shape)
    moments = 8 * 8 * n if bits == 32 else 2 * 8 * (n + 4 * math.ceil(n / 64))
    assert held == moments + dtype.itemsize * m * 8 + 4  # the count of updates


def test_a_rank_above_the_short_side_is_clamped():
    assert roofline.over_model("3x20", 64, lambda m, n, r: (Cost(r),)) == (Cost(3 * 20),)
    assert roofline.state_bytes((20, 30), 64, SINGLE) == roofline.state_bytes((20, 30), 20, SINGLE)


def test_a_model_is_its_buckets_one_after_another():
    work = roofline.over_model("tiny", 8, lambda m, n, r: roofline.split(m, n, r, HALF))
    assert len(work) == 3 * 2
    assert total(work).flops == sum(4 * rows * columns * 8 for rows, columns in shapes.model_shapes("tiny"))


def test_time_is_the_longest_of_a_launch_and_the_sum_of_launches():
    machine = Machine("made up", 1000, {HALF: 100}, l2_gb_per_s=2000)
    memory_bound, compute_bound, l2_bound = Cost(3e9, 1e11), Cost(1e9, 4e11), Cost(1e9, 1e11, 1e10)
    assert machine.predicted_ms((memory_bound,), HALF) == pytest.approx(3)
    assert machine.predicted_ms((compute_bound,), HALF) == pytest.approx(4)
    assert machine.predicted_ms((l2_bound,), HALF) == pytest.approx(5)
    assert machine.predicted_ms((memory_bound, compute_bound, l2_bound), HALF) == pytest.approx(12)
    assert machine.predicted_ms((memory_bound, Cost(1e9, 1)), SINGLE) is None  # no rate is known
    assert machine.predicted_ms((Cost(2e9),), SINGLE) == pytest.approx(2)  # nothing to multiply


def test_rates_of_measured_ceilings():
    row = {"device": "here", "copy_gb_per_s": 20.0, "matmul_tflop_per_s_float32": 0.4, "matmul_tflop_per_s_bfloat16": 0.1}
    on_cpu, on_gpu = Machine.measured(row, on_gpu=False), Machine.measured(row | {"matmul_tflop_per_s_bfloat16": 8.0}, on_gpu=True)
    assert on_cpu.matmul_tflop_per_s == {SINGLE: 0.4, HALF: 0.4, torch.float16: 0.4}
    assert on_gpu.matmul_tflop_per_s == {SINGLE: 0.4, HALF: 8.0, torch.float16: 8.0}
    old = Machine.measured({"copy_gb_per_s": 20.0, "matmul_tflop_per_s_float32": 0.4}, on_gpu=False)
    assert HALF not in old.matmul_tflop_per_s


def test_a_step_of_7b_is_bound_by_memory_until_between_256_and_512():
    """What DESIGN says of an H100 (r ≈ 350), without L2."""
    machine = Machine("H100", 3000, {HALF: 800})
    bound = {}
    for rank in (128, 256, 512):
        work = roofline.over_model("7b", rank, lambda m, n, r: roofline.single_pass(m, n, r, HALF))
        times = machine.times_ms(total(work), HALF)
        bound[rank] = max(times, key=times.get)
    assert bound[128] == bound[256] == "memory"
    assert machine.times_ms(total(roofline.works("7b", 512, HALF)["step, split"]), HALF)["matmul"] > 16
    assert "step, single pass" not in roofline.works("7b", 512, HALF)


def test_the_table_says_that_it_is_a_prediction(capsys, tmp_path):
    roofline.main(["--model", "60m", "7b", "--rank", "128"])
    printed = capsys.readouterr().out
    assert printed.count("PREDICTED, not measured") == 2
    assert "NVIDIA H100: copy 3000 GB/s" in printed and "step, single pass, 8-bit states" in printed
    file = tmp_path / "results.jsonl"
    file.write_text('{"device": "cpu-of-mine", "copy_gb_per_s": 10, "matmul_tflop_per_s_float32": 1}\n')
    roofline.main(["--model", "3x512", "--rank", "128", "--dtype", "fp32", "bf16", "--results", str(file)])
    printed = capsys.readouterr().out
    assert "on cpu-of-mine" in printed and "H100" not in printed
    assert "no matmul rate" in printed  # of bf16
