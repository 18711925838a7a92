"""Log-probabilities of given tokens and of the likeliest ones."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array as JaxArray
from jax import lax
from jaxtyping import Array, Float32, Int32

from nanovllm_jax.parallel.collectives import max_shards, sum_shards
from nanovllm_kernels.sample.vocab import vocab_offset

_GROUP = 128


def gather_logprobs(
    logits: Float32[Array, "B V"],
    tokens: Int32[Array, " B"],
    num_logprobs: int,
    axis_name: str | None = None,
) -> tuple[Float32[Array, " B"], Int32[Array, " B"], Int32[Array, "B num_logprobs"], Float32[Array, "B num_logprobs"]]:
    """log_softmax of the logits at some tokens and at the likeliest, as vLLM's `raw_logprobs`.

    Args:
        logits: untouched by temperature, penalties or bans.
        tokens: vocabulary ids; a negative one gets the values of id 0.
        num_logprobs: static; at most the (shard's) V.
        axis_name: the mesh axis over which V is split, if any.

    Returns:
        the log-probability of each token; its rank, which is the number of tokens at least as likely, itself
        included; the ids of the `num_logprobs` likeliest tokens in order (equals by id); their log-
        probabilities.
    """
    batch, vocab_size = logits.shape
    offset = vocab_offset(vocab_size, axis_name)
    top_logits, top_ids = _top(logits, num_logprobs)
    top_ids = top_ids + offset
    if axis_name is not None:
        top_logits, top_ids = (
            lax.all_gather(part, axis_name, axis=1).reshape(batch, -1) for part in (top_logits, top_ids)
        )
        top_logits, picked = lax.top_k(top_logits, num_logprobs)
        top_ids = jnp.take_along_axis(top_ids, picked, axis=1)

    local = jnp.maximum(tokens, 0) - offset
    here = (local >= 0) & (local < vocab_size)
    value = jnp.take_along_axis(logits, jnp.clip(local, 0, vocab_size - 1)[:, None], axis=1)[:, 0]
    value = sum_shards(jnp.where(here, value, 0.0), axis_name)

    largest = max_shards(jnp.max(logits, axis=1), axis_name)
    total = sum_shards(jnp.sum(jnp.exp(logits - largest[:, None]), axis=1), axis_name)
    rank = sum_shards(jnp.sum(logits >= value[:, None], axis=1, dtype=jnp.int32), axis_name)
    normaliser = largest + jnp.log(total)
    return value - normaliser, rank, top_ids, top_logits - normaliser[:, None]


def _top(logits: JaxArray, count: int) -> tuple[JaxArray, JaxArray]:
    """The largest logits of each row and their ids, in order.

    They lie in the `count` groups of 128 ids with the largest maxima (equal maxima by group, as equal logits
    by id), so that one pass over the logits and two sorts of a few thousand values do for a sort of the
    vocabulary.
    """
    batch, vocab_size = logits.shape
    num_groups = -(-vocab_size // _GROUP)
    if num_groups <= count:
        values, ids = lax.top_k(logits, count)
        return values, ids
    padded = jnp.pad(logits, ((0, 0), (0, num_groups * _GROUP - vocab_size)), constant_values=-jnp.inf)
    maxima = jnp.max(padded.reshape(batch, num_groups, _GROUP), axis=2)
    _, groups = lax.top_k(maxima, count)
    groups = jnp.sort(groups, axis=1)
    ids = (groups[:, :, None] * _GROUP + jnp.arange(_GROUP, dtype=jnp.int32)).reshape(batch, -1)
    candidates = jnp.take_along_axis(logits, jnp.minimum(ids, vocab_size - 1), axis=1)
    candidates = jnp.where(ids < vocab_size, candidates, -jnp.inf)
    values, picked = lax.top_k(candidates, count)
    return values, jnp.take_along_axis(ids, picked, axis=1)
