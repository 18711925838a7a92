"""One pure transformer for Qwen3, Qwen2, Llama and Mistral: what differs between them is in `ModelConfig`.

The function knows nothing of pages, rows or batches: attention comes in as a function of one layer's projections
and cache, so the same code runs decode and ragged prefill.
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
from nanovllm_jax.models.rope import rope_tables
from nanovllm_jax.parallel.collectives import sum_shards
from nanovllm_kernels.rope_cache_write.reference import rms_norm

LayerCache = tuple[Array, Array]  # K and V
Rope = tuple[Float[Array, "T half"], Float[Array, "T half"]]  # cosine and sine
Attend = Callable[[Float[Array, "T K heads D"], Params, Rope, LayerCache], tuple[Float[Array, "T H D"], LayerCache]]


def transformer(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    caches: list[LayerCache],
    attend: Attend,
    axis_name: str | None = None,
) -> tuple[Float[Array, "T E"], list[LayerCache]]:
    """Hidden states after the final norm, and the caches with K and V of all T tokens written.

    Args:
        params: see `models.params`.
        config: static.
        tokens: ids; an id outside the vocabulary is clipped into it (padding).
        positions: of each token in its sequence.
        caches: one entry a layer, passed through `attend`.
        attend: of a layer's projections (the G query heads, key and value of each KV head), parameters, rotary tables
            and cache: norms and rotates queries and keys, writes keys and values to the cache, then attends.
        axis_name: mesh axis over which heads, MLP and vocabulary are split, inside `shard_map`; None if they are not.
    """
    x = _embed(params["embed"], tokens, axis_name)
    rope = rope_tables(positions, config.head_dim, config.rope)
    # A jitted layer is traced and lowered once, then called L times; XLA inlines the calls.
    layer = jax.jit(partial(_layer, config=config, attend=attend, axis_name=axis_name))
    new_caches = []
    for index, (layer_params, cache) in enumerate(zip(params["layers"], caches, strict=True)):
        with jax.named_scope(f"layer{index}"):
            x, cache = layer(x, layer_params, rope, cache)
        new_caches.append(cache)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), new_caches


def logits(params: Params, hidden: Float[Array, "B E"]) -> Float[Array, "B V"]:
    """Next-token logits in float32, of the vocabulary that this shard holds."""
    head = params["lm_head"] if "lm_head" in params else params["embed"]
    with jax.named_scope("lm_head"):
        return _einsum("be,ve->bv", hidden, head, out=jnp.float32)


def _layer(
    x: Float[Array, "T E"],
    params: Params,
    rope: Rope,
    cache: LayerCache,
    *,
    config: ModelConfig,
    attend: Attend,
    axis_name: str | None,
) -> tuple[Float[Array, "T E"], LayerCache]:
    with jax.named_scope("attention"):
        h = rms_norm(x, params["input_norm"], config.rms_norm_eps)
        update, cache = _attention(h, params, rope, cache, attend)
        x = x + _add_bias(sum_shards(update, axis_name), params.get("o_bias"))
    with jax.named_scope("mlp"):
        update = _mlp(rms_norm(x, params["post_norm"], config.rms_norm_eps), params)
        x = x + _add_bias(sum_shards(update, axis_name), params.get("down_bias"))
    return x, cache


def _embed(embed: Float[Array, "V E"], tokens: Int[Array, " T"], axis_name: str | None) -> Float[Array, "T E"]:
    """Rows of the embedding; each shard looks up what it holds."""
    if axis_name is None:
        return embed.at[tokens].get(mode="clip")
    size = embed.shape[0]
    last = size * jax.lax.axis_size(axis_name) - 1
    local = jnp.clip(tokens, 0, last) - jax.lax.axis_index(axis_name) * size
    rows = embed.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return jax.lax.psum(rows, axis_name)


def _add_bias(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias


def _attention(
    x: Float[Array, "T E"],
    params: Params,
    rope: Rope,
    cache: LayerCache,
    attend: Attend,
) -> tuple[Float[Array, "T E"], LayerCache]:
    qkv = _add_bias(_einsum("te,ekgd->tkgd", x, params["qkv"]), params.get("qkv_bias"))
    out, cache = attend(qkv, params, rope, cache)
    grouped = out.reshape(*qkv.shape[:2], -1, qkv.shape[-1])
    return _einsum("tkgd,kgde->te", grouped, params["o"]), cache


def _mlp(x: Float[Array, "T E"], params: Params) -> Float[Array, "T E"]:
    gate_up = _add_bias(_einsum("te,ezf->tzf", x, params["gate_up"]), params.get("gate_up_bias"))
    return _einsum("tf,fe->te", jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1], params["down"])


def _einsum(equation: str, x: Array, weight: Array, out: DTypeLike | None = None) -> Array:
    """A product in the operands' dtype; float32 means float32, not the tensor cores' TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision, preferred_element_type=out)
