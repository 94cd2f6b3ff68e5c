"""The loop's arithmetic, seen from inside."""

import dataclasses
import math

import memory
import pytest
import text
import torch
import training
from checkpoints import Damaged, Metrics, read_metrics, write_atomically
from matrix import representative
from methods import METHODS
from pretrain_runs import arithmetic
from settings import Settings

import lowrank_kernels

MICRO = Settings(steps=4, batch_size=4, seq_len=16, threads=1)


def gradients(settings, pieces):
    model = training.build_model(settings)
    tokens = torch.randint(256, (settings.batch_size, settings.seq_len + 1), generator=torch.Generator().manual_seed(0))
    loss = training.accumulate_gradients(model, tokens, pieces)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulation_equals_one_big_batch(pieces):
    whole_loss, whole = gradients(MICRO, 1)
    loss, summed = gradients(MICRO, pieces)
    # fp32 sums of 64 terms in another order: relative error ≲ 64 · 2⁻²⁴ ≈ 4e-6, and rounding through the
    # layers, a few times that.
    assert loss == pytest.approx(whole_loss, rel=2e-5)
    assert (summed - whole).norm() < 2e-5 * whole.norm()


def test_warm_up_then_cosine():
    rates = [training.learning_rate(step, peak=1.0, warmup=10, steps=100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0) == pytest.approx(max(rates))
    assert rates[-1] == pytest.approx(training.FINAL_LR)
    assert all(earlier < later for earlier, later in zip(rates[:9], rates[1:10], strict=True))
    assert all(earlier > later for earlier, later in zip(rates[10:-1], rates[11:], strict=True))
    middle = (10 + 99) / 2
    assert (rates[math.floor(middle)] + rates[math.ceil(middle)]) / 2 == pytest.approx((1 + training.FINAL_LR) / 2, abs=1e-3)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (0, 2), (5, 5), (10, 3)])
def test_schedules_without_room(warmup, steps):
    assert all(0 < training.learning_rate(step, 1.0, warmup, steps) <= 1 for step in range(steps))


