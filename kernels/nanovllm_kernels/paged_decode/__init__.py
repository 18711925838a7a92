"""Attention of one query token a row over the paged KV cache."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_attention, check_backend, check_int32, check_shape
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.paged_decode.reference import paged_decode_xla


def paged_decode(
    q: Float[Array, "B H D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    backend: Literal["xla", "triton"],
) -> Float[Array, "B H D"]:
    """Softmax attention of each row's newest token over the row's context, grouped queries.

    B rows, H query heads, K KV heads (query head h reads KV head h // (H // K)), D head dim, P blocks a row.
    `context_lens` counts the newest token, whose key and value are in the cache already; 0 marks a padding
    row, which gives zeros. Position p of row b is in block `block_tables[b, p // block_size]`; entries past
    the context are not read, and neither are slots past it, whatever they hold.

    Scores are `scale` * q·k, then `soft_cap` * tanh(scores / soft_cap) if given; with `sliding_window` w only
    the newest w tokens are seen. Sums are float32, products of float32 inputs too. dtypes: float32, bfloat16,
    float16; the output has q's.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together, or the backend is unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    check_attention(q, k_cache, v_cache, sliding_window=sliding_window, soft_cap=soft_cap)
    check_int32(block_tables=block_tables, context_lens=context_lens)
    if block_tables.ndim != 2 or block_tables.shape[0] != q.shape[0]:
        raise ValueError(
            f"block_tables has shape {block_tables.shape}; it must be [B, P] with B = {q.shape[0]}, q's rows."
        )
    check_shape("context_lens", context_lens, (q.shape[0],), "B")
    if q.shape[0] == 0 or block_tables.shape[1] == 0:
        return jnp.zeros_like(q)
    options = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap}
    if backend == "xla":
        return paged_decode_xla(q, k_cache, v_cache, block_tables, context_lens, **options)
    import_jax_triton()
    from nanovllm_kernels.paged_decode.triton import paged_decode_triton

    return paged_decode_triton(q, k_cache, v_cache, block_tables, context_lens, **options)
