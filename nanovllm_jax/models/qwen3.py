"""Qwen3 dense models: normalised queries and keys, heads of 128 unless stated, optional attention biases."""

from __future__ import annotations

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.hf_config import Attributes
from nanovllm_jax.models.qwen2 import qwen_config


def model_config(attributes: Attributes) -> ModelConfig:
    """The shape of a Qwen3 model; ConfigError names what is not supported."""
    attention_bias = bool(attributes.take("attention_bias", False))
    return qwen_config(attributes, head_dim=128, qkv_bias=attention_bias, o_bias=attention_bias, qk_norm=True)
