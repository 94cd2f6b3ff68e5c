"""Shapes of models that `python -m lowrank_kernels.estimate` knows by name, and of those that a config.json
of Hugging Face describes."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """A decoder as LLaMA's. kv_heads: heads of K and V. head_dim: of each. tied: whether the head is the
    embedding. biases: of q, k and v."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int
    tied: bool = False
    biases: bool = False


def _size(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None, vocabulary: int = 32000) -> Size:
    return Size(hidden, intermediate, layers, heads, kv_heads or heads, vocabulary, hidden // heads)


SIZES = {
    "llama-60m": _size(512, 1376, 8, 8),
    "llama-130m": _size(768, 2048, 12, 12),
    "llama-350m": _size(1024, 2736, 24, 16),
    "llama-1b": _size(2048, 5461, 24, 32),
    "llama-3b": _size(2560, 6848, 32, 32),
    "llama-7b": _size(4096, 11008, 32, 32),
    "llama-13b": _size(5120, 13824, 40, 40),
    "llama-70b": _size(8192, 28672, 80, 64, kv_heads=8),
    "llama-3-8b": _size(4096, 14336, 32, 32, kv_heads=8, vocabulary=128256),
    "llama-3-70b": _size(8192, 28672, 80, 64, kv_heads=8, vocabulary=128256),
}
"""60m to 7b: the configurations of GaLore's experiments (github.com/jiaweizzhao/GaLore, configs/). 13b: table
2 of arXiv 2302.13971, and 70b: appendix A of arXiv 2307.09288, with the widths of the layers in their
released config.json. llama-3: table 3 of arXiv 2407.21783."""

KINDS = ("llama", "mistral", "qwen2")
"""The values of `model_type` whose layers are LLaMA's. qwen2 has biases in q, k and v."""


def size_of(model: str) -> Size:
    """The size of a model by its name, or by the path of its config.json. Raises ValueError for another
    one."""
    if model in SIZES:
        return SIZES[model]
    path = Path(model)
    if path.suffix == ".json" or path.exists():
        return _of_config(path / "config.json" if path.is_dir() else path)
    short = {name.removeprefix("llama-"): name for name in SIZES} | {name: name for name in SIZES}
    near = difflib.get_close_matches(model.lower(), short, n=1)
    hint = f"did you mean {short[near[0]]}? " if near else ""
    raise ValueError(f"unknown model {model!r}: {hint}Known are {', '.join(SIZES)}, and the path of a LLaMA-like config.json")


def _of_config(path: Path) -> Size:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} has no model_type; a config.json of Hugging Face transformers has one")
    if (kind := config["model_type"]) not in KINDS:
        raise ValueError(
            f"{path} has model_type={kind!r}, and only {', '.join(KINDS)} are known here; build that model on the meta device and give it "
            "to lowrank_kernels.estimate_memory"
        )
    hidden, heads = _number(config, "hidden_size", path), _number(config, "num_attention_heads", path)
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"{path} has hidden_size={hidden}, which its {heads} attention heads do not divide")
    return Size(
        hidden,
        _number(config, "intermediate_size", path),
        _number(config, "num_hidden_layers", path),
        heads,
        _number(config, "num_key_value_heads", path, heads),
        _number(config, "vocab_size", path),
        _number(config, "head_dim", path, hidden // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        biases=kind == "qwen2" or bool(config.get("attention_bias", False)),
    )


def _number(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = "no" if value is None else f"{value!r} as"
        raise ValueError(f"{path} has {found} {key}, where a positive int is needed")
    return value