def test_evaluation_weighs_every_byte_alike():
    model = training.build_model(MICRO)
    windows = torch.randint(256, (5, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = [training.llama.loss(model, window[None]).item() for window in windows]
    assert training.evaluate(model, windows, batch_size=2) == pytest.approx(sum(each) / 5, rel=1e-5)
    assert training.evaluate(model, windows, batch_size=2) != pytest.approx(sum(each[:4]) / 4, rel=1e-5)


def test_state_bytes_counts_every_tensor():
    parameter = torch.nn.Parameter(torch.ones(3, 5))
    parameter.grad = torch.ones(3, 5)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    assert training.state_bytes(optimizer, torch.nn.Module()) == 2 * 15 * 4 + 4  # two moments, and the step as one fp32


def test_state_bytes_of_rso_count_a_shared_p_once():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(16, 8, bias=False) for name in ("q_proj", "k_proj")})
    lowrank_kernels.to_subspace(model, rank=4, target_modules=["q_proj", "k_proj"])
    optimizer = lowrank_kernels.RSOAdamW(model.parameters())
    for layer in model.values():
        layer(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    assert training.state_bytes(optimizer, model) == 2 * (2 * 4 * 8 * 4 + 4) + 16 * 4 * 4


def test_rso_is_built_as_the_settings_say():
    settings = dataclasses.replace(
        MICRO, dtype="bf16", rso_rank=5, inner_steps=7, distribution="haar", rounding="stochastic", weight_decay=0.1
    )
    model = training.build_model(settings)
    dense, group = METHODS["rso"].build(model, 1e-3, settings).param_groups
    assert [group[key] for key in ("inner_steps", "rounding", "weight_decay", "lr")] == [7, "stochastic", 0.1, 1e-3]
    assert [dense[key] for key in ("weight_decay", "lr")] == [0.1, settings.dense_lr]
    subspace = model.layers[0].mlp.gate_proj.subspace
    assert (subspace.rank, subspace.distribution, subspace.seed) == (5, "haar", settings.seed)
    settings = dataclasses.replace(settings, distribution="principal", principal_rank=2, rso_scale=0.5, rso_moments="carry")
    model = training.build_model(settings)
    _, group = METHODS["rso"].build(model, 1e-3, settings).param_groups
    assert (model.layers[0].mlp.gate_proj.subspace.principal_rank, group["scale"], group["moments"]) == (2, 0.5, "carry")


SELECTIONS = {"galore": "dominant", "fira": "dominant", "adafactor": "dominant", "adam-mini": "dominant"}
SELECTIONS |= {"i3s": "importance", "fira-i3s": "importance", "adafactor-i3s": "importance", "adam-mini-i3s": "importance"}
SELECTIONS |= {"apollo": "gaussian", "apollo-mini": "gaussian"}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("adamw", "rso")])
def test_low_rank_methods_are_built_as_their_names_and_the_settings_say(method):
    settings = dataclasses.replace(MICRO, rank=8, update_proj_gap=7, scale=0.3, state_bits=8)
    _, group = METHODS[method].build(training.build_model(settings), 1e-3, settings).param_groups
    assert group["selection"] == SELECTIONS[method] and group["update_proj_gap"] == 7 and group["state_bits"] == 8
    assert group["rank"] == (1 if method == "apollo-mini" else 8)
    assert group["scale"] == {"apollo": 1.0, "apollo-mini": math.sqrt(128)}.get(method, 0.3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tie_head", [False, True])
def test_dense_parameters_have_one_rate_under_every_method(method, tie_head):
    """Embedding, head and norms at settings.dense_lr, what the method is about at its own: in groups of the
    same parameters."""
    settings = dataclasses.replace(MICRO, tie_head=tie_head, dense_lr=3e-3, rso_rank=8, rank=8)
    model = training.build_model(settings)
    optimizer = training.build_optimizer(model, method, 7e-4, settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    dense, matrices = ({names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups)
    norms = {f"layers.{layer}.{kind}_layernorm.weight" for layer in (0, 1) for kind in ("input", "post_attention")}
    assert dense == {"embed_tokens.weight", "norm.weight", *norms, *([] if tie_head else ["lm_head.weight"])}
    layers = {name.rpartition(".")[0] for name in matrices}  # RSO has a layer's weight and its coordinates
    assert len(layers) == 14 and all(".self_attn." in name or ".mlp." in name for name in matrices)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 7e-4]


def test_no_method_has_a_dense_rate_of_its_own():
    from settings import MODEL_DEFAULTS, defaults

    assert defaults("tiny").dense_lr == Settings().dense_lr
    assert all(defaults(model).dense_lr in (Settings().dense_lr, Settings().dense_lr / 2) for model in MODEL_DEFAULTS)


@pytest.mark.parametrize("method", METHODS)
def test_the_schedule_scales_both_rates(tmp_path, method):
    corpus = text._split_tail(b"the cat sat on the mat. " * 300, "cats")
    settings = dataclasses.replace(
        MICRO, steps=6, warmup=2, rank=4, rso_rank=8, inner_steps=2, update_proj_gap=2, dense_lr=1e-2, eval_sequences=4
    )
    rows = training.train(settings, method, 1e-3, corpus, training.Files.of(tmp_path, method), checkpoint_every=100)
    steps = [row for row in rows if row["event"] == "step"]
    for step, row in enumerate(steps):
        assert row["lr"] == training.learning_rate(step, 1e-3, 2, 6) and row["dense_lr"] == training.learning_rate(step, 1e-2, 2, 6)
    saved = torch.load(tmp_path / f"{method}.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["lr"] for group in saved] == [steps[-1]["dense_lr"], steps[-1]["lr"]]


def test_the_dense_rate_moves_the_head_and_not_the_layers(tmp_path):
    """One step of AdamW: each group by its own rate, ±lr in every element whose gradient is not tiny."""
    corpus = text._split_tail(b"the cat sat on the mat. " * 300, "cats")
    before = dict(training.build_model(MICRO).named_parameters())
    settings = dataclasses.replace(MICRO, steps=1, warmup=0, dense_lr=1e-2, eval_sequences=4)
    training.train(settings, "adamw", 1e-3, corpus, training.Files.of(tmp_path, "adamw"), checkpoint_every=100)
    after = torch.load(tmp_path / "adamw.pt", weights_only=True)["model"]
    moved = {name: (after[name] - parameter.detach()).abs().max().item() for name, parameter in before.items()}
    rate = training.learning_rate(0, 1.0, 0, 1)
    for name, distance in moved.items():
        matrix = ".self_attn." in name or ".mlp." in name
        assert distance == pytest.approx(rate * (1e-3 if matrix else 1e-2), rel=0.01), name


def test_saved_activations_are_counted_once_and_without_parameters():
    """Of a model that is embedding, one projection and logits: x for the projection, Z where it is a
    SubspaceLinear."""
    tokens = torch.randint(256, (3, 17), generator=torch.Generator().manual_seed(0))
    model = training.build_model(dataclasses.replace(MICRO, model="tiny"))
    dense = memory.saved_activation_bytes(model, tokens)
    assert dense == memory.saved_activation_bytes(model, tokens)
    # All but the angles of positions grows with the batch; the parameters are 1.9 MB.
    assert 2 * dense - memory.saved_activation_bytes(model, tokens.repeat(2, 1)) < 10_000
    with torch.no_grad():
        assert memory.saved_activation_bytes(model, tokens) == 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert memory.saved_activation_bytes(model, tokens) == 0
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    lowrank_kernels.to_subspace(model, rank=8, target_modules=["down_proj"])
    # The input of down_proj (352 of fp32) is saved for nothing else, and its Z (8) takes its place, in two
    # layers.
    assert dense - memory.saved_activation_bytes(model, tokens) == 2 * 3 * 16 * (352 - 8) * 4


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    corpus = text._split_tail(bytes(range(256)) * 20, "bytes")
    monkeypatch.setattr(training, "accumulate_gradients", lambda *_: math.nan)
    with pytest.raises(training.Diverged, match="AdamW diverged at step 1"):
        training.train(MICRO, "adamw", 1e-3, corpus, training.Files.of(tmp_path, "adamw"), checkpoint_every=1)


def test_bf16_weights_train(tmp_path):
    corpus = text._split_tail(b"the cat sat on the mat. " * 300, "cats")
    settings = Settings(steps=30, batch_size=4, seq_len=16, warmup=3, threads=1, dtype="bf16", eval_every=30, eval_sequences=4)
    rows = training.train(settings, "adamw", 3e-3, corpus, training.Files.of(tmp_path, "adamw"), checkpoint_every=30)
    saved = torch.load(tmp_path / "adamw.pt", weights_only=True)
    assert {tensor.dtype for tensor in saved["model"].values()} == {torch.bfloat16}
    assert rows[-2]["val_loss"] < rows[0]["loss"] - 1


RUNS = [("adamw", "fp32"), ("galore", "bf16"), ("i3s", "fp32"), ("rso", "fp32"), ("rso", "bf16")]
TOGETHER = {("adamw", "fp32"): (2,), ("galore", "bf16"): (1, 2), ("i3s", "fp32"): (3,), ("rso", "fp32"): (2, 3), ("rso", "bf16"): (1,)}


@pytest.mark.parametrize(
    ("method", "dtype", "stop_after"),
    representative(
        [(*method, step) for method in RUNS for step in (1, 2, 3)],
        lambda method, dtype, stop_after: stop_after in TOGETHER[method, dtype],
    ),
)
def test_a_run_in_two_parts_is_the_run_in_one(tmp_path, method, dtype, stop_after):
    """Refreshes fall on steps 1 and 3, RSO's on 2, so the parts meet after a refresh, before one and
    between."""
    corpus = text._split_tail(b"the cat sat on the mat. " * 300, "cats")
    settings = dataclasses.replace(MICRO, dtype=dtype, rank=4, update_proj_gap=2, inner_steps=2, eval_every=2, eval_sequences=4, warmup=0)

    def run(name, **how):
        (tmp_path / name).mkdir(exist_ok=True)
        rows = training.train(settings, method, 1e-2, corpus, training.Files.of(tmp_path / name, method), checkpoint_every=100, **how)
        return arithmetic(rows)

    seen = []
    with pytest.raises(training.Stopped):
        run("parts", on_row=seen.append, should_stop=lambda: seen[-1]["step"] == stop_after)
    assert run("parts", resume=True) == run("whole")
    saved = {name: torch.load(tmp_path / name / f"{method}.pt", weights_only=True) for name in ("parts", "whole")}
    assert all(torch.equal(saved["parts"]["model"][key], value) for key, value in saved["whole"]["model"].items())


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint"
    write_atomically(path, lambda file: file.write(b"whole"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"whole"


def test_metrics_forget_what_came_after_a_position(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    first, second, other = ({"event": "eval", "step": step, "val_loss": 1.0} for step in (1, 2, 20))
    metrics.append(first)
    position = metrics.position()
    metrics.append(second)
    metrics.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 3')
    assert read_metrics(path) == [first, second]

    metrics = Metrics(path, position)
    metrics.append(other)
    metrics.close()
    assert read_metrics(path) == [first, other]
    with pytest.raises(Damaged, match="was changed since"):
        Metrics(path, position=10_000)


@pytest.mark.parametrize("method", ["galore", pytest.param("i3s", marks=pytest.mark.slow)])
def test_8_bit_states_learn_as_32_bit_ones_do(tmp_path, method):
    """Held-out loss within a percent after two refreshes; longer runs stand in
    benchmarks/results/learning/state-bits.jsonl."""
    corpus = text.load(None)
    losses = {}
    for bits in (32, 8):
        settings = Settings(steps=80, warmup=8, batch_size=8, seq_len=64, update_proj_gap=30, eval_every=80, state_bits=bits)
        files = training.Files.of(tmp_path / str(bits), method)
        files_of = dict(checkpoint_every=1000, resume=False, should_stop=lambda: False)
        (tmp_path / str(bits)).mkdir()
        rows = training.train(dataclasses.replace(settings, data_digest=corpus.digest), method, 2e-2, corpus, files, **files_of)
        losses[bits] = next(row["val_loss"] for row in rows if row["event"] == "eval" and row["step"] == 80)
    assert losses[8] < 0.7 * math.log(256), "it learns"
    assert losses[8] == pytest.approx(losses[32], rel=0.01)
    assert losses[8] != losses[32], "or the setting did not arrive"
