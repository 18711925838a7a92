"""A prefill step: chunks of prompts, of any lengths, as flat ragged tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_jax.models.params import Params
from nanovllm_jax.models.transformer import Attend, LayerCache, Rope, Unfinished, finish, transformer_until_last
from nanovllm_jax.parallel.collectives import table_of
from nanovllm_jax.step.state import Caches, PrefillDelta, RowInt, Rows, slots_of
from nanovllm_jax.step.step import StepConfig, attention_options, closed, norms_and_scales, opened
from nanovllm_kernels import ragged_prefill, rope_cache_write

MIN_MOSAIC_TOKENS = 1024
MIN_TOKENS_IN_PARTS = 4096  # over shards; see `num_parts`


def prefill_forward(
    config: StepConfig, layout: PrefillDelta, params: Params, caches: Caches, rows: Rows, delta: Int[Array, " n"]
) -> tuple[Caches, Rows, Float[Array, "R E"], Int[Array, " R"], Unfinished]:
    """Any number of prompt chunks (and decode rows, chunks of one token) as flat ragged tokens.

    The rows' block tables already hold every block the chunks write. Returns what `decode_forward` does, with the
    hidden state of each sequence's last token, which alone passes all of the last layer; and all tokens as they are
    before that (for prompt log-probabilities).
    """
    block_size = config.shape.block_size
    tokens, cu_q_lens, row, starts, samples = layout.unpack(delta)
    active = row >= 0
    slot_row = slots_of(rows, row)
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


def _attend_many(config: StepConfig, slots: Int[Array, " T"], attention: Callable[..., Array]) -> Attend:
    """What each layer of a prefill does there: writes the new tokens to `slots`, then runs `attention`."""
    options = attention_options(config)

    def attend(qkv: Array, layer: Params, rope: Rope, cache: LayerCache, _: jax.Ref | None) -> tuple[Array, LayerCache]:
        opened_cache = opened(cache)
        arrays = norms_and_scales(layer, opened_cache)
        with jax.named_scope("rope_cache_write"):
            q, k_cache, v_cache = rope_cache_write(
                qkv, *rope, *opened_cache, slots, **arrays, eps=config.model.rms_norm_eps, backend=config.backend
            )
        with jax.named_scope("ragged_prefill"):
            scales = {name: array for name, array in arrays.items() if name.endswith("_scale")}
            out = attention(q, k_cache, v_cache, **options, **scales)
        return out, closed((k_cache, v_cache), cache)

    return attend
