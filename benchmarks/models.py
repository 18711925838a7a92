"""Shapes of models that figures are taken on, and checkpoints of them with random weights.

    python benchmarks/models.py qwen3-0.6b DIR        # writes one that any engine loads

Random weights serve parity only if rounding does not decide the text. Hugging Face's initialisation (0.02
everywhere, tied head) fails at that: positions predict nearly the same tokens, and the top two of 152 thousand
Gaussian logits lie so close that bfloat16 changes the winner at 4% of positions, against float32. Here instead:

- the lengths of embedding rows have a Pareto tail, so that the few long rows compete for the top and lie far
  apart: bfloat16 changes 1% of winners, though hidden states are off by 1.1% as before;
- a layer adds 0.3 (attention) and 0.05 (MLP) to rows that are usually 0.4 long an element: with other tokens in
  front, seven in ten predictions change;
- the final norm's weights have random signs, so that the tied head does not predict the token that it was given;
- their magnitude keeps the largest logit between 1 and 2, where an error of 1% is 0.02 in a log-probability.
"""

from __future__ import annotations

import itertools
import json
import os
import string
import sys
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

QWEN3_8B: dict[str, Any] = QWEN3_0_6B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}
QWEN3_32B: dict[str, Any] = QWEN3_8B | {
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "max_window_layers": 64,
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
}
MODELS = {"qwen3-0.6b": QWEN3_0_6B, "qwen3-8b": QWEN3_8B, "qwen3-32b": QWEN3_32B}

ROW_LENGTH = 0.4  # of a typical embedding, root mean square over its elements
ROW_TAIL = 4.0  # exponent of the Pareto distribution of lengths
FINAL_NORM = 0.005
# What a layer's projections add to the residual stream, relative to their input.
GAINS = {"o_proj": 0.3, "down_proj": 0.05}


def write_tokenizer(directory: str | Path, vocab_size: int) -> None:
    """Writes a byte-level tokenizer of made-up words; it decodes as fast as a real one of that size."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = map("".join, itertools.product(string.ascii_lowercase, repeat=4))
    vocabulary = [*letters, *(f"\u0120{word}" for word in itertools.islice(words, vocab_size - len(letters)))]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(Path(directory, "tokenizer.json")))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    Path(directory, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def qwen3_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a Qwen3 checkpoint; matrices are [out, in]."""
    hidden, mlp, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (q_size, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv_size, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv_size, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q_size)
        yield f"{layer}.self_attn.q_norm.weight", (head_dim,)
        yield f"{layer}.self_attn.k_norm.weight", (head_dim,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (mlp, hidden)
        yield f"{layer}.mlp.up_proj.weight", (mlp, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, mlp)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One tensor in bfloat16, from a stream of its own."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name == "model.norm.weight":
        return (FINAL_NORM * rng.choice([-1.0, 1.0], size=shape)).astype(ml_dtypes.bfloat16)
    if name.endswith("norm.weight"):
        return np.ones(shape, ml_dtypes.bfloat16)
    weights = rng.standard_normal(shape, dtype=np.float32)
    if "embed_tokens" in name or "lm_head" in name:
        weights *= ROW_LENGTH * (1 + rng.pareto(ROW_TAIL, size=(shape[0], 1)).astype(np.float32))
    else:
        weights *= GAINS.get(name.split(".")[-2], 1.0) / shape[1] ** 0.5
    return weights.astype(ml_dtypes.bfloat16)


def write_random_checkpoint(config: dict[str, Any], directory: str | Path, seed: int = 0) -> Path:
    """Writes `config.json` and `model.safetensors` (bfloat16, no tokenizer); makes `directory` if need be.

    Tensors are drawn on all cores, the largest first: 8 s of one core for 0.6 billion parameters.
    """
    path = write_config(config, directory)
    shapes = sorted(qwen3_shapes(config), key=lambda item: -np.prod(item[1]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(lambda item: random_tensor(*item, seed), shapes)
        tensors = {name: tensor for (name, _), tensor in zip(shapes, drawn, strict=True)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_config(config: Mapping[str, Any], directory: str | Path) -> Path:
    """Writes `config.json` alone: all that an engine with weights of its own (load_format="dummy") needs of ours."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path


def write_byte_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 257 entries: cases use token ids, but other engines insist on loading one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate([*alphabet, "<eos>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def prepare_model(name: str, directory: Path, *, weights: bool) -> Path:
    """A shape of `MODELS` as a directory that any engine loads; random weights that are there already are kept."""
    config = MODELS[name]
    kept = (directory / "model.safetensors").is_file() and json.loads((directory / "config.json").read_text()) == config
    if weights and not kept:
        write_random_checkpoint(config, directory)
    elif not weights:
        write_config(config, directory)
    write_byte_tokenizer(directory)
    return directory


def config_of(model: str) -> dict[str, Any] | None:
    """Config of a name in `MODELS` or of a model's directory; None for anything else, such as a hub id."""
    if model in MODELS:
        return MODELS[model]
    path = Path(model) / "config.json"
    return json.loads(path.read_text()) if path.is_file() else None


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MODELS:
        raise SystemExit(f"usage: python benchmarks/models.py {{{','.join(MODELS)}}} DIR")
    prepare_model(sys.argv[1], Path(sys.argv[2]), weights=True)
