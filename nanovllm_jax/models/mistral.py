"""Mistral dense models: Llama without biases, with an optional sliding window in all layers."""

from __future__ import annotations

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.hf_config import Attributes, dense_config, with_sliding_window


def model_config(attributes: Attributes) -> ModelConfig:
    """The shape of a Mistral model; ConfigError names what is not supported."""
    # Version 0.1 has a window of 4,096 tokens, stated or not; later ones state null.
    window = attributes.take("sliding_window") if "sliding_window" in attributes else 4096
    config = dense_config(attributes, max_position_embeddings=131_072, num_kv_heads=8)
    return config if window is None else with_sliding_window(config, int(window), config.num_layers)
