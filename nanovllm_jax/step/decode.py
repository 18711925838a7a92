"""A decode step: the next tokens of rows whose prompts are in the cache."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from nanovllm_jax.models.params import Params
from nanovllm_jax.models.projections import are_zero, fused_counters, has_fused_products, poison_unless_zero
from nanovllm_jax.models.transformer import Attend, LayerCache, Rope, WholeLayers, transformer
from nanovllm_jax.step.buckets import ROWS_A_COPY
from nanovllm_jax.step.draw import Variant, advance, draw_tokens, head_of, params_of
from nanovllm_jax.step.state import Caches, RowInt, Rows, slots_of
from nanovllm_jax.step.step import StepConfig, attention_options, closed, norms_and_scales, opened
from nanovllm_kernels import decode_layers, decode_layers_supports, plan_rope_paged_decode, rope_paged_decode
from nanovllm_kernels.rope_paged_decode import Plan
from nanovllm_kernels.skinny_matmul import has_mosaic_kernel, has_mosaic_tile


def decode(
    config: StepConfig, variant: Variant, params: Params, caches: Caches, rows: Rows, delta: Int[Array, "3 B"]
) -> tuple[Caches, Rows, Int[Array, "steps B"]]:
    """Up to `config.decode_steps` tokens for each of B rows, one after the other; each feeds the next on the device.

    The host's work for a step, and XLA's for launching it, is then shared by several tokens: starting this program
    costs 0.7 ms more than each turn of its loop, which is as much as a small step takes.

    Args:
        config: static.
        variant: of the sampler, static.
        params: weights.
        caches: donated.
        rows: donated; NUM_TOKENS, LAST_TOKEN and NUM_OUTPUT advance, new blocks are appended to the tables.
        delta: row slots (-1 padding); the block that each row's new tokens open (-1 none); tokens to compute of each.

    Returns:
        caches, rows, and the tokens; those past a row's number mean nothing.
    """
    num_rows, delta = delta.shape[1], _padded(config, params, caches, delta)
    head, rows = head_of(params), _open_blocks(config, rows, delta)
    row, _, count = delta
    slot = slots_of(rows, row)
    table, first = rows["block_tables"][slot], rows["ints"][slot, RowInt.NUM_TOKENS]
    sampler_params = params_of(rows, slot)
    indices = jnp.arange(config.decode_steps, dtype=jnp.int32)[:, None]

    def lengths(index: int | Array) -> Int[Array, "*steps B"]:
        return jnp.where(index < count, first + index + 1, 0)

    def step(
        index: int | Array, carry: tuple[Caches, Array | None, Int[Array, " B"], Int[Array, "steps B"]]
    ) -> tuple[Caches, Array | None, Int[Array, " B"], Int[Array, "steps B"]]:
        caches, counters, token, tokens = carry
        context_lens, plan = lengths(index), jax.tree.map(partial(_element, index), plans)
        hidden, caches, counters = _decode_once(
            config, params, caches, counters, table=table, context_lens=context_lens, plan=plan, token=token
        )
        if config.axis_name is not None:  # the sampler gathers shards, so all of them see that one is wrong
            hidden = poison_unless_zero(hidden, counters)
        at_position = sampler_params._replace(position=context_lens)
        token = draw_tokens(variant, config.axis_name, config.backend, head, hidden, at_position)
        return caches, counters, token, jnp.where(indices == index, token, tokens)

    # In as many kernels as the plan of one token.
    plans = jax.vmap(partial(_plan, config, params, caches))(lengths(indices))
    counters = fused_counters(config.backend, len(row), params["embed"].dtype)
    last_token, tokens = rows["ints"][slot, RowInt.LAST_TOKEN], jnp.zeros((config.decode_steps, len(row)), jnp.int32)
    carry = caches, counters, last_token, tokens
    caches, counters, _, tokens = jax.lax.fori_loop(0, config.decode_steps, step, carry)
    if counters is not None and config.axis_name is None:
        tokens = jnp.where(are_zero(counters), tokens, -1)
    return caches, advance(rows, slot, count, tokens), tokens[:, :num_rows]


def decode_forward(
    config: StepConfig, params: Params, caches: Caches, rows: Rows, delta: Int[Array, "3 B"]
) -> tuple[Caches, Rows, Float[Array, "R E"], Int[Array, " R"]]:
    """One token for each of B rows, without sampling the next; arguments are those of `decode`.

    Returns:
        caches, rows, hidden states padded to R rows, and the row of each hidden state (-1 padding).
    """
    num_rows, delta = delta.shape[1], _padded(config, params, caches, delta)
    rows, active = _open_blocks(config, rows, delta), delta[0] >= 0
    slot = slots_of(rows, delta[0])
    context_lens = jnp.where(active, rows["ints"][slot, RowInt.NUM_TOKENS] + 1, 0)
    table, token = rows["block_tables"][slot], rows["ints"][slot, RowInt.LAST_TOKEN]
    plan = _plan(config, params, caches, context_lens)
    counters = fused_counters(config.backend, len(slot), params["embed"].dtype)
    hidden, caches, counters = _decode_once(
        config, params, caches, counters, table=table, context_lens=context_lens, plan=plan, token=token
    )
    hidden = poison_unless_zero(hidden, counters)
    rows |= {"ints": rows["ints"].at[slot, RowInt.NUM_TOKENS].set(context_lens)}
    padding = config.shape.max_num_seqs - num_rows
    return (
        caches,
        rows,
        jnp.pad(hidden[:num_rows], ((0, padding), (0, 0))),
        jnp.pad(delta[0, :num_rows], (0, padding), constant_values=-1),
    )


def no_decodes(size: int) -> np.ndarray:
    """The delta [3, size] of a decode step in which every place is padding."""
    delta = np.full((3, size), -1, np.int32)
    delta[2] = 0
    return delta


def _padded(config: StepConfig, params: Params, caches: Caches, delta: Int[Array, "3 B"]) -> Int[Array, "3 B8"]:
    """The delta with padding up to a multiple of 8 rows, where products of as many rows have Mosaic's kernel.

    20 rows of Qwen3-8B take 5.68 ms a token, and 5.10 as 24; 1 row 4.44, and 4.31 as 8 (H200). One row stays one where
    its layers are one kernel, where few of its products would be Mosaic's, and where shards add it: that is quicker
    than to add eight.
    """
    num_rows = delta.shape[1]
    if not has_fused_products(config.backend, params["embed"].dtype) or not has_mosaic_kernel():
        return delta
    split = config.axis_name is not None
    if num_rows == 1 and (split or _layers_are_one_kernel(params, caches) or not _eight_rows_are_mosaics(params)):
        return delta
    return jnp.concatenate([delta, no_decodes(-num_rows % ROWS_A_COPY)], axis=1)


def _eight_rows_are_mosaics(params: Params) -> bool:
    """Whether both products after a norm, which read most of a layer's weights, have a tile for 8 rows."""
    layer = params["layers"][0]
    qkv = jax.eval_shape(lambda w: w.reshape(w.shape[0], -1), layer["qkv"])
    return all(has_mosaic_tile(w, ROWS_A_COPY) for w in (qkv, layer["gate_up"]))


def _open_blocks(config: StepConfig, rows: Rows, delta: Int[Array, "3 B"]) -> Rows:
    """Append each row's new block to its table, behind those that its tokens fill or have begun."""
    row = slots_of(rows, delta[0])
    column = -(-rows["ints"][row, RowInt.NUM_TOKENS] // config.shape.block_size)
    column = jnp.where(delta[1] >= 0, column, config.shape.blocks_per_row)  # out of range: dropped
    return rows | {"block_tables": rows["block_tables"].at[row, column].set(delta[1], mode="drop")}


def _element(index: int | Array, stacked: Shaped[Array, "steps ..."]) -> Shaped[Array, "..."]:
    """`stacked[index]` as a sum, which is a kernel.

    A slice that follows the loop's index XLA makes a copy outside of the graphs that it captures.
    """
    steps = jnp.arange(len(stacked), dtype=jnp.int32).reshape(-1, *[1] * (stacked.ndim - 1))
    return jnp.sum(jnp.where(steps == index, stacked, 0), axis=0, dtype=stacked.dtype)


def _plan(config: StepConfig, params: Params, caches: Caches, context_lens: Int[Array, " B"]) -> Plan | None:
    """How attention cuts rows of these lengths, in all layers."""
    with jax.named_scope("plan"):
        return plan_rope_paged_decode(
            context_lens,
            opened(caches[0])[0],
            config.shape.blocks_per_row,
            dtype=params["embed"].dtype,
            sliding_window=config.model.sliding_window,
            backend=config.backend,
        )


def _decode_once(
    config: StepConfig,
    params: Params,
    caches: Caches,
    counters: Int[Array, " tiles"] | None,
    *,
    table: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    plan: Plan | None,
    token: Int[Array, " B"],
) -> tuple[Float[Array, "B E"], Caches, Int[Array, " tiles"] | None]:
    """Hidden states of each row's last token, whose K and V are written and which attends over the row's blocks.

    `context_lens` counts that token. 0 is padding: it writes nothing and attends to nothing.
    """
    position = jnp.maximum(context_lens - 1, 0)
    attend = _attend_newest(config, table, context_lens, plan)
    whole_layers = _whole_layers(config, params, caches, table, context_lens)
    return transformer(
        params,
        config.model,
        token,
        position,
        caches,
        attend,
        config.axis_name,
        config.backend,
        whole_layers=whole_layers,
        counters=counters,
    )


def _attend_newest(
    config: StepConfig, tables: Int[Array, "B P"], context_lens: Int[Array, " B"], plan: Plan | None
) -> Attend:
    """What each layer of a decode step does between its projections: one new token a row, all in one kernel."""
    options = attention_options(config)

    def attend(
        qkv: Array, layer: Params, rope: Rope, cache: LayerCache, counters: jax.Ref | None
    ) -> tuple[Array, LayerCache]:
        opened_cache = opened(cache)
        arrays = norms_and_scales(layer, opened_cache)
        with jax.named_scope("rope_paged_decode"):
            out, k_cache, v_cache = rope_paged_decode(
                qkv,
                *rope,
                *opened_cache,
                tables,
                context_lens,
                **options,
                **arrays,
                eps=config.model.rms_norm_eps,
                counters=counters,
                plan=plan,
                backend=config.backend,
            )
        return out, closed((k_cache, v_cache), cache)

    return attend


def _whole_layers(
    config: StepConfig, params: Params, caches: Caches, block_tables: Int[Array, "B P"], context_lens: Int[Array, " B"]
) -> WholeLayers | None:
    """A decode step's layers as one kernel, where there is one: for one row, on one device."""
    if config.backend != "triton" or config.axis_name is not None or len(context_lens) != 1:
        return None
    if not _layers_are_one_kernel(params, caches):
        return None
    layers = _without_scales(params)
    options = {"eps": config.model.rms_norm_eps, **attention_options(config)}

    def whole_layers(
        x: Float[Array, "1 E"], rope: Rope, caches: list[LayerCache]
    ) -> tuple[Float[Array, "1 E"], list[LayerCache]]:
        return decode_layers(x, layers, *rope, caches, block_tables, context_lens, **options, backend="triton")

    return whole_layers


def _layers_are_one_kernel(params: Params, caches: Caches) -> bool:
    """Whether there is a kernel of all layers for one row on one GPU."""
    return decode_layers_supports(_without_scales(params), caches)


def _without_scales(params: Params) -> list[Params]:
    """Layers as the kernel of all layers knows them: scales are a float8 cache's, which it does not take."""
    return [{name: leaf for name, leaf in layer.items() if not name.endswith("_scale")} for layer in params["layers"]]
