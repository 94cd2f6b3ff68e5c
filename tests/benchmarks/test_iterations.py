"""Iterations of a layer and of blocks: what is built, run and counted, and the search for the largest
batch."""

import copy

import pytest
import torch
from torch import nn

from benchmarks import contenders, iterations, memory, shapes
from benchmarks.iterations import CHECKPOINTED, DENSE, UNSHARED
from benchmarks.records import OURS
from benchmarks.suites.rso import IterationCase

HALF, SINGLE = torch.bfloat16, torch.float32
LAYER = IterationCase((24, 40), 1, 16, 8, SINGLE)
BLOCK = IterationCase("tiny", 2, 8, 8, SINGLE)


def test_the_peak_holds_an_input_that_is_saved_and_lets_go_of_one_that_is_not():
    """Of a layer alone: y and what is saved; then also dx and the gradient, and the step's temporaries."""
    wide = IterationCase((512, 8), 1, 256, 4, SINGLE)
    peaks = {name: iterations.LAYER[name](wide, 1, "cpu") for name in (OURS, DENSE)}
    for training in peaks.values():
        training()
    ours, dense = (memory.peak_bytes(lambda training=training: training(produce=True), False)[1] for training in peaks.values())
    x = 256 * 512 * 4
    assert x < ours < 1.2 * x and 2 * x < dense < 2.2 * x  # dx alone, or x and dx


def test_contenders_start_from_the_same_weights_and_compute_the_same():
    outputs = {}
    for name, build in iterations.BLOCK.items():
        if name != "galore-torch":
            training = build(BLOCK, 2, "cpu")
            with torch.no_grad():
                outputs[name] = training.module(training.x), training.dy
    first = outputs.pop(CHECKPOINTED)  # AdamW made a step before it was built
    torch.testing.assert_close(outputs[DENSE], first)
    assert torch.equal(outputs[OURS][0], outputs[UNSHARED][0])
    assert all(torch.equal(first[1], dy) for _, dy in outputs.values())


def test_a_training_moves_every_parameter_and_frees_its_gradients():
    for name, build in iterations.BLOCK.items():
        if name == "galore-torch":
            continue
        training = build(BLOCK, 2, "cpu")
        before = copy.deepcopy(training.module.state_dict())
        training()
        moved = {key for key, value in training.module.state_dict().items() if not torch.equal(value, before[key])}
        assert moved == set(before) - {"cos", "sin"}, name
        assert all(tensor.grad is None for tensor in (training.x, *training.module.parameters()))


def test_saved_bytes_count_storages_once_and_leave_out_what_lasts():
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    assert memory.saved_bytes(lambda: layer(x), [layer.weight]) == x.nbytes
    assert memory.saved_bytes(lambda: layer(x), [layer.weight, x]) == 0
    assert memory.saved_bytes(lambda: layer(x[:2]) + layer(x[2:]).sum(0), [layer.weight]) == x.nbytes  # two views of one storage
    assert memory.saved_bytes(lambda: layer(x).relu(), [layer.weight, x]) == 5 * 4 * 4


def test_parts_are_medians_of_the_last_rounds():
    training = iterations.LAYER[DENSE](LAYER, 1, "cpu")
    training.marks = [[0, 9, 9, 9]] + [[0, 0.001 * i, 0.003 * i, 0.006 * i] for i in (1, 2, 3)]
    assert training.parts_ms(3) == pytest.approx({"forward": 2, "backward": 4, "step": 6})


def test_on_a_gpu_parts_lie_between_events_that_do_not_wait(monkeypatch):
    clock = iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, end):
            return float(end.at - self.at)

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(next(clock)))
    training = iterations.LAYER[DENSE](LAYER, 1, "cpu")
    training.on_gpu = True
    for _ in range(3):
        training()
    assert not waited
    assert training.parts_ms(2) == {"forward": 1.0, "backward": 1.0, "step": 1.0} and waited == [12]


def test_blocks_have_the_heads_of_their_models():
    iterations.make_module(BLOCK, "cpu")  # puts the example where it can be imported
    import llama

    for model in ("60m", "350m", "1b"):
        hidden, intermediate, depth = shapes.LLAMA[model]
        size = llama.SIZES[model]
        assert (size.hidden, size.intermediate, size.layers, size.hidden // size.heads) == (hidden, intermediate, depth, 64)
    block = iterations.make_module(IterationCase("60m", 1, 4, 8, HALF), "cpu")
    assert block.layers[0].self_attn.heads == 8 and block.cos.shape == (4, 32) and block.cos.dtype == SINGLE


@pytest.mark.parametrize("room", [1, 2, 3, 7, 8, 9, 31, 100, 1000])
def test_the_largest_that_fits_is_found_to_an_eighth(room):
    tried = []

    def attempt(number):
        tried.append(number)
        if number > room:
            raise torch.OutOfMemoryError("full")
        return f"at {number}"

    found, result = memory.largest(attempt)
    assert found <= room < found + max(1, found // 8) + 1 and result == f"at {found}"
    assert len(tried) == len(set(tried)) <= 16
    assert memory.largest(lambda number: number, limit=64) == (64, 64)


def test_nothing_fits_and_other_errors_are_not_taken_for_it():
    def full(number):
        raise torch.OutOfMemoryError("full")

    def broken(number):
        raise RuntimeError("broken")

    assert memory.largest(full) is None
    with pytest.raises(RuntimeError, match="broken"):
        memory.largest(broken)


def test_gradients_exist_when_a_contender_of_the_step_suite_is_built(monkeypatch):
    seen = []

    def build_step(params, rank):
        seen.append([(param.grad is not None, param.dim()) for param in params])
        return contenders.adamw_fused(params, rank)

    iterations.by_steps_of(build_step)(BLOCK, 2, "cpu")
    assert seen == [[(True, 2)] * 7]
