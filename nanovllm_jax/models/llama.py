"""Llama 2 and 3.x: optional biases of all projections of a block."""

from __future__ import annotations

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.hf_config import Attributes, dense_config


def model_config(attributes: Attributes) -> ModelConfig:
    """The shape of a Llama model; ConfigError names what is not supported."""
    attention_bias = bool(attributes.take("attention_bias", False))
    return dense_config(
        attributes,
        max_position_embeddings=2048,
        num_kv_heads=None,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(attributes.take("mlp_bias", False)),
    )
