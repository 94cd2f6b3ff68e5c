"""python -m lowrank_kernels.estimate."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrix import representative
from test_estimate import OF_THE_PAGE

import lowrank_kernels as lrk
from lowrank_kernels.estimate import METHODS, command, llama, models

ROOT = Path(__file__).parents[1]
PARAMETERS = {  # of the papers' tables, and for llama-3 of its model card, in billions
    "llama-60m": 0.058,
    "llama-130m": 0.134,
    "llama-350m": 0.368,
    "llama-1b": 1.34,
    "llama-3b": 2.7,
    "llama-7b": 6.74,
    "llama-13b": 13.02,
    "llama-70b": 68.98,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.55,
}


def run(capsys, *arguments):
    command.main(arguments)
    return capsys.readouterr().out


def as_json(capsys, *arguments):
    return json.loads(run(capsys, *arguments, "--json"))


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_it_runs_as_a_module_without_warnings():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "lowrank_kernels.estimate", "--model", "llama-60m", "--rank", "128"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stderr == "" and "galore" in done.stdout and "peak" in done.stdout


@pytest.mark.parametrize("name", models.SIZES)
def test_known_models_have_as_many_parameters_as_is_said(name):
    model = llama.on_meta(models.SIZES[name], torch.bfloat16)
    assert sum(param.numel() for param in model.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_are_those_of_estimate_memory(capsys, method):
    rank = {"adamw": None, "apollo-mini": 1}.get(method, 16)
    arguments = ["--rank", str(rank)] if rank and method != "apollo-mini" else []
    found = as_json(capsys, "--model", "llama-60m", "--method", method, *arguments, "--dtype", "float32")[method]
    estimate = lrk.estimate_memory(llama.on_meta(models.SIZES["llama-60m"], torch.float32), method, rank)
    assert found == dataclasses.asdict(estimate) | {"held": estimate.held, "peak": estimate.peak}


def test_options_reach_the_estimate(capsys):
    options = "--state-bits 8 --in-backward deferred --accumulator bfloat16 --proj-type left --shards 2 --device cpu"
    found = as_json(capsys, "--model", "llama-60m", "--rank", "16", *options.split())["galore"]
    estimate = lrk.estimate_memory(
        llama.on_meta(models.SIZES["llama-60m"], torch.bfloat16),
        "galore",
        16,
        state_bits=8,
        in_backward="deferred",
        accumulator_dtype=torch.bfloat16,
        proj_type="left",
        shards=2,
        device="cpu",
    )
    assert found["peak"] == estimate.peak and found["accumulators"] == estimate.accumulators > 0


def test_methods_side_by_side(capsys):
    text = run(capsys, "--model", "llama-60m", "--rank", "16", "--compare", "adamw", "galore", "rso", "--state-bits", "8")
    header, *lines = [line.split() for line in text.splitlines()[1:]]
    assert header == ["GiB", "adamw", "galore", "rso"] and text.startswith("llama-60m, bfloat16, rank 16\n")
    peaks = next(line for line in lines if line[0] == "peak")[1:]
    found = as_json(capsys, "--model", "llama-60m", "--rank", "16", "--compare", "adamw", "galore", "rso", "--state-bits", "8")
    assert peaks == [f"{found[method]['peak'] / 2**30:.3f}" for method in ("adamw", "galore", "rso")]
    alone = as_json(capsys, "--model", "llama-60m", "--rank", "16", "--method", "rso")
    assert alone["rso"] == found["rso"]  # --state-bits is for galore alone


@pytest.mark.parametrize(
    "line",
    representative(
        ["`torch.optim.AdamW`", 'the same, `"deferred"`', 'the same, `"immediately"`', "RSO"],
        keep=lambda line: "deferred" in line or line == "RSO",
    ),
)
def test_seven_billion_parameters_take_what_the_page_says(capsys, line):
    """The command has a model of its own, and a fused attention. docs/gradients.md has GB to a digit."""
    case = OF_THE_PAGE[line]
    arguments = ["--rank", str(case["rank"])] if "rank" in case else []
    arguments += ["--state-bits", "8"] if "state_bits" in case else []
    arguments += ["--in-backward", case["in_backward"]] if "in_backward" in case else []
    arguments += ["--sequence", "256", "--checkpointing"]
    found = as_json(capsys, "--model", "llama-7b", "--method", case["method"], *arguments)[case["method"]]
    table = (ROOT / "docs" / "gradients.md").read_text().partition("## How much it takes")[2]
    cells = next(text for text in table.splitlines() if text.startswith(f"| {line} |")).split("|")
    assert found["peak"] / 1e9 == pytest.approx(float(cells[-2]), abs=0.1)


def test_activations_grow_with_tokens_and_shrink_by_checkpointing(capsys):
    def activations(*arguments):
        return as_json(capsys, "--model", "llama-130m", "--rank", "16", *arguments)["galore"]["activations"]

    assert activations() == 0
    one, two = activations("--sequence", "1024"), activations("--sequence", "1024", "--batch", "2")
    assert one > 0 and two > 1.8 * one and activations("--sequence", "1024", "--checkpointing") < one / 2
    assert two == pytest.approx(activations("--sequence", "2048"), rel=0.01)  # attention is fused: linear in the length


def test_shards_take_an_eighth_of_what_is_spread(capsys):
    whole, part = (as_json(capsys, "--model", "llama-7b", "--rank", "1024", *more)["galore"] for more in ([], ["--shards", "8"]))
    for name in ("weights", "gradients", "states", "dense_states"):
        assert part[name] == pytest.approx(whole[name] / 8, rel=1e-3), name
    assert whole["bases"] / 8 < part["bases"] < whole["bases"]  # P is whole where the cut goes along n


# Models by their config.json.

CONFIG = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
)


def written(folder, **changes):
    config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


def weights(model):
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    "changes, elements",
    [
        ({}, 0),
        (dict(num_key_value_heads=4), 2 * 2 * 32 * 64),
        (dict(num_key_value_heads=...), 2 * 2 * 32 * 64),
        (dict(tie_word_embeddings=True), -100 * 64),
        (dict(model_type="qwen2"), 2 * (64 + 32 + 32)),
        (dict(model_type="mistral", head_dim=32), 2 * (2 * 64 * 64 + 2 * 32 * 64)),
    ],
    ids=str,
)
def test_a_config_gives_the_parameters_of_transformers_model(tmp_path, changes, elements):
    base = sum(torch.Size(shape).numel() for shape in weights(llama.on_meta(models.size_of(written(tmp_path)), torch.float32)).values())
    model = llama.on_meta(models.size_of(written(tmp_path, **changes)), torch.float32)
    assert sum(param.numel() for param in model.parameters()) == base + elements
    assert base == 2 * 100 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 176 + 2 * 64)
    assert "model.layers.1.self_attn.k_proj.weight" in weights(model)
    assert models.size_of(str(tmp_path)) == models.size_of(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="gpt2"), "has model_type='gpt2', and only llama, mistral, qwen2 are known"),
        (dict(model_type=...), "has no model_type"),
        (dict(hidden_size=...), "has no hidden_size, where a positive int is needed"),
        (dict(num_hidden_layers="two"), "has 'two' as num_hidden_layers"),
        (dict(num_attention_heads=3), "which its 3 attention heads do not divide"),
    ],
)
def test_configs_that_are_refused(capsys, tmp_path, changes, words):
    assert words in refused(capsys, "--model", written(tmp_path, **changes), "--rank", "8")


def test_files_that_are_refused(capsys, tmp_path):
    assert "there is no file" in refused(capsys, "--model", str(tmp_path / "missing.json"), "--rank", "8")
    (tmp_path / "config.json").write_text("{")
    assert "is no JSON file" in refused(capsys, "--model", str(tmp_path), "--rank", "8")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--model lama-7b --rank 8", "did you mean llama-7b? Known are llama-60m,"),
        ("--model llama-60m --rank 8 --method galor", "(choose from 'adamw', 'galore', 'i3s',"),
        ("--model llama-60m", "--rank is needed for galore"),
        ("--model llama-60m --rank 0", "must be a positive int, got '0'"),
        ("--model llama-60m --method adamw --rank 8", "--rank 8 is not for adamw"),
        ("--model llama-60m --method apollo-mini --rank 8", "--rank 8 is not for apollo-mini"),
        ("--model llama-60m --method rso --rank 8 --state-bits 8", "--state-bits 8 is for methods that project gradients"),
        ("--model llama-60m --method adamw --in-backward deferred", "--in-backward is for methods that project gradients"),
        ("--model llama-60m --method fira --rank 8 --in-backward deferred", "use update='immediately'"),
        ("--model llama-60m --rank 8 --accumulator bfloat16", "stays with --in-backward deferred alone"),
        ("--model llama-60m --rank 8 --checkpointing", "counted with --sequence alone"),
        ("--model llama-60m --rank 8 --batch 2", "counted with --sequence alone"),
        ("--model llama-60m --rank 8 --method galore --compare rso", "not allowed with argument"),
        ("--rank 8", "the following arguments are required: --model"),
    ],
)
def test_arguments_that_are_refused(capsys, arguments, words):
    found = refused(capsys, *arguments.split())
    quoted = words.replace("'", "") if words.replace("'", "") in found else words  # Python 3.12 quotes no choices
    assert quoted in found


def test_a_warning_is_a_line_of_words(capsys):
    command.main(["--model", "llama-60m", "--rank", "1000"])
    caught = capsys.readouterr()
    assert caught.err.startswith("warning: rank 1000 is more than the shorter side") and ".py" not in caught.err
    assert "peak" in caught.out


@pytest.mark.slow
def test_the_page_shows_what_is_printed(capsys):
    pytest.importorskip("rich")
    page = (ROOT / "docs" / "report.md").read_text()
    commands = [line.partition("lowrank_kernels.estimate ")[2] for line in page.splitlines() if line.startswith("python -m lowrank_k")]
    shown = next(line for line in commands if "--compare" in line)
    assert f"```\n{run(capsys, *shown.split())}```" in page
