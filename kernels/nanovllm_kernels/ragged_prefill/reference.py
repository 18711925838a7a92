"""XLA implementation: a loop over tiles of queries, inside it one over chunks of the tile's context.

Both trip counts follow the lengths at hand, and every product is one of matrices, so it is quick on a CPU
too; memory stays at one tile of scores and one chunk of K and V.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from nanovllm_kernels._fp8 import as_bytes

# Queries a tile: with three query heads a KV head already about 100 rows a product, while a decode row, which
# fills a tile with one query, wastes little.
_TILE_QUERIES = 32
_CHUNK_TOKENS = 128


def ragged_prefill_xla(
    q: Float[Array, "T H D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, "S+1"],
    context_lens: Int[Array, " S"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    k_scale: Float[Array, " K"] | None,
    v_scale: Float[Array, " K"] | None,
) -> Float[Array, "T H D"]:
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    tile = min(_TILE_QUERIES, num_tokens)
    chunk_blocks = min(max(1, _CHUNK_TOKENS // block_size), block_tables.shape[1])
    chunk = chunk_blocks * block_size
    # Whole tiles and chunks only: a slice that would reach past the end is moved back by XLA, not cut.
    tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % chunk_blocks)))
    queries = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    tile_ends = jnp.cumsum((q_lens + tile - 1) // tile)  # [S]: tiles of the sequences up to and with s

    def gather(cache: Array, blocks: Array, seen: Array, scale: Array | None) -> Array:
        pages = as_bytes(cache).at[blocks].get(mode="clip")  # [chunk_blocks, K, bs, D]
        pages = pages.view(cache.dtype).astype(jnp.float32)
        tokens = jnp.swapaxes(pages, 0, 1).reshape(num_kv_heads, chunk, head_dim)
        if scale is not None:
            tokens = tokens * scale.astype(jnp.float32)[:, None, None]
        # Unused slots may hold NaN, which a weight of zero would keep.
        return jnp.where(seen[None, :, None], tokens, 0)

    def attend_tile(index: Array, out: Array) -> Array:
        seq = jnp.sum((tile_ends <= index).astype(jnp.int32))
        first = (index - jnp.where(seq > 0, tile_ends[seq - 1], 0)) * tile  # query of the sequence
        row = cu_q_lens[seq] + first
        count = jnp.minimum(q_lens[seq] - first, tile)
        q_positions = context_lens[seq] - q_lens[seq] + first + jnp.arange(tile, dtype=jnp.int32)
        end = q_positions[0] + count
        start = jnp.int32(0) if sliding_window is None else jnp.maximum(q_positions[0] - sliding_window + 1, 0)
        q_tile = lax.dynamic_slice_in_dim(queries, row, tile).astype(jnp.float32) * scale
        q_tile = q_tile.reshape(tile, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
        q_tile = q_tile.reshape(num_kv_heads, tile * group, head_dim)
        q_rows = jnp.repeat(q_positions, group)[:, None]

        def attend_chunk(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, acc = carry
            positions = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
            seen = (positions >= start) & (positions < end)
            blocks = lax.dynamic_slice(tables, (seq, index * chunk_blocks), (1, chunk_blocks))[0]
            keys = gather(k_cache, blocks, seen, k_scale)
            scores = jnp.einsum("kmd,ktd->kmt", q_tile, keys, precision=lax.Precision.HIGHEST)
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            visible = seen & (positions <= q_rows)
            if sliding_window is not None:
                visible &= positions > q_rows - sliding_window
            scores = jnp.where(visible, scores, -jnp.inf)
            new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
            # While a query has seen no token its maximum is -inf, and -inf - -inf is NaN.
            shift = jnp.where(new_maximum == -jnp.inf, 0, new_maximum)
            weights = jnp.exp(scores - shift[..., None])
            decay = jnp.exp(maximum - shift)
            total = total * decay + jnp.sum(weights, axis=-1)
            acc = acc * decay[..., None] + jnp.einsum(
                "kmt,ktd->kmd", weights, gather(v_cache, blocks, seen, v_scale), precision=lax.Precision.HIGHEST
            )
            return new_maximum, total, acc

        rows = (num_kv_heads, tile * group)
        empty = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, head_dim)))
        _, total, acc = lax.fori_loop(start // chunk, (end + chunk - 1) // chunk, attend_chunk, empty)
        result = jnp.where(total[..., None] == 0, 0, acc / jnp.where(total == 0, 1, total)[..., None])
        result = result.reshape(num_kv_heads, tile, group, head_dim).transpose(1, 0, 2, 3)
        result = jnp.where(jnp.arange(tile)[:, None, None] < count, result.reshape(tile, num_heads, head_dim), 0)
        # The rows past `count` belong to later sequences, whose tiles come later and overwrite them.
        return lax.dynamic_update_slice_in_dim(out, result.astype(out.dtype), row, axis=0)

    out = lax.fori_loop(0, tile_ends[-1], attend_tile, jnp.zeros_like(queries))
    return out[:num_tokens]
