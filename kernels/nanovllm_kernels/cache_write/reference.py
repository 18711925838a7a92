"""XLA implementation: a scatter, in place when the caches are donated."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cache_write_xla(
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    slots: Int[Array, " T"],
) -> tuple[Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    num_blocks, _, block_size, _ = k_cache.shape
    # A negative index would count from the end: unwritten tokens go past it instead, each to a block of its
    # own, because indices promised to be unique must be so even where they are dropped.
    unwritten = num_blocks + jnp.arange(slots.shape[0], dtype=slots.dtype)
    blocks = jnp.where(slots < 0, unwritten, slots // block_size)
    offsets = slots % block_size

    def write(cache: Array, new: Array) -> Array:
        at = cache.at[blocks, :, offsets]
        return at.set(new.astype(cache.dtype), mode="drop", unique_indices=True)

    return write(k_cache, k), write(v_cache, v)
