"""One pure transformer for Qwen3, Qwen2, Llama and Mistral: what differs between them is in `ModelConfig`.

The function knows nothing of pages, rows or batches: attention comes in as a function of one layer's projections
and cache, so the same code runs decode and ragged prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.params import Params, head_weight
from nanovllm_jax.models.projections import (
    Backend,
    Residual,
    add_attention,
    add_mlp,
    einsum,
    fused_counters,
    pass_on,
    poison_unless_zero,
    project_qkv,
    typed_as,
)
from nanovllm_jax.models.rope import rope_tables
from nanovllm_jax.parallel.collectives import sum_shards, table_of
from nanovllm_kernels import Scaled

_MIN_HEAD_ROWS = 16

LayerCache = tuple[Array, Array]  # K and V
Rope = tuple[Float[Array, "T half"], Float[Array, "T half"]]  # cosine and sine
Attend = Callable[
    [Float[Array, "T K heads D"], Params, Rope, LayerCache, jax.Ref | None], tuple[Float[Array, "T H D"], LayerCache]
]
# All layers as one kernel: hidden states, rotary tables and caches.
WholeLayers = Callable[[Float[Array, "1 E"], Rope, list[LayerCache]], tuple[Float[Array, "1 E"], list[LayerCache]]]


class Unfinished(NamedTuple):
    """Tokens in the last layer, between attention and its output projection; `finish` does the rest.

    Arrays, or what describes them.
    """

    x: Any  # [T, E]
    heads: Any  # [T, K, G, D]


def transformer(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    caches: list[LayerCache],
    attend: Attend,
    axis_name: str | None = None,
    backend: Backend = "xla",
    whole_layers: WholeLayers | None = None,
    counters: Int[Array, " tiles"] | None = None,
) -> tuple[Float[Array, "T E"], list[LayerCache], Int[Array, " tiles"] | None]:
    """Hidden states after the final norm, the caches with K and V of all T tokens written, and the counters.

    Args:
        params: see `models.params`; a model that is split may have `parallel.collectives.exchange_params` beside them.
        config: static.
        tokens: ids; an id outside the vocabulary is clipped into it (padding).
        positions: of each token in its sequence.
        caches: one entry a layer, passed through `attend`.
        attend: of a layer's projections (the G query heads, key and value of each KV head), parameters, rotary tables,
            cache and the products' counters: norms and rotates queries and keys, writes keys and values to the cache,
            then attends.
        axis_name: mesh axis over which heads, MLP and vocabulary are split, inside `shard_map`; None if they are not.
        backend: of norms, activations and the products of few tokens; see `models.projections`.
        whole_layers: does all layers' work, `attend`'s too, where there is one kernel for all of it.
        counters: `fused_counters` of T tokens; unless they come back as `are_zero` the hidden states are wrong.
    """
    if whole_layers is not None:
        x, rope = _embed(params["embed"], tokens, None, None), rope_tables(positions, config.head_dim, config.rope)
        with jax.named_scope("decode_layers"):
            x, new_caches = whole_layers(x, rope, caches)
        residual = Residual(x)
    else:
        layers = _Layers(params, config, tokens, positions, [attend], axis_name, backend, counters)
        new_caches = [layers.whole(index, cache) for index, cache in enumerate(caches)]
        (residual,), counters = layers.residuals, layers.counters
        if residual.scaled is not None:
            # Nobody uses what the last layer passes on, but without it that layer would be another function.
            residual = jax.lax.optimization_barrier(residual)
    return residual.normalised(params["final_norm"], config.rms_norm_eps, backend)[1], new_caches, counters


def transformer_until_last(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    caches: list[LayerCache],
    attends: Sequence[Attend],
    axis_name: str | None = None,
    backend: Backend = "xla",
) -> tuple[Unfinished, list[LayerCache]]:
    """What `transformer` does, up to where tokens no longer see each other; of a prompt, one token goes on from there.

    That leaves out 2.3% of the operations of 1,024 tokens in Qwen3-0.6B's shape. The tokens are taken in as many equal
    parts as there are `attends`, one after the other in each layer: between shards, the sums of one part are then under
    way while the next one computes.
    """
    counters = fused_counters(backend, len(tokens), params["embed"].dtype)
    layers = _Layers(params, config, tokens, positions, attends, axis_name, backend, counters)
    new_caches = [layers.whole(index, cache) for index, cache in enumerate(caches[:-1])]
    unfinished, cache = layers.attention_of_last(caches[-1])
    unfinished = unfinished._replace(x=poison_unless_zero(unfinished.x, layers.counters))
    return unfinished, [*new_caches, cache]


def finish(
    last_layer: Params,
    final_norm: Float[Array, " E"],
    config: ModelConfig,
    unfinished: Unfinished,
    axis_name: str | None = None,
    backend: Backend = "xla",
    table: Int[Array, "*mesh entries"] | None = None,
) -> Float[Array, "R E"]:
    """Hidden states after the final norm."""
    with jax.named_scope(f"layer{config.num_layers - 1}"):
        with jax.named_scope("attention"):
            residual = add_attention(Residual(unfinished.x), unfinished.heads, last_layer, axis_name, table, None)
        with jax.named_scope("mlp"):
            residual = add_mlp(residual, last_layer, None, config.rms_norm_eps, axis_name, table, None, backend)
    return residual.normalised(final_norm, config.rms_norm_eps, backend)[1]


def logits(params: Params, hidden: Float[Array, "B E"], backend: Backend = "xla") -> Float[Array, "B V"]:
    """Next-token logits in float32, of the vocabulary that this shard holds."""
    # On a GPU XLA converts the whole head to float32 for the product with one row: 0.37 ms where 16 rows take 0.08.
    padding = max(0, _MIN_HEAD_ROWS - hidden.shape[0]) if backend == "triton" else 0
    with jax.named_scope("lm_head"):
        padded = jnp.pad(hidden, ((0, padding), (0, 0)))
        return einsum("be,ve->bv", padded, head_weight(params), out=jnp.float32)[: hidden.shape[0]]


class _Layers:
    """The layers of one step, called in order; between them, each part's hidden states and the products' counters."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"],
        attends: Sequence[Attend],
        axis_name: str | None,
        backend: Backend,
        counters: Int[Array, " tiles"] | None,
    ) -> None:
        self._table, count = table_of(params), len(attends)
        parts = [_embed(params["embed"], part, axis_name, self._table) for part in jnp.split(tokens, count)]
        self.counters = counters
        # Where additions wait for norms, zeros before the first layer make all layers the same function.
        waits = counters is None and axis_name is not None
        self._params, self._final_norm = params["layers"], params["final_norm"]
        if waits:
            self.residuals = [Residual(x, typed_as(x, jnp.zeros_like(x))) for x in parts]
        else:
            self.residuals = [pass_on(x, self._params[0], axis_name, self._table, counters) for x in parts]
        self._ropes = [rope_tables(each, config.head_dim, config.rope) for each in jnp.split(positions, count)]
        # A jitted layer is traced and lowered once, then called L times; XLA inlines the calls.
        shared = {"config": config, "backend": backend}
        self._layers = [jax.jit(partial(_layer, **shared, attend=each, axis_name=axis_name)) for each in attends]
        self._attentions = [jax.jit(partial(_attention_alone, **shared, attend=each)) for each in attends]

    def whole(self, index: int, cache: LayerCache) -> LayerCache:
        """A layer; returns its cache."""
        last = index + 1 == len(self._params)
        next_norm = self._final_norm if last else self._params[index + 1]["input_norm"]
        with jax.named_scope(f"layer{index}"):
            for i, layer in enumerate(self._layers):
                shared = (self._params[index], next_norm, self._ropes[i], cache, self._table, self.counters)
                self.residuals[i], cache, self.counters = layer(self.residuals[i], *shared)
        return cache

    def attention_of_last(self, cache: LayerCache) -> tuple[Unfinished, LayerCache]:
        """The last layer until its heads are there."""
        parts = []
        with jax.named_scope(f"layer{len(self._params) - 1}"):
            for i, attention in enumerate(self._attentions):
                arguments = (self.residuals[i], self._params[-1], self._ropes[i], cache, self.counters)
                unfinished, cache, self.counters = attention(*arguments)
                parts.append(unfinished)
        if len(parts) == 1:
            return parts[0], cache
        return Unfinished(*map(jnp.concatenate, zip(*parts, strict=True))), cache


