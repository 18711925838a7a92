"""One pure transformer for Qwen3, Qwen2, Llama and Mistral: what differs between them is in `ModelConfig`.

The function knows nothing of pages, rows or batches: attention comes in as a function of one layer's q, k, v and
cache, so the same code runs decode, ragged prefill and dense use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.params import Params
from nanovllm_jax.models.rope import apply_rope, rope_tables

LayerCache = tuple[Array, Array]  # K and V
Attend = Callable[
    [Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"], LayerCache],
    tuple[Float[Array, "T H D"], LayerCache],
]


def transformer(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    caches: list[LayerCache],
    attend: Attend,
) -> tuple[Float[Array, "T E"], list[LayerCache]]:
    """Hidden states after the final norm, and the caches with K and V of all T tokens written.

    Args:
        params: see `models.params`.
        config: static.
        tokens: ids; an id outside the vocabulary is clipped into it (padding).
        positions: of each token in its sequence.
        caches: one entry a layer, passed through `attend`.
        attend: writes k and v into the layer's cache, then attends; see `Attend`.
    """
    x = params["embed"].at[tokens].get(mode="clip")
    rope = rope_tables(positions, config.head_dim, config.rope)
    # A jitted layer is traced and lowered once, then called L times; XLA inlines the calls.
    layer = jax.jit(partial(_layer, config=config, attend=attend))
    new_caches = []
    for index, (layer_params, cache) in enumerate(zip(params["layers"], caches, strict=True)):
        with jax.named_scope(f"layer{index}"):
            x, cache = layer(x, layer_params, rope, cache)
        new_caches.append(cache)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), new_caches


def logits(params: Params, hidden: Float[Array, "B E"]) -> Float[Array, "B V"]:
    """Next-token logits in float32."""
    head = params["lm_head"] if "lm_head" in params else params["embed"]
    with jax.named_scope("lm_head"):
        return _einsum("be,ve->bv", hidden, head, out=jnp.float32)


def _layer(
    x: Float[Array, "T E"],
    params: Params,
    rope: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    cache: LayerCache,
    *,
    config: ModelConfig,
    attend: Attend,
) -> tuple[Float[Array, "T E"], LayerCache]:
    with jax.named_scope("attention"):
        update, cache = _attention(
            rms_norm(x, params["input_norm"], config.rms_norm_eps), params, rope, cache, config, attend
        )
        x = x + update
    with jax.named_scope("mlp"):
        x = x + _mlp(rms_norm(x, params["post_norm"], config.rms_norm_eps), params)
    return x, cache


def _attention(
    x: Float[Array, "T E"],
    params: Params,
    rope: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    cache: LayerCache,
    config: ModelConfig,
    attend: Attend,
) -> tuple[Float[Array, "T E"], LayerCache]:
    group = config.group_size
    qkv = _einsum("te,ekgd->tkgd", x, params["qkv"])
    if config.qkv_bias:
        qkv = qkv + params["qkv_bias"]
    q, k, v = qkv[:, :, :group], qkv[:, :, group], qkv[:, :, group + 1]
    if config.qk_norm:
        q = rms_norm(q, params["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, params["k_norm"], config.rms_norm_eps)
    q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    out, cache = attend(q.reshape(q.shape[0], -1, q.shape[-1]), k, v, cache)
    out = _einsum("tkgd,kgde->te", out.reshape(q.shape), params["o"])
    if config.o_bias:
        out = out + params["o_bias"]
    return out, cache


def _mlp(x: Float[Array, "T E"], params: Params) -> Float[Array, "T E"]:
    gate_up = _einsum("te,ezf->tzf", x, params["gate_up"])
    if "gate_up_bias" in params:
        gate_up = gate_up + params["gate_up_bias"]
    out = _einsum("tf,fe->te", jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1], params["down"])
    return out + params["down_bias"] if "down_bias" in params else out


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), computed in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight


def _einsum(equation: str, x: Array, weight: Array, out: DTypeLike | None = None) -> Array:
    """A product in the operands' dtype; float32 means float32, not the tensor cores' TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision, preferred_element_type=out)
