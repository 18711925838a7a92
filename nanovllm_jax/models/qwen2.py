"""Qwen2 and Qwen2.5: biases on query, key and value; the last layers may have a sliding window."""

from __future__ import annotations

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.hf_config import Attributes, dense_config, with_sliding_window


def model_config(attributes: Attributes) -> ModelConfig:
    """The shape of a Qwen2 model; ConfigError names what is not supported."""
    attributes.take("attention_bias")  # stated by some; the family has its biases either way
    return qwen_config(attributes, qkv_bias=True)


def qwen_config(
    attributes: Attributes,
    *,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """What Qwen2 and Qwen3 share: defaults, and a window in the layers from `max_window_layers` on."""
    use_window = bool(attributes.take("use_sliding_window", False))
    window = attributes.take_int("sliding_window", 4096)
    first_sliding_layer = attributes.take_int("max_window_layers", 28)
    layer_types = attributes.take("layer_types")
    config = dense_config(
        attributes,
        max_position_embeddings=32_768,
        num_kv_heads=32,
        head_dim=head_dim,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
    )
    if not use_window:
        return config
    if layer_types is None:
        num_sliding_layers = max(config.num_layers - first_sliding_layer, 0)
    else:
        num_sliding_layers = list(layer_types).count("sliding_attention")
    return with_sliding_window(config, window, num_sliding_layers)
