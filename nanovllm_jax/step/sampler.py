"""Draws the next token of each row from its logits.

Three functions, of which the host picks the cheapest that serves all rows of a step: a condition on the
device costs more than what it saves. A row's token is the same from any of them that serves it, and depends
on its logits, parameters, key and position alone.

    sample_plain     greedy and temperature
    sample_filtered  also top-k, top-p, min-p
    sample_full      also penalties, biases, bans, and log-probabilities
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array as JaxArray
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt16, UInt32

from nanovllm_jax.step.filters import filter_tokens
from nanovllm_jax.step.logprobs import gather_logprobs
from nanovllm_jax.step.noise import gumbel_noise
from nanovllm_jax.step.penalties import adjust_logits, penalise_logits
from nanovllm_jax.step.vocab import argmax, vocab_offset

# vLLM's: a temperature below it is greedy.
GREEDY_BELOW = 1e-5


class SamplerParams(NamedTuple):
    """What each batch row asks for, gathered to the B rows of the step."""

    temperature: Float32[Array, " B"]  # below 1e-5: greedy
    top_k: Int32[Array, " B"]  # 0: all
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    key: UInt32[Array, "B 2"]  # of `nanovllm_jax.engine.seeding.make_key`
    position: Int32[Array, " B"]  # index of the token to draw in its sequence
    num_output: Int32[Array, " B"]  # output tokens before it
    repetition_penalty: Float32[Array, " B"]
    presence_penalty: Float32[Array, " B"]
    frequency_penalty: Float32[Array, " B"]


class FullState(NamedTuple):
    """What only `sample_full` reads. See `nanovllm_jax.step.penalties`."""

    counts: UInt16[Array, "R V"]
    rows: Int32[Array, " B"]  # row slot of each batch row; negative: padding
    adjust_ids: Int32[Array, "B M"]  # negative: padding
    adjust_values: Float32[Array, "B M"]
    adjust_until: Int32[Array, "B M"]


class Sampled(NamedTuple):
    """What `sample_full` returns. Log-probabilities are of the untouched logits, as vLLM's `raw_logprobs`."""

    tokens: Int32[Array, " B"]
    logprobs: Float32[Array, " B"]
    ranks: Int32[Array, " B"]  # tokens at least as likely, itself included
    top_ids: Int32[Array, "B K"]
    top_logprobs: Float32[Array, "B K"]


def sample_plain(
    logits: Float32[Array, "B V"], params: SamplerParams, *, axis_name: str | None = None
) -> Int32[Array, " B"]:
    """Draws with temperature alone; other parameters are not read.

    Args:
        logits: of this shard of the vocabulary.
        params: of the same rows.
        axis_name: the mesh axis over which V is split, if any.

    Returns:
        token ids; -1 where a row's logits hold a NaN or +inf, or nothing but -inf.
    """
    return _draw(logits, None, params, axis_name)


def sample_filtered(
    logits: Float32[Array, "B V"], params: SamplerParams, *, axis_name: str | None = None
) -> Int32[Array, " B"]:
    """Draws with temperature, top-k, top-p and min-p (see `filter_tokens`); otherwise as `sample_plain`."""
    dropped = filter_tokens(logits, _inverse_temperature(params), params.top_k, params.top_p, params.min_p, axis_name)
    return _draw(logits, dropped, params, axis_name)


def sample_full(
    logits: Float32[Array, "B V"],
    params: SamplerParams,
    state: FullState,
    *,
    num_logprobs: int = 20,
    axis_name: str | None = None,
) -> Sampled:
    """Draws with everything, in vLLM's order: biases and bans, penalties, temperature, min-p, top-k, top-p.

    Args:
        logits: of this shard of the vocabulary.
        params: of the same rows.
        state: counts of this shard; the drawn tokens are not counted yet (`count_sampled` does).
        num_logprobs: static; how many of the likeliest tokens are returned.
        axis_name: the mesh axis over which V is split, if any.

    Returns:
        tokens as of `sample_filtered` (-1 also where every token is banned) and log-probabilities.
    """
    adjusted = adjust_logits(
        logits,
        state.adjust_ids,
        state.adjust_values,
        state.adjust_until,
        params.num_output,
        vocab_offset(logits.shape[1], axis_name),
    )
    penalised = penalise_logits(
        adjusted,
        state.counts.at[state.rows].get(mode="clip", wrap_negative_indices=False),
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
    # Written once: fused into each of the 20 passes that follow, the penalties would be computed, and the counts
    # read, again and again.
    penalised = lax.optimization_barrier(penalised)
    tokens = sample_filtered(penalised, params, axis_name=axis_name)
    return Sampled(tokens, *gather_logprobs(logits, tokens, num_logprobs, axis_name))


def _draw(logits: JaxArray, dropped: JaxArray | None, params: SamplerParams, axis_name: str | None) -> JaxArray:
    """The argmax of logits / temperature + Gumbel noise over the tokens that are not dropped."""
    vocab_size = logits.shape[1]
    ids = jnp.arange(vocab_size, dtype=jnp.int32) + vocab_offset(vocab_size, axis_name)
    noisy = logits * _inverse_temperature(params)[:, None] + gumbel_noise(params.key, params.position, ids)
    score = jnp.where(_is_greedy(params)[:, None], logits, noisy)
    if dropped is not None:
        score = jnp.where(dropped, -jnp.inf, score)
    best, token = argmax(score, axis_name)
    return jnp.where(jnp.isfinite(best), token, -1)


def _is_greedy(params: SamplerParams) -> JaxArray:
    return params.temperature < GREEDY_BELOW


def _inverse_temperature(params: SamplerParams) -> JaxArray:
    return 1.0 / jnp.where(_is_greedy(params), 1.0, params.temperature)
