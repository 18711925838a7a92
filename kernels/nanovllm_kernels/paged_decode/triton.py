"""Triton implementation: one program a row, KV head and split of the context; a second kernel merges splits.

The query heads of a KV head share every key and value that is read. A split covers an equal part of its own
row's context, so one long row is spread over the chip whatever the others do; the method is Flash-Decoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import Target, current_target, triton_call
from nanovllm_kernels._device import (
    ceil_div,
    dot_dtype,
    load_rows,
    next_power_of_2,
    online_softmax,
    scaled_scores,
    slot_offsets,
)

# tl.dot maps to tensor cores with 16 rows or more; smaller query groups are padded up to that.
_MIN_DOT = 16
_TILE_BYTES = 16 * 1024  # of K, and as many of V, in flight for each stage
_MAX_SPLITS = 64
# Programs for each multiprocessor that fill the memory system: two are resident, and a second wave evens out
# unequal rows.
_PROGRAMS_PER_MULTIPROCESSOR = 4


@dataclass(frozen=True)
class Launch:
    """Launch parameters of the split kernel; tile_tokens, num_warps and num_stages follow shapes and GPU."""

    tile_tokens: int
    num_splits: int
    num_warps: int
    num_stages: int


def launch_parameters(
    target: Target, *, num_rows: int, num_kv_heads: int, max_context: int, head_dim: int, itemsize: int
) -> Launch:
    """Reasoned, not yet tuned: K and V tiles of 16 KB, three in flight where shared memory allows."""
    row_bytes = next_power_of_2(max(head_dim, _MIN_DOT)) * itemsize
    tile_tokens = max(_MIN_DOT, min(128, _TILE_BYTES // row_bytes))
    wanted = target.multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR // (num_rows * num_kv_heads)
    useful = ceil_div(max_context, tile_tokens)
    num_splits = min(_MAX_SPLITS, next_power_of_2(min(wanted, useful)))
    roomy = target.shared_bytes >= 160 * 1024
    return Launch(tile_tokens, num_splits, num_warps=4, num_stages=3 if roomy else 2)


@triton.jit
@no_type_check
def decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    context_lens_ptr,
    out_ptr,  # [B, H, D], or with splits float32 [B, H, splits, D]
    lse_ptr,  # with splits float32 [B, H, splits]: log2 of the sum of exp2(scores); else unused
    num_kv_heads,
    table_width,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    context = tl.load(context_lens_ptr + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    # Tiles start at multiples of TILE_TOKENS, so a split is a range of whole tiles.
    first_tile = first // TILE_TOKENS
    num_tiles = tl.cdiv(context, TILE_TOKENS) - first_tile
    split_tiles = tl.cdiv(num_tiles, num_splits)
    begin = (first_tile + split * split_tiles) * TILE_TOKENS
    end = tl.minimum(context, begin + split_tiles * TILE_TOKENS)

    group = tl.arange(0, TILE_HEADS)
    dims = tl.arange(0, TILE_DIM)
    heads = (row * num_kv_heads + kv_head) * GROUP + group
    q = load_rows(q_ptr, heads * HEAD_DIM, dims, group < GROUP, HEAD_DIM, True).to(DOT_DTYPE)
    maximum = tl.full([TILE_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_HEADS], tl.float32)
    acc = tl.zeros([TILE_HEADS, TILE_DIM], tl.float32)
    table_ptr = block_tables_ptr + row * table_width
    for start in range(begin, end, TILE_TOKENS):
        positions = start + tl.arange(0, TILE_TOKENS)
        visible = (positions >= first) & (positions < end)
        offsets = slot_offsets(table_ptr, positions, visible, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM, True)
        k = load_rows(k_cache_ptr, offsets, dims, visible, HEAD_DIM, True).to(DOT_DTYPE)
        v = load_rows(v_cache_ptr, offsets, dims, visible, HEAD_DIM, True).to(DOT_DTYPE)
        scores = scaled_scores(q, k, SCALE, SOFT_CAP)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        maximum, total, acc = online_softmax(scores, v, maximum, total, acc)

    # A row or split without tokens has a total of 0 and gives zeros.
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    stored = (group < GROUP)[:, None] & (dims[None, :] < HEAD_DIM)
    if SPLIT:
        parts = heads * num_splits + split
        tl.store(lse_ptr + parts, maximum + tl.log2(total), mask=group < GROUP)
        tl.store(out_ptr + (parts * HEAD_DIM)[:, None] + dims[None, :], out, mask=stored & (begin < end))
    else:
        target = (heads * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
@no_type_check
def merge_kernel(
    parts_ptr,  # float32 [B, H, splits, D], unwritten where lse is -inf
    lse_ptr,  # float32 [B, H, splits]
    out_ptr,  # [B, H, D]
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, NUM_SPLITS)
    dims = tl.arange(0, TILE_DIM)
    lse = tl.load(lse_ptr + head * NUM_SPLITS + splits)
    maximum = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(maximum == float("-inf"), 0.0, maximum))
    total = tl.sum(weights, 0)
    present = (lse > float("-inf"))[:, None] & (dims[None, :] < HEAD_DIM)
    parts = parts_ptr + ((head * NUM_SPLITS + splits) * HEAD_DIM)[:, None] + dims[None, :]
    out = tl.sum(tl.load(parts, mask=present, other=0.0) * weights[:, None], 0)
    out = out / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def paged_decode_triton(
    q: Float[Array, "B H D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> Float[Array, "B H D"]:
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    table_width = block_tables.shape[1]
    max_context = table_width * block_size
    if sliding_window is not None:
        max_context = min(max_context, sliding_window)
    launch = launch_parameters(
        current_target(),
        num_rows=num_rows,
        num_kv_heads=num_kv_heads,
        max_context=max_context,
        head_dim=head_dim,
        itemsize=jnp.promote_types(q.dtype, k_cache.dtype).itemsize,
    )
    splits = launch.num_splits
    tile_dim = next_power_of_2(max(head_dim, _MIN_DOT))
    result = jax.ShapeDtypeStruct(q.shape, q.dtype)
    parts = jax.ShapeDtypeStruct((num_rows, num_heads, splits, head_dim), jnp.float32)
    lse = jax.ShapeDtypeStruct((num_rows, num_heads, splits), jnp.float32)
    out, lse = triton_call(
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        num_kv_heads=num_kv_heads,
        table_width=table_width,
        kernel=decode_kernel,
        out_type=(parts if splits > 1 else result, lse),
        grid=(num_rows, num_kv_heads, splits),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        SCALE=scale,
        SOFT_CAP=soft_cap or 0.0,
        WINDOW=sliding_window or 0,
        GROUP=num_heads // num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        TILE_HEADS=max(_MIN_DOT, next_power_of_2(num_heads // num_kv_heads)),
        TILE_TOKENS=launch.tile_tokens,
        TILE_DIM=tile_dim,
        DOT_DTYPE=dot_dtype(q.dtype, k_cache.dtype),
        SPLIT=splits > 1,
    )
    if splits == 1:
        return out
    return triton_call(
        out,
        lse,
        kernel=merge_kernel,
        out_type=result,
        grid=(num_rows * num_heads,),
        num_warps=4,
        num_stages=1,
        HEAD_DIM=head_dim,
        TILE_DIM=tile_dim,
        NUM_SPLITS=splits,
    )
