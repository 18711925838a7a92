"""Draws the next token of each row from its logits.

Three functions, of which the host picks the cheapest that serves all rows of a step: a condition on the
device costs more than what it saves. A row's token is the same from any of them that serves it, and depends
on its logits, parameters, key and position alone.

    sample_plain     greedy and temperature
    sample_filtered  also top-k, top-p, min-p
    sample_full      also penalties, biases, bans, and log-probabilities
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from jax import lax
from jaxtyping import Array, Float32, Int32, UInt16, UInt32

from nanovllm_jax.step.logprobs import gather_logprobs
from nanovllm_jax.step.penalties import adjust_logits, penalise_logits
from nanovllm_kernels import sample
from nanovllm_kernels.sample.vocab import vocab_offset


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
    logits: Float32[Array, "B V"],
    params: SamplerParams,
    *,
    axis_name: str | None = None,
    backend: Literal["xla", "triton"] = "xla",
) -> Int32[Array, " B"]:
    """Draws with temperature alone; other parameters are not read.

    Args:
        logits: of this shard of the vocabulary.
        params: of the same rows.
        axis_name: the mesh axis over which V is split, if any.
        backend: of `nanovllm_kernels.sample`.

    Returns:
        token ids; -1 where a row's logits hold a NaN or +inf, or nothing but -inf.
    """
    return sample(logits, params.temperature, params.key, params.position, axis_name=axis_name, backend=backend)


def sample_filtered(
    logits: Float32[Array, "B V"],
    params: SamplerParams,
    *,
    axis_name: str | None = None,
    backend: Literal["xla", "triton"] = "xla",
) -> Int32[Array, " B"]:
    """Draws with temperature, top-k, top-p and min-p; otherwise as `sample_plain`."""
    return sample(
        logits,
        params.temperature,
        params.key,
        params.position,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        axis_name=axis_name,
        backend=backend,
    )


def sample_full(
    logits: Float32[Array, "B V"],
    params: SamplerParams,
    state: FullState,
    *,
    num_logprobs: int = 20,
    axis_name: str | None = None,
    backend: Literal["xla", "triton"] = "xla",
) -> Sampled:
    """Draws with everything, in vLLM's order: biases and bans, penalties, temperature, min-p, top-k, top-p.

    Args:
        logits: of this shard of the vocabulary.
        params: of the same rows.
        state: counts of this shard; the drawn tokens are not counted yet (`count_sampled` does).
        num_logprobs: static; how many of the likeliest tokens are returned.
        axis_name: the mesh axis over which V is split, if any.
        backend: of `nanovllm_kernels.sample`.

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
    tokens = sample_filtered(penalised, params, axis_name=axis_name, backend=backend)
    return Sampled(tokens, *gather_logprobs(logits, tokens, num_logprobs, axis_name))
