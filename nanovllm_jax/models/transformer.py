"""One pure transformer for Qwen3, Qwen2, Llama and Mistral: what differs between them is in `ModelConfig`.

The function knows nothing of pages, rows or batches: attention comes in as a function of one layer's projections
and cache, so the same code runs decode and ragged prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.params import Params
from nanovllm_jax.models.projections import (
    add_attention,
    add_mlp,
    einsum,
    fused_counters,
    poison_unless_zero,
    project_qkv,
)
from nanovllm_jax.models.rope import rope_tables
from nanovllm_kernels import layer_words
from nanovllm_kernels.norm import rms_norm

_MIN_HEAD_ROWS = 16

LayerCache = tuple[Array, Array]  # K and V
Rope = tuple[Float[Array, "T half"], Float[Array, "T half"]]  # cosine and sine
Attend = Callable[[Float[Array, "T K heads D"], Params, Rope, LayerCache], tuple[Float[Array, "T H D"], LayerCache]]
# One layer as one kernel: hidden states, parameters, rotary tables, cache, the kernel's words, the number of the call.
WholeLayer = Callable[
    [Float[Array, "1 E"], Params, Rope, LayerCache, jax.Ref, Int[Array, ""]], tuple[Float[Array, "1 E"], LayerCache]
]


def transformer(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    caches: list[LayerCache],
    attend: Attend,
    axis_name: str | None = None,
    backend: Literal["xla", "triton"] = "xla",
    whole_layer: WholeLayer | None = None,
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
        backend: of the products of few tokens; see `models.projections`.
        whole_layer: does each layer's work, `attend`'s too, where there is one kernel for all of it.
    """
    x = _embed(params["embed"], tokens, axis_name)
    rope = rope_tables(positions, config.head_dim, config.rope)
    if whole_layer is not None:
        x, new_caches = _whole_layers(x, params["layers"], rope, caches, whole_layer)
    else:
        x, new_caches = _layers(x, params["layers"], rope, caches, config, attend, axis_name, backend)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), new_caches


def logits(
    params: Params, hidden: Float[Array, "B E"], backend: Literal["xla", "triton"] = "xla"
) -> Float[Array, "B V"]:
    """Next-token logits in float32, of the vocabulary that this shard holds."""
    head = params["lm_head"] if "lm_head" in params else params["embed"]
    # On a GPU XLA converts the whole head to float32 for the product with one row: 0.37 ms where 16 rows take 0.08.
    padding = max(0, _MIN_HEAD_ROWS - hidden.shape[0]) if backend == "triton" else 0
    with jax.named_scope("lm_head"):
        padded = jnp.pad(hidden, ((0, padding), (0, 0)))
        return einsum("be,ve->bv", padded, head, out=jnp.float32)[: hidden.shape[0]]


def _layers(
    x: Float[Array, "T E"],
    layers: list[Params],
    rope: Rope,
    caches: list[LayerCache],
    config: ModelConfig,
    attend: Attend,
    axis_name: str | None,
    backend: Literal["xla", "triton"],
) -> tuple[Float[Array, "T E"], list[LayerCache]]:
    counters = fused_counters(backend, x.shape[0], x.dtype)
    # A jitted layer is traced and lowered once, then called L times; XLA inlines the calls.
    layer = jax.jit(partial(_layer, config=config, attend=attend, axis_name=axis_name))
    new_caches = []
    for index, (layer_params, cache) in enumerate(zip(layers, caches, strict=True)):
        with jax.named_scope(f"layer{index}"):
            x, cache, counters = layer(x, layer_params, rope, cache, counters)
        new_caches.append(cache)
    if counters is not None:
        x = poison_unless_zero(x, counters)
    return x, new_caches


def _whole_layers(
    x: Float[Array, "1 E"], layers: list[Params], rope: Rope, caches: list[LayerCache], whole_layer: WholeLayer
) -> tuple[Float[Array, "1 E"], list[LayerCache]]:
    def one(
        x: Float[Array, "1 E"],
        params: Params,
        rope: Rope,
        cache: LayerCache,
        words: Int[Array, " words"],
        number: Int[Array, ""],
    ) -> tuple[Float[Array, "1 E"], LayerCache, Int[Array, " words"]]:
        ref = jax.new_ref(words)
        with jax.named_scope("decode_layer"):
            new_x, cache = whole_layer(x, params, rope, cache, ref, number)
        # A kernel's result has no mesh in its type, for which the next layer would be another function. XLA folds this.
        return jax.lax.select(True, new_x, x), cache, jax.freeze(ref)

    layer, words, new_caches = jax.jit(one), layer_words(layers[0], caches[0][0]), []
    for index, (params, cache) in enumerate(zip(layers, caches, strict=True)):
        with jax.named_scope(f"layer{index}"):
            x, cache, words = layer(x, params, rope, cache, words, jnp.int32(index + 1))
        new_caches.append(cache)
    return poison_unless_zero(x, words), new_caches


def _layer(
    x: Float[Array, "T E"],
    params: Params,
    rope: Rope,
    cache: LayerCache,
    counters: Int[Array, " tiles"] | None,
    *,
    config: ModelConfig,
    attend: Attend,
    axis_name: str | None,
) -> tuple[Float[Array, "T E"], LayerCache, Int[Array, " tiles"] | None]:
    # A reference inside only: taken as an argument, the layer would be lowered anew for each call.
    ref = None if counters is None else jax.new_ref(counters)
    with jax.named_scope("attention"):
        heads, cache = _attention(x, params, rope, cache, ref, config, attend)
        x = add_attention(x, heads, params, axis_name, ref)
    with jax.named_scope("mlp"):
        x = add_mlp(x, params, config.rms_norm_eps, axis_name, ref)
    return x, cache, None if ref is None else jax.freeze(ref)


def _embed(embed: Float[Array, "V E"], tokens: Int[Array, " T"], axis_name: str | None) -> Float[Array, "T E"]:
    """Rows of the embedding; each shard looks up what it holds."""
    if axis_name is None:
        return embed.at[tokens].get(mode="clip")
    size = embed.shape[0]
    last = size * jax.lax.axis_size(axis_name) - 1
    local = jnp.clip(tokens, 0, last) - jax.lax.axis_index(axis_name) * size
    rows = embed.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return jax.lax.psum(rows, axis_name)


def _attention(
    x: Float[Array, "T E"],
    params: Params,
    rope: Rope,
    cache: LayerCache,
    counters: jax.Ref | None,
    config: ModelConfig,
    attend: Attend,
) -> tuple[Float[Array, "T K G D"], LayerCache]:
    qkv = project_qkv(x, params, config.rms_norm_eps, counters)
    out, cache = attend(qkv, params, rope, cache)
    return out.reshape(*qkv.shape[:2], -1, qkv.shape[-1]), cache
