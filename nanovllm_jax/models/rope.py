"""Rotary position embedding: frequencies for every supported way of stretching the context.

Source of the formulas: Su et al. 2021 (RoPE), Chen et al. 2023 (linear), Peng et al. 2023 (YaRN) and Meta's
Llama 3.1 release (llama3), with the parameter names of Hugging Face's `modeling_rope_utils`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nanovllm_jax.config import RopeConfig


def rope_frequencies(head_dim: int, rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies [D / 2] in radians a token (float64), and the factor that scales cos and sin."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = rope.theta**-exponents
    match rope.type:
        case "default":
            return frequencies, 1.0
        case "linear":
            return frequencies / rope.factor, 1.0
        case "llama3":
            return _llama3(frequencies, rope), 1.0
        case "yarn":
            return _yarn(frequencies, head_dim, rope), _yarn_attention_factor(rope)


def _llama3(frequencies: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Keep short wavelengths, stretch long ones by `factor`, blend linearly in between."""
    assert rope.original_max_position_embeddings is not None  # the config's parser requires it
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / rope.factor)


def _yarn(frequencies: np.ndarray, head_dim: int, rope: RopeConfig) -> np.ndarray:
    """Keep dimensions that turn often within the original context, stretch those that do not."""
    context = rope.original_max_position_embeddings
    assert context is not None  # the config's parser requires it

    def dimension(turns: float) -> float:
        """The dimension that makes this many turns over the original context."""
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp needs some width
    stretch = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return frequencies * (1 - stretch + stretch / rope.factor)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rope_tables(
    positions: Int[Array, " T"], head_dim: int, rope: RopeConfig
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosine and sine in float32 for each position, computed once a step and shared by all layers."""
    frequencies, scale = rope_frequencies(head_dim, rope)
    angles = positions[:, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale
