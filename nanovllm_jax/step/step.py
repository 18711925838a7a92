"""The step as pure functions of donated device state.

    params, caches, rows, delta --decode--> caches, rows, tokens            K tokens a row, sampling included
    params, caches, rows, delta --prefill_forward | decode_forward--> caches, rows, hidden, sampled_rows
    head, rows, hidden, sampled_rows --draw--> rows, tokens

What every step does is one program; what few need (prompts, and sampling that the host has a part in) is two, so that
sampling variants add to the number of programs instead of multiplying it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.params import Params
from nanovllm_jax.models.projections import are_zero, fused_counters
from nanovllm_jax.models.transformer import (
    Attend,
    LayerCache,
    Rope,
    Unfinished,
    WholeLayers,
    finish,
    transformer,
    transformer_until_last,
)
from nanovllm_jax.parallel.collectives import table_of
from nanovllm_jax.step.draw import Variant, advance, draw_tokens, head_of, params_of
from nanovllm_jax.step.state import Caches, PrefillDelta, RowInt, Rows, StateShape
from nanovllm_kernels import (
    decode_layers,
    decode_layers_supports,
    plan_rope_paged_decode,
    ragged_prefill,
    rope_cache_write,
    rope_paged_decode,
)
from nanovllm_kernels.rope_paged_decode import Plan

MIN_MOSAIC_TOKENS = 1024  # of a prefill
MIN_TOKENS_IN_PARTS = 4096  # of a prefill over shards; see `num_parts`


@dataclass(frozen=True)
class StepConfig:
    """Everything static about the step."""

    model: ModelConfig
    shape: StateShape
    backend: Literal["xla", "triton"]  # of the kernels
    axis_name: str | None = None  # mesh axis over which the model is split, if it is
    decode_steps: int = 1  # most tokens of a row in one decode step


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
    head, rows = head_of(params), _open_blocks(config, rows, delta)
    row, _, count = delta
    slot = jnp.where(row >= 0, row, config.shape.max_num_seqs)
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
        newest = table, context_lens, plan, token
        hidden, caches, counters = _decode_once(config, params, caches, counters, *newest)
        at_position = sampler_params._replace(position=context_lens)
        token = draw_tokens(variant, config.axis_name, config.backend, head, hidden, at_position)
        return caches, counters, token, jnp.where(indices == index, token, tokens)

    # In as many kernels as the plan of one token.
    plans = jax.vmap(partial(_plan, config, params, caches))(lengths(indices))
    counters = fused_counters(config.backend, len(row), params["embed"].dtype)
    last_token, tokens = rows["ints"][slot, RowInt.LAST_TOKEN], jnp.zeros((config.decode_steps, len(row)), jnp.int32)
    carry = caches, counters, last_token, tokens
    caches, counters, _, tokens = jax.lax.fori_loop(0, config.decode_steps, step, carry)
    if counters is not None:
        tokens = jnp.where(are_zero(counters), tokens, -1)
    return caches, advance(rows, slot, count, tokens), tokens


def decode_forward(
    config: StepConfig, params: Params, caches: Caches, rows: Rows, delta: Int[Array, "3 B"]
) -> tuple[Caches, Rows, Float[Array, "R E"], Int[Array, " R"]]:
    """One token for each of B rows, without sampling the next; arguments are those of `decode`.

    Returns:
        caches, rows, hidden states padded to R rows, and the row of each hidden state (-1 padding).
    """
    rows, active = _open_blocks(config, rows, delta), delta[0] >= 0
    slot = jnp.where(active, delta[0], config.shape.max_num_seqs)
    context_lens = jnp.where(active, rows["ints"][slot, RowInt.NUM_TOKENS] + 1, 0)
    table, token = rows["block_tables"][slot], rows["ints"][slot, RowInt.LAST_TOKEN]
    plan = _plan(config, params, caches, context_lens)
    counters = fused_counters(config.backend, len(slot), params["embed"].dtype)
    newest = table, context_lens, plan, token
    hidden, caches, counters = _decode_once(config, params, caches, counters, *newest)
    if counters is not None:
        hidden = jnp.where(are_zero(counters), hidden, jnp.nan)
    rows |= {"ints": rows["ints"].at[slot, RowInt.NUM_TOKENS].set(context_lens)}
    padding = config.shape.max_num_seqs - hidden.shape[0]
    return (
        caches,
        rows,
        jnp.pad(hidden, ((0, padding), (0, 0))),
        jnp.pad(delta[0], (0, padding), constant_values=-1),
    )


def _open_blocks(config: StepConfig, rows: Rows, delta: Int[Array, "3 B"]) -> Rows:
    """Append each row's new block to its table, behind those that its tokens fill or have begun."""
    row = jnp.where(delta[0] >= 0, delta[0], config.shape.max_num_seqs)
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
    options = {"dtype": params["embed"].dtype, "sliding_window": config.model.sliding_window}
    with jax.named_scope("plan"):
        k_cache, width = caches[0][0], config.shape.blocks_per_row
        return plan_rope_paged_decode(context_lens, k_cache, width, **options, backend=config.backend)


