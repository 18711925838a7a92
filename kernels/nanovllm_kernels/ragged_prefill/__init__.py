"""Causal attention of many new tokens a sequence over the paged KV cache, sequences laid end to end."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_attention, check_backend, check_int32, check_shape
from nanovllm_kernels._compat import current_target, import_jax_triton
from nanovllm_kernels.ragged_prefill.reference import ragged_prefill_xla


def ragged_prefill(
    q: Float[Array, "T H D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, "S+1"],
    context_lens: Int[Array, " S"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Float[Array, " K"] | None = None,
    v_scale: Float[Array, " K"] | None = None,
    backend: Literal["xla", "triton", "mosaic"],
) -> Float[Array, "T H D"]:
    """Causal softmax attention of ragged new tokens over their sequences' contexts, grouped queries.

    T tokens, S sequences, H query heads, K KV heads (query head h reads KV head h // (H // K)), D head dim,
    P blocks a sequence. Sequence s owns `q[cu_q_lens[s]:cu_q_lens[s + 1]]`; its last query is at position
    `context_lens[s] - 1`, so what lies before its first query is a prefix already in the cache, and the keys
    and values of the queries themselves are in the cache too. A query sees positions up to its own, with
    `sliding_window` w only the newest w of them. A sequence may have one query (a decode row) or none
    (unused). Rows of q past `cu_q_lens[S]` are padding and give zeros. `cu_q_lens` starts at 0 and never
    falls.

    Block tables, `scale`, `soft_cap`, `k_scale`, `v_scale`, dtypes, accumulation and unread slots are as in
    `paged_decode`.

    `backend="mosaic"` is `"triton"` wherever `mosaic_supports` says no.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together, or the backend is unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if a GPU implementation is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend, ("xla", "triton", "mosaic"))
    if q.ndim != 3:
        raise ValueError(f"q has shape {q.shape}; it must be [T, H, D].")
    check_attention(
        q, k_cache, v_cache, sliding_window=sliding_window, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale
    )
    check_int32(block_tables=block_tables, cu_q_lens=cu_q_lens, context_lens=context_lens)
    if block_tables.ndim != 2:
        raise ValueError(f"block_tables has shape {block_tables.shape}; it must be [S, P].")
    num_seqs = block_tables.shape[0]
    check_shape("cu_q_lens", cu_q_lens, (num_seqs + 1,), "S + 1")
    check_shape("context_lens", context_lens, (num_seqs,), "S")
    if 0 in (q.shape[0], *block_tables.shape):
        return jnp.zeros_like(q)
    plain = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap}
    options = {**plain, "k_scale": k_scale, "v_scale": v_scale}
    args = (q, k_cache, v_cache, block_tables, cu_q_lens, context_lens)
    if backend == "xla":
        return ragged_prefill_xla(*args, **options)
    if backend == "mosaic" and mosaic_supports(
        q, k_cache, **plain, compute_capability=current_target().compute_capability
    ):
        from nanovllm_kernels.ragged_prefill.mosaic import ragged_prefill_mosaic

        return ragged_prefill_mosaic(*args, scale=scale)
    import_jax_triton()
    from nanovllm_kernels.ragged_prefill.triton import ragged_prefill_triton

    return ragged_prefill_triton(*args, **options)


def mosaic_supports(
    q: Float[Array, "T H D"] | jax.ShapeDtypeStruct,
    k_cache: Float[Array, "N K block_size D"] | jax.ShapeDtypeStruct,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    compute_capability: int,
) -> bool:
    """Whether `backend="mosaic"` has a kernel of its own: TMA and wgmma of sm_90, 16 bits, plain softmax."""
    num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    return (
        compute_capability == 90
        and q.dtype == k_cache.dtype
        and q.dtype in (jnp.dtype("bfloat16"), jnp.dtype("float16"))
        and head_dim in (64, 128)
        and block_size in (16, 32, 64, 128)
        and num_blocks * num_kv_heads > 1  # of a single page Mosaic makes no dimension that could be run past
        and scale > 0
        and sliding_window is None
        and soft_cap is None
    )
