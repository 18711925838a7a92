"""Triton implementation: one program a tile of queries and KV head, FlashAttention-2 over paged K and V.

The G query heads of a KV head lie beside each other in a tile's rows (row m is query m // G, head m % G), so
K and V are read once for all of them. Programs find their sequence by binary search: tiles of sequence s
start at cu_q_lens[s] // TILE_QUERIES + s, which leaves each sequence at least as many programs as it has
tiles, needs no other kernel first, and bounds the grid by the shapes alone.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import Target, current_target, triton_call
from nanovllm_kernels._device import dot_dtype, dot_itemsize, load_rows, load_scale
from nanovllm_kernels._integers import next_power_of_2
from nanovllm_kernels.ragged_prefill.attend import attend_range

_MIN_DOT = 16  # rows and columns that tl.dot needs for tensor cores


@dataclass(frozen=True)
class Launch:
    """Launch parameters: rows of a tile of queries (times G), tokens of a tile of K and V."""

    tile_rows: int
    tile_tokens: int
    num_warps: int
    num_stages: int


def launch_parameters(target: Target, *, num_tokens: int, group: int, head_dim: int, itemsize: int) -> Launch:
    """Measured on an H200 at D=128 in 16 bits, else reasoned from register and shared memory counts.

    In 16 bits: 128 rows over 4 warps, so that one warpgroup takes each wgmma over two tiles of 64 rows, beat the same
    over 8 warps by 22 to 37%. Exact float32 products run on the ordinary cores, where larger
    tiles spill registers. Small buckets get small tiles, so that decode rows waste less.
    """
    dim = next_power_of_2(max(head_dim, _MIN_DOT))
    roomy = target.shared_bytes >= 160 * 1024
    if itemsize == 4:
        most_rows, tile_tokens, num_warps, stages = (16, 32, 8, 2) if dim <= 128 else (32, 16, 8, 2)
    elif dim <= 128:
        most_rows, tile_tokens, num_warps, stages = (128, 64, 4, 3) if roomy else (128, 64, 4, 2)
    else:
        most_rows, tile_tokens, num_warps, stages = (128, 32, 8, 2) if roomy else (64, 32, 4, 2)
    rows = max(_MIN_DOT, min(most_rows, next_power_of_2(num_tokens * group)))
    if itemsize < 4 and rows < 128:
        num_warps = 4
    return Launch(rows, tile_tokens, num_warps, stages)


@triton.jit
@no_type_check
def prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    cu_q_lens_ptr,
    context_lens_ptr,
    k_scale_ptr,
    v_scale_ptr,
    num_tokens,
    num_seqs,
    num_kv_heads,
    table_width,
    out_ptr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
):
    # Later tiles of a sequence see more keys: they start first, so that the short ones fill the last wave.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    # The last sequence whose first tile is not past this one. The padding behind the last sequence counts as
    # one more, from cu_q_lens[S] to T.
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high + 1) // 2
        starts_before = tl.load(cu_q_lens_ptr + middle) // TILE_QUERIES + middle <= tile
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, middle - 1)
    seq = low
    q_begin = tl.load(cu_q_lens_ptr + seq)
    is_padding = seq == num_seqs
    q_end = tl.load(cu_q_lens_ptr + seq + 1, mask=seq < num_seqs, other=0)
    q_end = tl.where(is_padding, num_tokens, q_end)
    q_len = q_end - q_begin
    first_query = (tile - q_begin // TILE_QUERIES - seq) * TILE_QUERIES
    if first_query >= q_len:
        return

    rows = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, TILE_DIM)
    queries = first_query + rows // GROUP
    row_mask = (rows < TILE_QUERIES * GROUP) & (queries < q_len)
    heads = ((q_begin + queries).to(tl.int64) * num_kv_heads + kv_head) * GROUP + rows % GROUP
    target = out_ptr + (heads * HEAD_DIM)[:, None] + dims[None, :]
    stored = row_mask[:, None] & (dims[None, :] < HEAD_DIM)
    if is_padding:
        tl.store(target, tl.zeros([TILE_ROWS, TILE_DIM], out_ptr.dtype.element_ty), mask=stored)
        return

    first_position = tl.load(context_lens_ptr + seq) - q_len + first_query
    end = first_position + tl.minimum(TILE_QUERIES, q_len - first_query)  # past the newest key seen
    q_positions = first_position + rows // GROUP
    q = load_rows(q_ptr, heads * HEAD_DIM, dims, row_mask, HEAD_DIM, True).to(DOT_DTYPE)
    table_ptr = block_tables_ptr + seq.to(tl.int64) * table_width
    k_scale = load_scale(k_scale_ptr, kv_head, SCALED)
    maximum = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, TILE_DIM], tl.float32)
    first = 0  # the oldest position that any query sees
    if WINDOW > 0:
        first = tl.maximum(first_position - WINDOW + 1, 0)
    maximum, total, acc = attend_range(
        q, k_cache_ptr, v_cache_ptr, table_ptr, q_positions, k_scale, maximum, total, acc,
        first // TILE_TOKENS * TILE_TOKENS, end, first_position + 1, first, num_kv_heads, kv_head, dims, SCALE,
        SOFT_CAP, WINDOW, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS, DOT_DTYPE,
    )  # fmt: skip
    out = acc * (load_scale(v_scale_ptr, kv_head, SCALED) / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=stored)


def ragged_prefill_triton(
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
    num_seqs, table_width = block_tables.shape
    group = num_heads // num_kv_heads
    launch = launch_parameters(
        current_target(),
        num_tokens=num_tokens,
        group=group,
        head_dim=head_dim,
        itemsize=dot_itemsize(q.dtype, k_cache.dtype),
    )
    tile_rows = max(launch.tile_rows, next_power_of_2(group))
    tile_queries = tile_rows // group
    return triton_call(
        q,
        k_cache,
        v_cache,
        block_tables,
        cu_q_lens,
        context_lens,
        context_lens if k_scale is None else k_scale,  # not read where there are no scales
        context_lens if v_scale is None else v_scale,
        num_tokens,
        num_seqs,
        num_kv_heads,
        table_width,
        kernel=prefill_kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_tokens // tile_queries + num_seqs + 1, num_kv_heads),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        SCALE=scale,
        SOFT_CAP=soft_cap or 0.0,
        WINDOW=sliding_window or 0,
        GROUP=group,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        TILE_QUERIES=tile_queries,
        TILE_ROWS=tile_rows,
        TILE_TOKENS=launch.tile_tokens,
        TILE_DIM=next_power_of_2(max(head_dim, _MIN_DOT)),
        DOT_DTYPE=dot_dtype(q.dtype, k_cache.dtype),
        SCALED=k_scale is not None,
    )