def _layer(
    residual: Residual,
    params: Params,
    next_norm: Float[Array, " E"],
    rope: Rope,
    cache: LayerCache,
    table: Int[Array, "*mesh entries"] | None,
    counters: Int[Array, " tiles"] | None,
    *,
    config: ModelConfig,
    attend: Attend,
    axis_name: str | None,
    backend: Backend,
) -> tuple[Residual, LayerCache, Int[Array, " tiles"] | None]:
    # A reference inside only: taken as an argument, the layer would be lowered anew for each call.
    ref, given = None if counters is None else jax.new_ref(counters), residual.scaled
    with jax.named_scope("attention"):
        residual, heads, cache = _attention(residual, params, rope, cache, ref, config, attend, backend)
        residual = add_attention(residual, heads, params, axis_name, table, ref)
    with jax.named_scope("mlp"):
        residual = add_mlp(residual, params, next_norm, config.rms_norm_eps, axis_name, table, ref, backend)
    if given is not None and residual.scaled is not None:
        residual = residual._replace(scaled=Scaled(*map(typed_as, given, residual.scaled)))
    return residual, cache, None if ref is None else jax.freeze(ref)


def _attention_alone(
    residual: Residual,
    params: Params,
    rope: Rope,
    cache: LayerCache,
    counters: Int[Array, " tiles"] | None,
    *,
    config: ModelConfig,
    attend: Attend,
    backend: Backend,
) -> tuple[Unfinished, LayerCache, Int[Array, " tiles"] | None]:
    ref = None if counters is None else jax.new_ref(counters)
    with jax.named_scope("attention"):
        residual, heads, cache = _attention(residual, params, rope, cache, ref, config, attend, backend)
    return Unfinished(residual.x, heads), cache, None if ref is None else jax.freeze(ref)


def _embed(
    embed: Float[Array, "V E"],
    tokens: Int[Array, " T"],
    axis_name: str | None,
    table: Int[Array, "*mesh entries"] | None,
) -> Float[Array, "T E"]:
    """Rows of the embedding; each shard looks up what it holds."""
    if axis_name is None:
        return embed.at[tokens].get(mode="clip")
    size = embed.shape[0]
    last = size * jax.lax.axis_size(axis_name) - 1
    local = jnp.clip(tokens, 0, last) - jax.lax.axis_index(axis_name) * size
    rows = embed.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return sum_shards(rows, axis_name, table=table)


def _attention(
    residual: Residual,
    params: Params,
    rope: Rope,
    cache: LayerCache,
    counters: jax.Ref | None,
    config: ModelConfig,
    attend: Attend,
    backend: Backend,
) -> tuple[Residual, Float[Array, "T K G D"], LayerCache]:
    residual, qkv = project_qkv(residual, params, config.rms_norm_eps, counters, backend)
    out, cache = attend(qkv, params, rope, cache, counters)
    return residual, out.reshape(*qkv.shape[:2], -1, qkv.shape[-1]), cache
