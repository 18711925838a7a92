"""What a GGUF file says about its model: config, and tensors under their Hugging Face names.

Key and tensor names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from nanovllm_jax.config import ModelConfig, RopeConfig
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.models.hf_config import with_sliding_window
from nanovllm_jax.models.rope import rope_frequencies
from nanovllm_jax.weights.gguf_file import GGUFFile

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# Of Llama 3.1 and 3.2, the only users of such factors; the stretch itself is in the tensor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gguf_model_config(file: GGUFFile) -> ModelConfig:
    """The shape of the model in a GGUF file.

    Raises:
        ConfigError: if the architecture or a key of it is not supported, or a needed key is missing.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ConfigError(f"{file.path} has architecture {architecture!r}; supported are {supported}.")
    keys = _Keys(file, architecture)
    hidden_size, num_heads = keys.take("embedding_length"), keys.take("attention.head_count")
    head_dim = keys.take("attention.key_length", hidden_size // num_heads)
    keys.require("attention.value_length", head_dim)
    keys.require("rope.dimension_count", head_dim)
    keys.require("expert_count", 0)
    keys.require("expert_used_count", 0)
    length = keys.take("context_length")
    num_layers = keys.take("block_count")
    window = keys.take("attention.sliding_window", 0)
    vocab_size = keys.take("vocab_size", 0)
    rope = _rope(file, keys, head_dim, length)
    if rope.type == "yarn" and rope.original_max_position_embeddings is not None:
        length = max(length, int(rope.original_max_position_embeddings * rope.factor))
    if "token_embd.weight" in file.tensors:  # the tensor counts: the key is optional, and may lack padding
        vocab_size = file.tensors["token_embd.weight"].shape[0]
    matrices = {tensor.type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    config = ModelConfig(
        family=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=keys.take("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.take("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=length,
        rms_norm_eps=keys.take("attention.layer_norm_rms_epsilon"),
        rope=rope,
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm=architecture == "qwen3",
        dtype="float32" if matrices == {"F32"} else "float16" if matrices == {"F16"} else "bfloat16",
    )
    keys.refuse_rest()
    return with_sliding_window(config, window, num_layers) if window else config


class _Keys:
    """The metadata keys of the architecture that nobody has read yet."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self._path, self._prefix = file.path, f"{architecture}."
        self._left = {
            key.removeprefix(self._prefix): value
            for key, value in file.metadata.items()
            if key.startswith(self._prefix)
        }

    def take(self, key: str, default: Any = None) -> Any:
        value = self._left.pop(key, default)
        if isinstance(value, list) and len(set(value)) == 1:  # one number a layer
            value = value[0]
        if value is None:
            raise ConfigError(f"{self._path} has no key {self._prefix}{key}; it is incomplete.")
        return value

    def require(self, key: str, expected: int) -> None:
        value = self.take(key, expected)
        if value != expected:
            raise ConfigError(f"{self._path} has {self._prefix}{key} = {value}; only {expected} is supported here.")

    def refuse_rest(self) -> None:
        if self._left:
            listed = ", ".join(f"{self._prefix}{key} = {value}" for key, value in sorted(self._left.items()))
            raise ConfigError(f"{self._path} has keys that are not supported: {listed}. They may change the result.")


def _rope(file: GGUFFile, keys: _Keys, head_dim: int, length: int) -> RopeConfig:
    theta = keys.take("rope.freq_base", 10_000.0)
    kind = keys.take("rope.scaling.type", "none")
    factor = keys.take("rope.scaling.factor", keys.take("rope.scale_linear", 1.0))
    original = keys.take("rope.scaling.original_context_length", length)
    keys.take("rope.scaling.finetuned", False)
    if kind == "yarn":
        return RopeConfig(theta=theta, type="yarn", factor=factor, original_max_position_embeddings=original)
    if kind not in ("none", "linear"):
        raise ConfigError(f"{file.path} has rope scaling {kind!r}; supported are none, linear, yarn and llama3.")
    if _ROPE_FACTORS in file.tensors:
        return _llama3(file, theta, head_dim)
    return RopeConfig(theta=theta) if factor == 1.0 else RopeConfig(theta=theta, type="linear", factor=factor)


def _llama3(file: GGUFFile, theta: float, head_dim: int) -> RopeConfig:
    """Find the parameters behind a table of factors, one for each frequency: f -> f / factor."""
    factors = file.read(_ROPE_FACTORS, np.dtype(np.float32))
    rope = RopeConfig(theta=theta, type="llama3", factor=float(factors.max()), **_LLAMA3)
    plain, _ = rope_frequencies(head_dim, RopeConfig(theta=theta))
    stretched, _ = rope_frequencies(head_dim, rope)
    if factors.shape != plain.shape or not np.allclose(plain / factors, stretched, rtol=1e-4, atol=0):
        raise ConfigError(
            f"{file.path} has a table of rope factors ({_ROPE_FACTORS}) not of Llama 3.1 or 3.2; "
            "such tables are not supported. Use the model's safetensors files."
        )
    return rope


class GGUFReader:
    """Tensors of a GGUF file under Hugging Face's names and in its layout."""

    def __init__(self, file: GGUFFile, config: ModelConfig, dtype: np.dtype) -> None:
        """Quantised tensors are read as `dtype`."""
        self._file, self._config, self._dtype = file, config, dtype
        self._names = {_hf_name(name): name for name in file.tensors if name != _ROPE_FACTORS}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return {name: self._file.tensors[stored].shape for name, stored in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor on the host."""
        tensor = self._file.read(self._names[name], self._dtype)
        # llama.cpp rotates neighbours in this architecture: its converter interleaves each head's two halves.
        if self._config.family == "llama" and re.search(r"\.[qk]_proj\.", name):
            halves = tensor.reshape(-1, self._config.head_dim // 2, 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        return tensor


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _TENSORS:
        return name
    prefix = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{prefix}{_TENSORS[match[2]]}.{match[3]}"
