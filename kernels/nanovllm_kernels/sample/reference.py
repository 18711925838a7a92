"""XLA implementation: the path on a CPU and over shards of a vocabulary, and what the kernels are checked against."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array as JaxArray
from jaxtyping import Array, Float32, Int32, UInt32

from nanovllm_kernels.sample.filters import filter_tokens
from nanovllm_kernels.sample.noise import gumbel_noise
from nanovllm_kernels.sample.vocab import argmax, vocab_offset

# vLLM's: a temperature below it is greedy.
GREEDY_BELOW = 1e-5


def sample_xla(
    logits: Float32[Array, "B V"],
    temperature: Float32[Array, " B"],
    key: UInt32[Array, "B 2"],
    position: Int32[Array, " B"],
    filters: tuple[JaxArray, JaxArray, JaxArray] | None,
    axis_name: str | None,
) -> Int32[Array, " B"]:
    """The argmax of logits / temperature + Gumbel noise over the tokens that `filters` (k, p, min-p) keep."""
    vocab_size = logits.shape[1]
    greedy = temperature < GREEDY_BELOW
    inverse_temperature = 1.0 / jnp.where(greedy, 1.0, temperature)
    ids = jnp.arange(vocab_size, dtype=jnp.int32) + vocab_offset(vocab_size, axis_name)
    noisy = logits * inverse_temperature[:, None] + gumbel_noise(key, position, ids)
    score = jnp.where(greedy[:, None], logits, noisy)
    if filters is not None:
        score = jnp.where(filter_tokens(logits, inverse_temperature, *filters, axis_name), -jnp.inf, score)
    best, token = argmax(score, axis_name)
    return jnp.where(jnp.isfinite(best), token, -1)
