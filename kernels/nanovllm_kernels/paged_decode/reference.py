"""XLA implementation: walks the context in chunks of blocks with an online softmax in float32.

Memory stays at one chunk of K and V a row, and time follows the longest context at hand, not the width of
the block table.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from nanovllm_kernels._fp8 import as_bytes

# Tokens gathered a row and iteration: large enough to hide the loop's own cost (a few µs on a CPU), small
# enough that a short context does not pay for a long one.
_CHUNK_TOKENS = 128


def paged_decode_xla(
    q: Float[Array, "B Q H D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    k_scale: Float[Array, " K"] | None,
    v_scale: Float[Array, " K"] | None,
) -> Float[Array, "B Q H D"]:
    num_rows, num_queries, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    chunk_blocks = min(max(1, _CHUNK_TOKENS // block_size), block_tables.shape[1])
    chunk = chunk_blocks * block_size
    # Whole chunks only: a slice that would reach past the end is moved back by XLA, not cut.
    tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % chunk_blocks)))
    # The Q * G queries of a KV head lie beside each other, those of one position together.
    queries = q.reshape(num_rows, num_queries, num_kv_heads, group, head_dim).swapaxes(1, 2)
    queries = queries.reshape(num_rows, num_kv_heads, -1, head_dim).astype(jnp.float32) * scale
    last_seen = context_lens[:, None] - num_queries + jnp.repeat(jnp.arange(num_queries, dtype=jnp.int32), group)
    starts = jnp.zeros_like(context_lens)
    if sliding_window is not None:
        starts = jnp.maximum(context_lens - (num_queries - 1) - sliding_window, 0)
    first_chunk = jnp.min(jnp.where(context_lens > 0, starts, jnp.iinfo(jnp.int32).max)) // chunk
    end_chunk = (jnp.max(context_lens) + chunk - 1) // chunk

    def gather(cache: Array, blocks: Array, visible: Array, scale: Array | None) -> Array:
        pages = as_bytes(cache).at[blocks].get(mode="clip")  # [B, chunk_blocks, K, bs, D]
        pages = pages.view(cache.dtype).astype(jnp.float32)
        tokens = jnp.swapaxes(pages, 1, 2).reshape(num_rows, num_kv_heads, chunk, head_dim)
        if scale is not None:
            tokens = tokens * scale.astype(jnp.float32)[:, None, None]
        # Unused slots may hold NaN, which a weight of zero would keep.
        return jnp.where(visible[:, None, :, None], tokens, 0)

    def attend(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum, total, acc = carry
        positions = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        visible = (positions >= starts[:, None]) & (positions < context_lens[:, None])
        blocks = lax.dynamic_slice_in_dim(tables, index * chunk_blocks, chunk_blocks, axis=1)
        scores = jnp.einsum(
            "bkgd,bktd->bkgt", queries, gather(k_cache, blocks, visible, k_scale), precision=lax.Precision.HIGHEST
        )
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        seen = visible[:, None] & (positions <= last_seen[..., None])
        if sliding_window is not None:
            seen &= positions > last_seen[..., None] - sliding_window
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
        # While a row has seen no token its maximum is -inf, and -inf - -inf is NaN.
        shift = jnp.where(new_maximum == -jnp.inf, 0, new_maximum)
        weights = jnp.exp(scores - shift[..., None])
        decay = jnp.exp(maximum - shift)
        total = total * decay + jnp.sum(weights, axis=-1)
        acc = acc * decay[..., None] + jnp.einsum(
            "bkgt,bktd->bkgd", weights, gather(v_cache, blocks, visible, v_scale), precision=lax.Precision.HIGHEST
        )
        return new_maximum, total, acc

    heads = (num_rows, num_kv_heads, num_queries * group)
    empty = (jnp.full(heads, -jnp.inf), jnp.zeros(heads), jnp.zeros((*heads, head_dim)))
    _, total, acc = lax.fori_loop(first_chunk, end_chunk, attend, empty)
    out = jnp.where(total[..., None] == 0, 0, acc / jnp.where(total == 0, 1, total)[..., None])
    out = out.reshape(num_rows, num_kv_heads, num_queries, group, head_dim).swapaxes(1, 2)
    return out.reshape(q.shape).astype(q.dtype)
