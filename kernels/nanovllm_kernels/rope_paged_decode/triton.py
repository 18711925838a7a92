"""Triton implementation: launch of the kernel in `device.py`.

A program norms and rotates the query heads of its group. The one whose piece ends with the newest token does so with
the key too, stores key and value, and begins its softmax with them from registers, as the cache holds them; nobody
reads that slot. Where a row is cut, its last program to arrive merges the pieces, or a second kernel does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import current_target, triton_call, update_in_place
from nanovllm_kernels._device import FP8, dot_dtype, dot_itemsize
from nanovllm_kernels._integers import ceil_div, next_power_of_2
from nanovllm_kernels.paged_decode.plan import Plan
from nanovllm_kernels.paged_decode.triton import (
    FULL,
    MANY_FLOAT8,
    MIN_DOT,
    Launch,
    launch_parameters,
    merge_cut_rows,
    paged_decode_triton,
    plan_for_chip,
)
from nanovllm_kernels.rope_cache_write.triton import rope_cache_write_triton
from nanovllm_kernels.rope_paged_decode.device import rope_decode_kernel
from nanovllm_kernels.rope_paged_decode.reference import newest_slots

_MERGE_ELEMENTS = 16  # of pieces, a thread, that a row's last program reads at a time


def plan_triton(
    context_lens: Int[Array, " B"], k_cache: Array, table_width: int, *, dtype: DTypeLike, window: int
) -> Plan:
    """Plain XLA, the same for all layers. `dtype` is qkv's."""
    launch, _ = _launch(len(context_lens), k_cache, dtype)
    return plan_for_chip(launch, context_lens, window, k_cache.shape[1], table_width * k_cache.shape[2])


def _launch(num_rows: int, k_cache: Array, dtype: DTypeLike) -> tuple[Launch, float]:
    """Launch parameters, and programs a multiprocessor if no row is cut."""
    target = current_target()
    fill = num_rows * k_cache.shape[1] / target.multiprocessors
    itemsizes = {"itemsize": k_cache.dtype.itemsize, "dot_itemsize": dot_itemsize(jnp.dtype(dtype), k_cache.dtype)}
    return launch_parameters(target, head_dim=k_cache.shape[3], **itemsizes, fill=fill), fill


def rope_paged_decode_triton(
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
    counters: jax.Ref | None,
    plan: Plan | None = None,
) -> tuple[Float[Array, "B H D"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    num_rows, num_kv_heads, heads, head_dim = qkv.shape
    block_size, group, window = k_cache.shape[2], heads - 2, sliding_window or 0
    launch, fill = _launch(num_rows, k_cache, qkv.dtype)
    plan = plan or plan_triton(context_lens, k_cache, block_tables.shape[1], dtype=qkv.dtype, window=window)
    pieces, cuts = plan
    if k_cache.dtype == FP8 and fill >= MANY_FLOAT8:
        slots = newest_slots(block_tables, context_lens, block_size)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        q, k_cache, v_cache = rope_cache_write_triton(
            qkv, cos, sin, k_cache, v_cache, slots, q_norm=q_norm, k_norm=k_norm, eps=eps, **scales
        )
        args = (q[:, None], k_cache, v_cache, block_tables, context_lens)
        out = paged_decode_triton(
            *args, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, **scales, plan=plan
        )
        return out[:, 0], k_cache, v_cache
    tile_dim, tile_group = next_power_of_2(max(head_dim, MIN_DOT)), next_power_of_2(group)
    tile_turned = next_power_of_2(group + 1)
    # Rows that fill the chip stay whole, and the few that are cut are merged by their last programs, which spares a
    # launch: 1.5 µs at 64 rows. Else most are cut, and the second kernel is the faster one: by 1.6 µs of 15 at 8 rows,
    # by 8 of 65 at one row of 32,768 (H100).
    if counters is not None and (fill < FULL or len(cuts) * num_kv_heads > len(counters)):
        counters = None
    results = []

    def attend(k_cache: jax.Ref, v_cache: jax.Ref) -> None:
        # Where there are no norms or scales, `pieces` stands in for pointers that are not read.
        results.extend(
            triton_call(
                qkv,
                cos,
                sin,
                pieces if q_norm is None else q_norm,
                pieces if k_norm is None else k_norm,
                pieces if k_scale is None else k_scale,
                pieces if v_scale is None else v_scale,
                block_tables,
                pieces,
                counters,
                k_cache,
                v_cache,
                num_kv_heads,
                block_tables.shape[1],
                kernel=rope_decode_kernel,
                out_type=(
                    jax.ShapeDtypeStruct((num_rows, num_kv_heads * group, head_dim), qkv.dtype),
                    jax.ShapeDtypeStruct((len(pieces), num_kv_heads, group, head_dim), jnp.float32),
                    jax.ShapeDtypeStruct((len(pieces), num_kv_heads, group), jnp.float32),
                ),
                grid=(num_kv_heads, len(pieces)),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                SCALE=scale,
                SOFT_CAP=soft_cap or 0.0,
                WINDOW=window,
                EPS=eps,
                GROUP=group,
                BLOCK_SIZE=block_size,
                HEAD_DIM=head_dim,
                TILE_GROUP=tile_group,
                TILE_TURNED=tile_turned,
                TILE_HEADS=max(MIN_DOT, tile_turned),
                TILE_TOKENS=launch.tile_tokens,
                TILE_DIM=tile_dim,
                TILE_PARTS=max(1, min(16, 32 * launch.num_warps * _MERGE_ELEMENTS // (tile_group * tile_dim))),
                LINES=next_power_of_2(ceil_div(head_dim * k_cache.dtype.itemsize, 128)),
                DOT_DTYPE=dot_dtype(qkv.dtype, k_cache.dtype),
                PAIRS=k_cache.dtype == FP8,
                NORM=q_norm is not None,
                SCALED=k_scale is not None,
            )
        )

    k_cache, v_cache = update_in_place(attend, k_cache, v_cache)
    out, parts, lse = results
    if counters is None:
        out = merge_cut_rows(out, parts, lse, cuts)
    return out, k_cache, v_cache
