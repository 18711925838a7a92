"""The step as pure functions: `forward` runs the transformer over new tokens, `sample` draws from its last states.

    params, caches, rows, delta --decode_forward | prefill_forward--> caches, rows, hidden, sampled_rows
    head, rows, hidden, sampled_rows --sample--> rows, tokens

The two are compiled apart, so that sampling variants add to the number of programs instead of multiplying it; the
logits are written to memory in either case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.params import Params
from nanovllm_jax.models.transformer import Attend, LayerCache, Rope, transformer
from nanovllm_jax.step.state import Caches, PrefillDelta, RowInt, Rows, StateShape
from nanovllm_kernels import paged_decode, ragged_prefill, rope_cache_write


@dataclass(frozen=True)
class StepConfig:
    """Everything static about the step."""

    model: ModelConfig
    shape: StateShape
    backend: Literal["xla", "triton"]  # of the kernels
    axis_name: str | None = None  # mesh axis over which the model is split, if it is


def decode_forward(
    config: StepConfig, params: Params, caches: Caches, rows: Rows, delta: Int[Array, "2 B"]
) -> tuple[Caches, Rows, Float[Array, "R E"], Int[Array, " R"]]:
    """One token for each of B rows: writes its K and V, attends over the row's blocks.

    Args:
        config: static.
        params: weights.
        caches: donated.
        rows: donated; the step advances NUM_TOKENS and appends new blocks to the tables.
        delta: row slots (-1 padding), and for each the block that its new token opens (-1 none).

    Returns:
        caches, rows, hidden states padded to R rows, and the row of each hidden state (-1 padding).
    """
    dummy, block_size = config.shape.max_num_seqs, config.shape.block_size
    active = delta[0] >= 0
    row = jnp.where(active, delta[0], dummy)
    position = rows["ints"][row, RowInt.NUM_TOKENS]
    token = rows["ints"][row, RowInt.LAST_TOKEN]

    column = position // block_size
    opened = jnp.where(delta[1] >= 0, column, config.shape.blocks_per_row)  # out of range: dropped
    tables = rows["block_tables"].at[row, opened].set(delta[1], mode="drop")
    table = tables[row]
    block = jnp.take_along_axis(table, column[:, None], axis=1)[:, 0]
    slots = jnp.where(active, block * block_size + position % block_size, -1)
    context_lens = jnp.where(active, position + 1, 0)

    attend = _attend(
        config, "paged_decode", slots, partial(paged_decode, block_tables=table, context_lens=context_lens)
    )
    hidden, caches = transformer(
        params, config.model, token, position, caches, attend, config.axis_name, config.backend
    )
    ints = rows["ints"].at[row, RowInt.NUM_TOKENS].add(active.astype(jnp.int32))
    padding = dummy - hidden.shape[0]
    return (
        caches,
        rows | {"block_tables": tables, "ints": ints},
        jnp.pad(hidden, ((0, padding), (0, 0))),
        jnp.pad(delta[0], (0, padding), constant_values=-1),
    )


def prefill_forward(
    config: StepConfig, layout: PrefillDelta, params: Params, caches: Caches, rows: Rows, delta: Int[Array, " n"]
) -> tuple[Caches, Rows, Float[Array, "R E"], Int[Array, " R"], Float[Array, "T E"]]:
    """Any number of prompt chunks (and decode rows, chunks of one token) as flat ragged tokens.

    The rows' block tables already hold every block the chunks write. Returns what `decode_forward` does, with the
    hidden state of each sequence's last token, and the hidden states of all tokens (for prompt log-probabilities).
    """
    dummy, block_size = config.shape.max_num_seqs, config.shape.block_size
    tokens, cu_q_lens, row, starts, samples = layout.unpack(delta)
    active = row >= 0
    slot_row = jnp.where(active, row, dummy)
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    context_lens = jnp.where(active, starts + q_lens, 0)

    flat = jnp.arange(layout.num_tokens, dtype=jnp.int32)
    sequence = jnp.searchsorted(cu_q_lens, flat, side="right").astype(jnp.int32) - 1
    sequence = jnp.minimum(sequence, layout.num_sequences - 1)
    real = flat < cu_q_lens[-1]
    position = jnp.where(real, starts[sequence] + flat - cu_q_lens[sequence], 0)
    tables = rows["block_tables"][slot_row]
    block = tables[sequence, position // block_size]
    slots = jnp.where(real, block * block_size + position % block_size, -1)
    tokens = jnp.where(tokens >= 0, tokens, rows["ints"][slot_row[sequence], RowInt.LAST_TOKEN])

    attention = partial(ragged_prefill, block_tables=tables, cu_q_lens=cu_q_lens, context_lens=context_lens)
    attend = _attend(config, "ragged_prefill", slots, attention)
    hidden, caches = transformer(
        params, config.model, tokens, position, caches, attend, config.axis_name, config.backend
    )
    ints = rows["ints"].at[slot_row, RowInt.NUM_TOKENS].set(context_lens)
    last = hidden[jnp.maximum(cu_q_lens[1:] - 1, 0)]
    sampled_rows = jnp.where(active & (samples == 1), row, -1)
    return caches, rows | {"ints": ints}, last, sampled_rows, hidden


def _attend(config: StepConfig, name: str, slots: Int[Array, " T"], attention: Callable[..., Array]) -> Attend:
    """What each layer does between its projections: write the new tokens to `slots`, then run the kernel `name`."""
    model, backend = config.model, config.backend

    def attend(qkv: Array, layer: Params, rope: Rope, cache: LayerCache) -> tuple[Array, LayerCache]:
        scales = {"k_scale": layer.get("k_scale"), "v_scale": layer.get("v_scale")}
        with jax.named_scope("rope_cache_write"):
            norms = {"q_norm": layer.get("q_norm"), "k_norm": layer.get("k_norm")}
            eps = model.rms_norm_eps
            q, k_cache, v_cache = rope_cache_write(
                qkv, *rope, *cache, slots, **norms, eps=eps, **scales, backend=backend
            )
        with jax.named_scope(name):
            options = {"scale": model.head_dim**-0.5, "sliding_window": model.sliding_window, "backend": backend}
            out = attention(q, k_cache, v_cache, **options, **scales)
        return out, (k_cache, v_cache)

    return attend
