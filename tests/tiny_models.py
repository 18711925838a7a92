"""Tiny random models in Hugging Face's layout, the same bits wherever they are written.

`write_tiny_model("qwen3", directory)` writes `config.json` and `model.safetensors` in float32. Weights come
from NumPy's PCG64 bit stream by way of integers and single float32 operations, so nothing binary is kept:
a golden names the SHA-256 of the weights that it was made with.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# Standard deviation of the logits: peaked enough for clear winners, flat enough that float32 rounding stays
# near 1e-6.
LOGITS_STD = 3.0


@dataclass(frozen=True)
class TinyModel:
    """A model's `config.json`; everything else follows from it and the name."""

    name: str
    config: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]


def _config(architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    common = {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 256,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 320,
    }
    merged = {**common, **fields}
    # The spelling of newer checkpoints: one dictionary instead of rope_theta and rope_scaling.
    if "rope_parameters" in merged:
        del merged["rope_scaling"], merged["rope_theta"]
        merged["dtype"] = merged.pop("torch_dtype")
    return merged


def _qwen3(**fields: Any) -> dict[str, Any]:
    # 8 heads of 16 on a hidden size of 64: the heads are wider than the model.
    return _config(
        "Qwen3ForCausalLM",
        "qwen3",
        **{
            "attention_bias": False,
            "head_dim": 16,
            "hidden_size": 64,
            "max_window_layers": 2,
            "num_hidden_layers": 3,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 512,
            **fields,
        },
    )


def _qwen2(**fields: Any) -> dict[str, Any]:
    # A window that use_sliding_window switches off, as the checkpoints have it; no head_dim.
    return _config(
        "Qwen2ForCausalLM",
        "qwen2",
        hidden_size=128,
        max_window_layers=2,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        sliding_window=32,
        use_sliding_window=False,
        **fields,
    )


def _llama(**fields: Any) -> dict[str, Any]:
    return _config(
        "LlamaForCausalLM",
        "llama",
        **{
            "attention_bias": False,
            "hidden_size": 128,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "tie_word_embeddings": True,
            **fields,
        },
    )


def _mistral(**fields: Any) -> dict[str, Any]:
    return _config("MistralForCausalLM", "mistral", head_dim=16, hidden_size=64, **fields)


_LLAMA3_ROPE = {
    "factor": 4.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
_YARN_ROPE = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}

TINY_MODELS: dict[str, TinyModel] = {
    name: TinyModel(name, config)
    for name, config in {
        "qwen3": _qwen3(tie_word_embeddings=True),
        "qwen3-untied": _qwen3(rope_parameters={"rope_theta": 1000000, "rope_type": "default"}),
        "qwen2": _qwen2(),
        "llama": _llama(),
        "llama-untied": _llama(tie_word_embeddings=False),
        "llama3-rope": _llama(rope_scaling=_LLAMA3_ROPE, rope_theta=500000.0),
        # The oldest spelling: "type" for "rope_type".
        "llama-linear": _llama(rope_scaling={"factor": 4.0, "type": "linear"}),
        "llama-yarn": _llama(rope_scaling=_YARN_ROPE),
        "llama-yarn-parameters": _llama(
            rope_parameters={
                **_YARN_ROPE,
                "beta_fast": 8.0,
                "beta_slow": 0.5,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "rope_theta": 10000.0,
                "truncate": False,
            }
        ),
        "llama-odd-heads": _llama(hidden_size=144, num_attention_heads=9, num_key_value_heads=3),
        "llama-bias": _llama(attention_bias=True, mlp_bias=True),
        "mistral": _mistral(sliding_window=None),
        "mistral-window": _mistral(sliding_window=24),
    }.items()
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of `config`; matrices are [out, in]."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    is_qwen2, is_qwen3 = config["model_type"] == "qwen2", config["model_type"] == "qwen3"
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}

    def linear(name: str, out_features: int, in_features: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        if bias:
            shapes[f"{name}.bias"] = (out_features,)

    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        linear(f"{layer}.self_attn.q_proj", heads * head_dim, hidden, attention_bias or is_qwen2)
        linear(f"{layer}.self_attn.k_proj", kv_heads * head_dim, hidden, attention_bias or is_qwen2)
        linear(f"{layer}.self_attn.v_proj", kv_heads * head_dim, hidden, attention_bias or is_qwen2)
        linear(f"{layer}.self_attn.o_proj", hidden, heads * head_dim, attention_bias)
        if is_qwen3:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        linear(f"{layer}.mlp.gate_proj", mlp, hidden, mlp_bias)
        linear(f"{layer}.mlp.up_proj", mlp, hidden, mlp_bias)
        linear(f"{layer}.mlp.down_proj", hidden, mlp, mlp_bias)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _mean_and_std(name: str, shape: tuple[int, ...], tied: bool) -> tuple[float, float]:
    """Such that attention looks far back and outweighs the embedding: else greedy text soon repeats."""
    if name.endswith("norm.weight"):
        return (1.5 if "self_attn" in name else 1.0), 0.2
    if name.endswith(".bias"):
        return 0.0, 0.3 if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") else 0.15
    if "embed_tokens" in name and not tied:
        return 0.0, 0.5
    fan_in = shape[1]
    if "embed_tokens" in name or "lm_head" in name:
        return 0.0, LOGITS_STD / fan_in**0.5
    gain = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 2.0, "down_proj": 2.0}.get(name.split(".")[-2], 1.0)
    return 0.0, gain / fan_in**0.5


def tiny_weights(model: TinyModel) -> dict[str, np.ndarray]:
    """All tensors of `model`, float32; each is drawn from a stream of its own, named by model and tensor."""
    weights = {}
    for name, shape in tensor_shapes(model.config).items():
        rng = np.random.default_rng(zlib.crc32(f"{model.name}/{name}".encode()))
        mean, std = _mean_and_std(name, shape, model.config["tie_word_embeddings"])
        # Uniform over [-1, 1) on a grid of 2**-15, so that no libm takes part; its deviation is 1/sqrt(3).
        steps = rng.integers(-(2**15), 2**15, size=shape, dtype=np.int32).astype(np.float32)
        weights[name] = np.float32(mean) + steps * np.float32(std * 3**0.5 / 2**15)
    return weights


def weights_sha256(weights: dict[str, np.ndarray]) -> str:
    """Digest of names and bits, so that a golden can tell changed weights from a wrong engine."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


def write_tiny_model(name: str, directory: str | Path) -> Path:
    """Writes `config.json` and `model.safetensors` of `TINY_MODELS[name]`; makes `directory` if need be."""
    model, path = TINY_MODELS[name], Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    save_file(tiny_weights(model), path / "model.safetensors", metadata={"format": "pt"})
    return path
