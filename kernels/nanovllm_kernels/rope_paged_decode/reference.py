"""XLA implementation: the two operations that this one is, after each other."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels.paged_decode.reference import paged_decode_xla
from nanovllm_kernels.rope_cache_write.reference import rope_cache_write_xla


def rope_paged_decode_xla(
    qkv: Float[Array, "B K heads D"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    q_norm: Float[Array, " D"] | None,
    k_norm: Float[Array, " D"] | None,
    eps: float,
    k_scale: Float[Array, " K"] | None,
    v_scale: Float[Array, " K"] | None,
) -> tuple[Float[Array, "B H D"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    slots = newest_slots(block_tables, context_lens, k_cache.shape[2])
    q, k_cache, v_cache = rope_cache_write_xla(
        qkv, cos, sin, k_cache, v_cache, slots, q_norm=q_norm, k_norm=k_norm, eps=eps, k_scale=k_scale, v_scale=v_scale
    )
    out = paged_decode_xla(
        q[:, None],
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return out[:, 0], k_cache, v_cache


def newest_slots(block_tables: Int[Array, "B P"], context_lens: Int[Array, " B"], block_size: int) -> Int[Array, " B"]:
    """Where each row's newest token is in the cache; -1 for a row without tokens."""
    newest = jnp.maximum(context_lens - 1, 0)
    block = jnp.take_along_axis(block_tables, (newest // block_size)[:, None], axis=1)[:, 0]
    return jnp.where(context_lens > 0, block * block_size + newest % block_size, -1)