def _decode_once(
    config: StepConfig,
    params: Params,
    caches: Caches,
    counters: Int[Array, " tiles"] | None,
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
    options = {"whole_layers": whole_layers, "counters": counters}
    return transformer(
        params, config.model, token, position, caches, attend, config.axis_name, config.backend, **options
    )


def prefill_forward(
    config: StepConfig, layout: PrefillDelta, params: Params, caches: Caches, rows: Rows, delta: Int[Array, " n"]
) -> tuple[Caches, Rows, Float[Array, "R E"], Int[Array, " R"], Unfinished]:
    """Any number of prompt chunks (and decode rows, chunks of one token) as flat ragged tokens.

    The rows' block tables already hold every block the chunks write. Returns what `decode_forward` does, with the
    hidden state of each sequence's last token, which alone passes all of the last layer; and all tokens as they are
    before that (for prompt log-probabilities).
    """
    dummy, block_size = config.shape.max_num_seqs, config.shape.block_size
    tokens, cu_q_lens, row, starts, samples = layout.unpack(delta)
    active = row >= 0
    slot_row = jnp.where(active, row, dummy)
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    context_lens = jnp.where(active, starts + q_lens, 0)

    flat = jnp.arange(layout.num_tokens, dtype=jnp.int32)
    # A binary search would be a loop that the host launches turn by turn, before all else.
    sequence = jnp.searchsorted(cu_q_lens, flat, side="right", method="compare_all").astype(jnp.int32) - 1
    sequence = jnp.minimum(sequence, layout.num_sequences - 1)
    real = flat < cu_q_lens[-1]
    position = jnp.where(real, starts[sequence] + flat - cu_q_lens[sequence], 0)
    tables = rows["block_tables"][slot_row]
    block = tables[sequence, position // block_size]
    slots = jnp.where(real, block * block_size + position % block_size, -1)
    tokens = jnp.where(tokens >= 0, tokens, rows["ints"][slot_row[sequence], RowInt.LAST_TOKEN])

    # The Mosaic kernel is half as fast again, but each bucket lowers its own, which takes seconds.
    in_mosaic = config.backend == "triton" and layout.num_tokens >= MIN_MOSAIC_TOKENS
    attends = []
    for slots_of_part in jnp.split(slots, num_parts(config.axis_name, layout.num_tokens)):
        size = slots_of_part.shape[0]
        its_cu_q_lens, its_context_lens = part_of_tokens(cu_q_lens, starts, len(attends) * size, size)
        lengths = {"cu_q_lens": its_cu_q_lens, "context_lens": its_context_lens}
        backend = "mosaic" if in_mosaic else config.backend
        attention = partial(ragged_prefill, block_tables=tables, **lengths, backend=backend)
        attends.append(_attend_many(config, slots_of_part, attention))
    unfinished, caches = transformer_until_last(
        params, config.model, tokens, position, caches, attends, config.axis_name, config.backend
    )
    ints = rows["ints"].at[slot_row, RowInt.NUM_TOKENS].set(context_lens)
    ends = jnp.maximum(cu_q_lens[1:] - 1, 0)
    last = jax.tree.map(lambda tokens: tokens[ends], unfinished)
    norm, backend = params["final_norm"], config.backend
    hidden = finish(params["layers"][-1], norm, config.model, last, config.axis_name, backend, table_of(params))
    sampled_rows = jnp.where(active & (samples == 1), row, -1)
    return caches, rows | {"ints": ints}, hidden, sampled_rows, unfinished


def num_parts(axis_name: str | None, num_tokens: int) -> int:
    """Equal parts that a prefill is computed in: over shards two, so that sums of one run while the other computes.

    One where there is little to hide sums behind, or where the last bucket's number of tokens is odd.
    """
    return 2 if axis_name is not None and num_tokens >= MIN_TOKENS_IN_PARTS and num_tokens % 2 == 0 else 1


def part_of_tokens(
    cu_q_lens: Int[Array, " ends"], starts: Int[Array, " S"], first: int, size: int
) -> tuple[Int[Array, " ends"], Int[Array, " S"]]:
    """`cu_q_lens` and context lengths of `size` flat tokens from `first` on, which may begin and end within sequences.

    Of sequences without a token among them, the context is 0. `starts` has the position of each one's first token.
    """
    clipped = jnp.clip(cu_q_lens, first, first + size)
    seen = jnp.where(clipped[1:] > clipped[:-1], starts + clipped[1:] - cu_q_lens[:-1], 0)
    return clipped - first, seen


def _attend_newest(
    config: StepConfig, tables: Int[Array, "B P"], context_lens: Int[Array, " B"], plan: Plan | None
) -> Attend:
    """What each layer of a decode step does between its projections: one new token a row, all in one kernel."""
    options = _attention_options(config)

    def attend(
        qkv: Array, layer: Params, rope: Rope, cache: LayerCache, counters: jax.Ref | None
    ) -> tuple[Array, LayerCache]:
        arrays = _norms_and_scales(layer, cache)
        with jax.named_scope("rope_paged_decode"):
            out, k_cache, v_cache = rope_paged_decode(
                qkv,
                *rope,
                *cache,
                tables,
                context_lens,
                **options,
                **arrays,
                eps=config.model.rms_norm_eps,
                counters=counters,
                plan=plan,
                backend=config.backend,
            )
        return out, (k_cache, v_cache)

    return attend


def _attend_many(config: StepConfig, slots: Int[Array, " T"], attention: Callable[..., Array]) -> Attend:
    """What each layer of a prefill does there: writes the new tokens to `slots`, then runs `attention`."""
    options = _attention_options(config)

    def attend(qkv: Array, layer: Params, rope: Rope, cache: LayerCache, _: jax.Ref | None) -> tuple[Array, LayerCache]:
        arrays = _norms_and_scales(layer, cache)
        with jax.named_scope("rope_cache_write"):
            q, k_cache, v_cache = rope_cache_write(
                qkv, *rope, *cache, slots, **arrays, eps=config.model.rms_norm_eps, backend=config.backend
            )
        with jax.named_scope("ragged_prefill"):
            scales = {name: array for name, array in arrays.items() if name.endswith("_scale")}
            out = attention(q, k_cache, v_cache, **options, **scales)
        return out, (k_cache, v_cache)

    return attend


def _attention_options(config: StepConfig) -> dict[str, Any]:
    return {"scale": config.model.head_dim**-0.5, "sliding_window": config.model.sliding_window}


def _norms_and_scales(layer: Params, cache: LayerCache) -> dict[str, Any]:
    """What attention takes of a layer's parameters; scales are those of a float8 cache."""
    scales = ("k_scale", "v_scale") if cache[0].dtype == jnp.float8_e4m3fn else ()
    return {name: layer.get(name) for name in ("q_norm", "k_norm", *scales)}


def _whole_layers(
    config: StepConfig, params: Params, caches: Caches, block_tables: Int[Array, "B P"], context_lens: Int[Array, " B"]
) -> WholeLayers | None:
    """A decode step's layers as one kernel, where there is one: for one row, on one device."""
    model = config.model
    if config.backend != "triton" or config.axis_name is not None or len(context_lens) != 1:
        return None
    # Scales are a float8 cache's, which that kernel does not take.
    layers = [{name: leaf for name, leaf in layer.items() if not name.endswith("_scale")} for layer in params["layers"]]
    if not decode_layers_supports(layers, caches):
        return None
    options = {"eps": model.rms_norm_eps, "scale": model.head_dim**-0.5, "sliding_window": model.sliding_window}

    def whole_layers(
        x: Float[Array, "1 E"], rope: Rope, caches: list[LayerCache]
    ) -> tuple[Float[Array, "1 E"], list[LayerCache]]:
        return decode_layers(x, layers, *rope, caches, block_tables, context_lens, **options, backend="triton")

    return whole_layers
