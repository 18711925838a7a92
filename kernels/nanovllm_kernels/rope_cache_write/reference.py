"""XLA implementation: elementwise work that XLA fuses, and a scatter, in place when the caches are donated."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._fp8 import as_bytes, quantise
from nanovllm_kernels.norm import rms_norm


def rope_cache_write_xla(
    qkv: Float[Array, "T K heads D"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    slots: Int[Array, " T"],
    *,
    q_norm: Float[Array, " D"] | None,
    k_norm: Float[Array, " D"] | None,
    eps: float,
    k_scale: Float[Array, " K"] | None,
    v_scale: Float[Array, " K"] | None,
) -> tuple[Float[Array, "T H D"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    num_blocks, _, block_size, _ = k_cache.shape
    # A negative index would count from the end: unwritten tokens go past it instead, each to a block of its
    # own, because indices promised to be unique must be so even where they are dropped.
    unwritten = num_blocks + jnp.arange(slots.shape[0], dtype=slots.dtype)
    blocks = jnp.where(slots < 0, unwritten, slots // block_size)
    offsets = slots % block_size

    def write(cache: Array, new: Array, scale: Array | None) -> Array:
        at, stored = as_bytes(cache).at[blocks, :, offsets], as_bytes(quantise(new, cache.dtype, scale))
        return at.set(stored, mode="drop", unique_indices=True).view(cache.dtype)

    return q.reshape(q.shape[0], -1, q.shape[-1]), write(k_cache, k, k_scale), write(v_cache, v, v_scale)


def rotate(
    x: Float[Array, "T *heads D"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T *heads D"]:
    """Rotary embedding (Su et al. 2021) on the halves of D, the layout of Hugging Face checkpoints, in float32."""
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (cos.shape[-1],)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
