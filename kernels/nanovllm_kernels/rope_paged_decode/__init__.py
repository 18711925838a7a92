"""A decode step's attention: norm, rotary embedding and cache write of one new token a row, and attention over it."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import (
    check_backend,
    check_cache,
    check_float,
    check_int32,
    check_scales,
    check_scores,
    check_shape,
)
from nanovllm_kernels._compat import current_target, import_jax_triton
from nanovllm_kernels.paged_decode.plan import Plan
from nanovllm_kernels.rope_paged_decode.reference import rope_paged_decode_xla

__all__ = ["Plan", "plan_rope_paged_decode", "rope_paged_decode"]

# Rows' KV heads a multiprocessor for which Mosaic's kernel is taken, and query heads of each. Measured on an H200: with
# 1.9 to 7.8 of them (32 to 128 rows of 8 KV heads with 2 query heads, 32 and 64 with 4; 64 to 256 rows of 4 KV heads
# with 4) it takes 1 to 20% less time than Triton's, most where rows have a few hundred tokens; with 15.5 (256 rows of
# 8) and mixed lengths 2% more. With 32 to 256 rows of 2 KV heads it takes 2 to 18% less. The others in between are
# expected to be alike.
_LEAST_FILL, _LEAST_FILL_OF_FEW_HEADS, _MOST_FILL = 1.9, 0.48, 8
_FEW_HEADS, _LEAST_KV_HEADS = 3, 2
_LEAST_GROUP, _MOST_GROUP = 2, 6


def rope_paged_decode(
    qkv: Float[Array, "B K heads D"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    q_norm: Float[Array, " D"] | None = None,
    k_norm: Float[Array, " D"] | None = None,
    eps: float = 1e-6,
    k_scale: Float[Array, " K"] | None = None,
    v_scale: Float[Array, " K"] | None = None,
    counters: jax.Ref | None = None,
    plan: Plan | None = None,
    backend: Literal["xla", "triton"],
) -> tuple[Float[Array, "B H D"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    """`rope_cache_write` of each row's newest token, then `paged_decode` of it, in one kernel.

    B rows, K KV heads, G query heads for each (H = K * G), D head dim, P blocks a row. `qkv[b, k]` holds the G query
    heads of KV head k, its key and its value, as the product of the projections gives them; `cos` and `sin` are
    float32. `context_lens` counts the newest token, which goes to position `context_lens[b] - 1` of the row:
    that slot is written, and whatever it held is not read. Rows must not share the block of their newest tokens. 0
    marks a padding row, which writes nothing and gives zeros. All else is as in the two operations, whose results these
    are, up to the order of float32 sums; the newest key and value count as the cache holds them.

    `counters`: a `jax.new_ref` of `split_counters()`, which a step's products may share. With them rows that are cut
    into pieces are merged by the last program to arrive; without them by a second kernel.

    `plan`: `plan_rope_paged_decode` of `context_lens`, where that is the same for many calls and not made in each;
    int32 [pieces, 8] and [cuts, 3]. The XLA implementation cuts no rows, and ignores it.

    Returns:
        (out [B, H, D] in qkv's dtype, k_cache, v_cache); the caches in place when donated to the enclosing jit.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together, or the backend is unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    check_cache(k_cache, v_cache)
    check_scales(k_cache, k_scale, v_scale)
    check_scores(sliding_window, soft_cap)
    check_float(qkv=qkv)
    check_int32(block_tables=block_tables, context_lens=context_lens)
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if qkv.ndim != 4 or qkv.shape[2] < 3 or (qkv.shape[1], qkv.shape[3]) != (num_kv_heads, head_dim):
        raise ValueError(
            f"qkv has shape {qkv.shape}; it must be [B, K, G + 2, D] with K = {num_kv_heads}, D = {head_dim} and at "
            "least one query head."
        )
    if block_tables.ndim != 2 or block_tables.shape[0] != len(qkv) or block_tables.shape[1] == 0:
        raise ValueError(
            f"block_tables has shape {block_tables.shape}; it must be [B, P] with B = {len(qkv)}, qkv's rows, and P "
            "above 0."
        )
    check_shape("context_lens", context_lens, (len(qkv),), "B")
    for name, array in (("cos", cos), ("sin", sin)):
        check_shape(name, array, (len(qkv), head_dim // 2), "B, D / 2")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm go together: give both or neither.")
    for name, array in (("q_norm", q_norm), ("k_norm", k_norm)):
        if array is not None:
            check_shape(name, array, (head_dim,), "D")
    if plan is not None:
        _check_plan(plan)
    if len(qkv) == 0:
        return qkv[:, :, :-2].reshape(0, -1, head_dim), k_cache, v_cache
    args = (qkv, cos, sin, k_cache, v_cache, block_tables, context_lens)
    options = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap}
    options |= {"q_norm": q_norm, "k_norm": k_norm, "eps": eps, "k_scale": k_scale, "v_scale": v_scale}
    if backend == "xla":
        return rope_paged_decode_xla(*args, **options)
    import_jax_triton()
    if counters is not None and k_scale is None and _mosaic_takes(qkv, k_cache, sliding_window, soft_cap):
        from nanovllm_kernels.rope_paged_decode.triton import plan_triton

        width = block_tables.shape[1]
        plan = plan or plan_triton(context_lens, k_cache, width, dtype=qkv.dtype, window=0)
        pieces, cuts = plan
        if len(cuts) * num_kv_heads <= len(counters):
            from nanovllm_kernels.rope_paged_decode.mosaic import rope_paged_decode_mosaic

            norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps}
            return rope_paged_decode_mosaic(*args[:6], pieces, scale=scale, **norms, counters=counters)
    from nanovllm_kernels.rope_paged_decode.triton import rope_paged_decode_triton

    return rope_paged_decode_triton(*args, **options, counters=counters, plan=plan)


def plan_rope_paged_decode(
    context_lens: Int[Array, " B"],
    k_cache: Float[Array, "N K block_size D"],
    table_width: int,
    *,
    dtype: DTypeLike,
    sliding_window: int | None = None,
    backend: Literal["xla", "triton"],
) -> Plan | None:
    """How `rope_paged_decode` cuts rows of these lengths into pieces; the arguments are its, and `dtype` is qkv's.

    None where it cuts none.
    """
    if backend == "xla":
        return None
    import_jax_triton()
    from nanovllm_kernels.rope_paged_decode.triton import plan_triton

    return plan_triton(context_lens, k_cache, table_width, dtype=dtype, window=sliding_window or 0)


def _mosaic_takes(
    qkv: Float[Array, "B K heads D"],
    k_cache: Float[Array, "N K block_size D"],
    sliding_window: int | None,
    soft_cap: float | None,
) -> bool:
    """Whether Mosaic's kernel, of sm_90, takes it, given counters and a cache without scales, and is the faster one."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    target = current_target()
    least_fill = _LEAST_FILL_OF_FEW_HEADS if num_kv_heads <= _FEW_HEADS else _LEAST_FILL
    return (
        target.compute_capability == 90
        and qkv.dtype == k_cache.dtype == jnp.bfloat16
        and head_dim == 128
        and block_size in (8, 16)
        and _LEAST_GROUP <= qkv.shape[2] - 2 <= _MOST_GROUP
        and num_kv_heads >= _LEAST_KV_HEADS
        and sliding_window is None
        and soft_cap is None
        and least_fill <= len(qkv) * num_kv_heads / target.multiprocessors < _MOST_FILL
    )


def _check_plan(plan: Plan) -> None:
    pieces, cuts = plan
    for name, array, columns in (("pieces", pieces, 8), ("cuts", cuts, 3)):
        if array.ndim != 2 or array.shape[1] != columns or array.dtype != jnp.int32:
            raise ValueError(
                f"plan's {name} are {array.dtype}{list(array.shape)}; they must be int32 [{name}, {columns}], as "
                "plan_rope_paged_decode gives them."
            )
