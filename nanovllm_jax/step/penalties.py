"""What changes logits before sampling: an adjustment table, and penalties from counts of the tokens seen so far.

Counts are one uint16 for each row slot and vocabulary id: bit 0 says that the id is in the prompt, the other
bits count it in the output, up to 32,767. They take 2 * R * V bytes, so they are made only when asked for.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array as JaxArray
from jaxtyping import Array, Bool, Float32, Int32, UInt16

_MAX_OUTPUT_COUNT = (1 << 15) - 1


def count_prompt(
    counts: UInt16[Array, "R V"],
    reset_rows: Int32[Array, " S"],
    token_rows: Int32[Array, " T"],
    tokens: Int32[Array, " T"],
    is_output: Bool[Array, " T"],
    vocab_offset: int | Int32[Array, ""] = 0,
) -> UInt16[Array, "R V"]:
    """Clears rows, then counts tokens into rows: a request's prompt, and its output so far if it was preempted.

    A list longer than T is given in several calls, the rows being reset in the first. The work grows with T
    squared (every token looks for its equals, so that each id is written once, whatever the order): keep T at
    most 2048.

    Args:
        counts: in place when donated.
        reset_rows: row slots to clear; negative ones are padding.
        token_rows: the row slot of each token; negative ones are padding.
        tokens: vocabulary ids; those outside [vocab_offset, vocab_offset + V) are not counted.
        is_output: whether the token was generated.
        vocab_offset: the first id of `counts`, which may be a shard.
    """
    num_rows, vocab_size = counts.shape
    counts = counts.at[_or_dropped(reset_rows, num_rows)].set(0, mode="drop")
    rows, ids = _or_dropped(token_rows, num_rows), _or_dropped(tokens - vocab_offset, vocab_size)

    same = (rows[:, None] == rows[None, :]) & (ids[:, None] == ids[None, :])
    outputs = jnp.sum(same & is_output[None, :], axis=1, dtype=jnp.int32)
    in_prompt = jnp.any(same & ~is_output[None, :], axis=1)
    old = counts.at[rows, ids].get(mode="fill", fill_value=0)
    return counts.at[rows, ids].set(_add(old, outputs) | in_prompt.astype(jnp.uint16), mode="drop")


def count_sampled(
    counts: UInt16[Array, "R V"],
    rows: Int32[Array, " B"],
    tokens: Int32[Array, " B"],
    vocab_offset: int | Int32[Array, ""] = 0,
) -> UInt16[Array, "R V"]:
    """Counts one generated token a row.

    Args:
        counts: in place when donated.
        rows: row slots, each at most once; negative ones are padding.
        tokens: vocabulary ids; a negative one (an error) is not counted.
        vocab_offset: the first id of `counts`, which may be a shard.
    """
    index = _or_dropped(rows, counts.shape[0]), _or_dropped(tokens - vocab_offset, counts.shape[1])
    old = counts.at[index].get(mode="fill", fill_value=0)
    return counts.at[index].set(_add(old, jnp.int32(1)), mode="drop")


def adjust_logits(
    logits: Float32[Array, "B V"],
    adjust_ids: Int32[Array, "B M"],
    adjust_values: Float32[Array, "B M"],
    adjust_until: Int32[Array, "B M"],
    num_output: Int32[Array, " B"],
    vocab_offset: int | Int32[Array, ""] = 0,
) -> Float32[Array, "B V"]:
    """Adds the table's values to the logits of its ids: biases, and bans as -inf.

    Args:
        logits: of this shard.
        adjust_ids: vocabulary ids; negative ones are padding. An id may occur more than once; with at most
            one finite value among them the result does not depend on their order.
        adjust_values: what is added; never +inf or NaN.
        adjust_until: the value counts while fewer output tokens than this were generated.
        num_output: output tokens generated so far.
        vocab_offset: the first id of `logits`, which may be a shard.
    """
    active = adjust_until > num_output[:, None]
    ids = jnp.where(active & (adjust_ids >= 0), adjust_ids - vocab_offset, -1)
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[row, _or_dropped(ids, logits.shape[1])].add(adjust_values, mode="drop")


def penalise_logits(
    logits: Float32[Array, "B V"],
    counts: UInt16[Array, "B V"],
    repetition_penalty: Float32[Array, " B"],
    presence_penalty: Float32[Array, " B"],
    frequency_penalty: Float32[Array, " B"],
) -> Float32[Array, "B V"]:
    """Penalties as in vLLM: repetition for ids of prompt and output, frequency and presence for ids of the output.

    Args:
        logits: before temperature.
        counts: of the same B rows.
        repetition_penalty: divides positive and multiplies negative logits; 1 is none.
        presence_penalty: taken off once when an id was generated; 0 is none.
        frequency_penalty: taken off for each time an id was generated; 0 is none.
    """
    outputs = counts >> 1
    repetition = jnp.where(counts > 0, repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - frequency_penalty[:, None] * outputs.astype(jnp.float32)
    return logits - jnp.where(outputs > 0, presence_penalty[:, None], 0.0)


def _add(old: JaxArray, outputs: JaxArray) -> JaxArray:
    total = jnp.minimum((old >> 1).astype(jnp.int32) + outputs, _MAX_OUTPUT_COUNT)
    return (total << 1).astype(jnp.uint16) | (old & 1)


def _or_dropped(index: JaxArray, size: int) -> JaxArray:
    """Negative indices count from the end in JAX; past the end they are dropped by mode="drop"."""
    return jnp.where((index >= 0) & (index < size), index, size)
