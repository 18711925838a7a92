"""Attention of one query token a row, or a few, over the paged KV cache."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_attention, check_backend, check_int32, check_shape
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.paged_decode.reference import paged_decode_xla

MAX_QUERIES = 8


def paged_decode(
    q: Float[Array, "B *queries H D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Float[Array, " K"] | None = None,
    v_scale: Float[Array, " K"] | None = None,
    backend: Literal["xla", "triton"],
) -> Float[Array, "B *queries H D"]:
    """Softmax attention of each row's newest tokens over the row's context, grouped queries.

    B rows, H query heads, K KV heads (query head h reads KV head h // (H // K)), D head dim, P blocks a row.
    q is [B, H, D] for one query a row, or [B, Q, H, D] for Q of 1 to 8 (tokens to verify in speculative decoding):
    query i is the token at position `context_lens[b] - Q + i` and sees positions up to its own. `context_lens` counts
    the newest token, and keys and values of all queries are in the cache already; 0 marks a padding row, which gives
    zeros, as does a query at a negative position. Position p of row b is in block `block_tables[b, p // block_size]`;
    entries past the context are not read, and neither are slots past it, whatever they hold.

    Scores are `scale` * q·k, then `soft_cap` * tanh(scores / soft_cap) if given; with `sliding_window` w only
    the newest w tokens up to the query are seen. Sums are float32, products of float32 inputs too. dtypes: float32,
    bfloat16, float16; caches also float8_e4m3fn, whose keys count times `k_scale` of their KV head and whose values
    times `v_scale` (None means 1). The output has q's dtype.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together, or the backend is unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    if q.ndim not in (3, 4) or (q.ndim == 4 and not 1 <= q.shape[1] <= MAX_QUERIES):
        raise ValueError(f"q has shape {q.shape}; it must be [B, H, D], or [B, Q, H, D] with Q of 1 to {MAX_QUERIES}.")
    check_attention(
        q, k_cache, v_cache, sliding_window=sliding_window, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale
    )
    check_int32(block_tables=block_tables, context_lens=context_lens)
    if block_tables.ndim != 2 or block_tables.shape[0] != q.shape[0]:
        raise ValueError(
            f"block_tables has shape {block_tables.shape}; it must be [B, P] with B = {q.shape[0]}, q's rows."
        )
    check_shape("context_lens", context_lens, (q.shape[0],), "B")
    if q.shape[0] == 0 or block_tables.shape[1] == 0:
        return jnp.zeros_like(q)
    options = {
        "scale": scale,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    queries = q if q.ndim == 4 else q[:, None]
    if backend == "xla":
        out = paged_decode_xla(queries, k_cache, v_cache, block_tables, context_lens, **options)
    else:
        import_jax_triton()
        from nanovllm_kernels.paged_decode.triton import paged_decode_triton

        out = paged_decode_triton(queries, k_cache, v_cache, block_tables, context_lens, **options)
    return out.reshape(q.shape)
