"""A Qwen3-architecture transformer in plain JAX: dense attention, no cache, nothing of the engine.

Its weights carry their Hugging Face names and layout, so that a saved file needs no conversion.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "dtype": "bfloat16",
}
QUERY_BLOCK = 128  # of `attend`

Params = dict[str, jax.Array]


def init_params(key: jax.Array) -> Params:
    """Float32 weights by their Hugging Face names; matrices are [out, in]."""
    e, f, d = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    h, k, layers = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], CONFIG["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], e)}
    for layer in range(layers):
        names = {
            "input_layernorm": (e,),
            "self_attn.q_proj": (h * d, e),
            "self_attn.k_proj": (k * d, e),
            "self_attn.v_proj": (k * d, e),
            "self_attn.q_norm": (d,),
            "self_attn.k_norm": (d,),
            "self_attn.o_proj": (e, h * d),
            "post_attention_layernorm": (e,),
            "mlp.gate_proj": (f, e),
            "mlp.up_proj": (f, e),
            "mlp.down_proj": (e, f),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    shapes["model.norm.weight"] = (e,)
    params = {}
    for subkey, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
        # What writes into the residual stream starts small, so that depth does not add up.
        writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5
        std = std / math.sqrt(2 * layers) if writes_residual else std
        params[name] = jnp.ones(shape) if len(shape) == 1 else std * jax.random.normal(subkey, shape)
    return params


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Normalise the last axis in float32, as Qwen3 does."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + CONFIG["rms_norm_eps"])
    return (x32 * scale).astype(x.dtype) * weight.astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, heads, D] at positions 0..T-1, halves as Hugging Face pairs them."""
    half = x.shape[-1] // 2
    frequency = CONFIG["rope_theta"] ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention [B, T, H * D] of query [B, T, K, G, D] over key and value [B, T, K, D].

    A block of queries at a time over the keys up to its end: half the work, and scores stay in the caches.
    """
    mixed = []
    for start in range(0, query.shape[1], QUERY_BLOCK):
        block = query[:, start : start + QUERY_BLOCK]
        stop = start + block.shape[1]
        scores = jnp.einsum("btkgd,bskd->bkgts", block, key[:, :stop], preferred_element_type=jnp.float32)
        causal = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
        weights = jax.nn.softmax(jnp.where(causal, scores * query.shape[-1] ** -0.5, -jnp.inf), axis=-1)
        mixed.append(jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value[:, :stop]))
    return jnp.concatenate(mixed, axis=1).reshape(*query.shape[:2], -1)


def forward(params: Params, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Float32 logits [B, T, V] of tokens [B, T]."""
    k, d = CONFIG["num_key_value_heads"], CONFIG["head_dim"]
    batch, length = tokens.shape
    weights = {name: value.astype(dtype) for name, value in params.items()}
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(CONFIG["num_hidden_layers"]):
        w = partial(lambda prefix, name: weights[f"{prefix}.{name}.weight"], f"model.layers.{layer}")
        y = rms_norm(x, w("input_layernorm"))
        query = (y @ w("self_attn.q_proj").T).reshape(batch, length, -1, d)
        key = (y @ w("self_attn.k_proj").T).reshape(batch, length, k, d)
        value = (y @ w("self_attn.v_proj").T).reshape(batch, length, k, d)
        query = rotate(rms_norm(query, w("self_attn.q_norm"))).reshape(batch, length, k, -1, d)
        key = rotate(rms_norm(key, w("self_attn.k_norm")))
        x = x + attend(query, key, value) @ w("self_attn.o_proj").T
        y = rms_norm(x, w("post_attention_layernorm"))
        x = x + (jax.nn.silu(y @ w("mlp.gate_proj").T) * (y @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    x = rms_norm(x, weights["model.norm.weight"])
    return (x @ weights["model.embed_tokens.weight"].T).astype(jnp.float32)
