"""Attention of a decode step as a phase of the layer's kernel: rotation, cache write and softmax over pieces.

Keys and values that are in the cache already do not depend on this layer's products: a program loads its first tile of
them before it waits. The new token's key and value never come from the cache; the piece that ends with it starts its
softmax with them and writes them for the steps to come.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels._device import load_rows, scale_scores, slot_offsets, softmax_weights


@triton.jit
@no_type_check
def load_cached(
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    row,
    start,
    end,
    table_width,
    num_kv_heads,
    kv_head,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    """Keys and values at positions `start` to `end` of a row, [TILE_TOKENS, D] each, zero past the end."""
    positions = start + tl.arange(0, TILE_TOKENS)
    visible = positions < end
    dims = tl.arange(0, HEAD_DIM)
    offsets = slot_offsets(
        tables_ptr + row * table_width, positions, visible, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM, True
    )
    k = load_rows(k_cache_ptr, offsets, dims, visible, HEAD_DIM, True)
    v = load_rows(v_cache_ptr, offsets, dims, visible, HEAD_DIM, True)
    return k, v


@triton.jit
@no_type_check
def open_item(
    item,
    num_items,
    pieces_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    table_width,
    num_kv_heads,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    """All that an item, a piece of a row's context for one KV head, needs and that no other program writes.

    Row, context, cached positions from where to where, whether the newest token is in the piece and whether it is all
    of the row; rotary angles; the first tile of keys and values. There is nothing in an item past the last.
    """
    piece_ptr = pieces_ptr + item // num_kv_heads * 5
    there = item < num_items
    row = tl.maximum(tl.load(piece_ptr, mask=there, other=0), 0)
    context = tl.load(piece_ptr + 1, mask=there, other=0)
    begin = tl.load(piece_ptr + 2, mask=there, other=0)
    end = tl.load(piece_ptr + 3, mask=there, other=0)
    whole = tl.load(piece_ptr + 4, mask=there, other=0)
    newest = (end == context) & (context > 0)
    end = tl.minimum(end, context - 1)
    angles = row * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM) % (HEAD_DIM // 2)
    cos, sin = tl.load(cos_ptr + angles)[None, :], tl.load(sin_ptr + angles)[None, :]
    k, v = load_cached(
        k_cache_ptr, v_cache_ptr, tables_ptr, row.to(tl.int64), begin, end, table_width, num_kv_heads,
        item % num_kv_heads, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS,
    )  # fmt: skip
    return row, context, begin, end, newest, whole, cos, sin, k, v


@triton.jit
@no_type_check
def norm_weights(norm_ptr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """Weights of a norm over D, [1, D], and those of the other half's elements."""
    if NORM:
        dims = tl.arange(0, HEAD_DIM)
        weight = tl.load(norm_ptr + dims).to(tl.float32)[None, :]
        other = tl.load(norm_ptr + (dims + HEAD_DIM // 2) % HEAD_DIM).to(tl.float32)[None, :]
    else:
        weight, other = 0.0, 0.0
    return weight, other


@triton.jit
@no_type_check
def rotated(
    ptr,
    head_rows,
    present,
    norm,
    cos,
    sin,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
):
    """Heads at `head_rows` normed, if there is a norm, and rotated: [heads, D] in the model's dtype."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, HEAD_DIM)
    partners = (dims + HALF) % HEAD_DIM  # the other half's element, which the rotation mixes in
    mask = present[:, None] & (dims < HEAD_DIM)[None, :]
    x = tl.load(ptr + head_rows[:, None] + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    other = tl.load(ptr + head_rows[:, None] + partners[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    other = other.to(tl.float32)
    if NORM:
        weight, other_weight = norm
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + EPS)[:, None]
        # Rounded to the model's dtype before and after the weight, as the reference does.
        x = ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        other = ((other * scale).to(dtype).to(tl.float32) * other_weight).to(dtype).to(tl.float32)
    sign = tl.where(dims < HALF, -1.0, 1.0)[None, :]
    return (x * cos + sign * other * sin).to(dtype)


@triton.jit
@no_type_check
def fold(q, k, v, start, first, end, maximum, total, acc, SCALE: tl.constexpr, TILE_TOKENS: tl.constexpr):
    """Folds a tile of cached tokens, of which those from `first` to `end` are seen, into the softmax."""
    positions = start + tl.arange(0, TILE_TOKENS)
    visible = (positions >= first) & (positions < end)
    scores = scale_scores(tl.dot(q, tl.trans(k)), 1.0, SCALE, 0.0)
    scores = tl.where(visible[None, :], scores, float("-inf"))
    weights, decay, maximum, total = softmax_weights(scores, maximum, total)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
    return maximum, total, acc


@triton.jit
@no_type_check
def merge_pieces(
    parts_ptr,
    lse_ptr,
    out_ptr,
    row,
    kv_head,
    begin,
    end,
    num_kv_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Output of one row's query group, from its pieces `begin` to `end`."""
    dims = tl.arange(0, HEAD_DIM)
    for member in tl.static_range(GROUP):
        maximum = float("-inf")
        total = 0.0
        acc = tl.zeros([HEAD_DIM], tl.float32)
        for start in range(begin, end, PIECES):
            pieces = start + tl.arange(0, PIECES)
            heads = (pieces * num_kv_heads + kv_head) * GROUP + member
            there = pieces < end
            lse = tl.load(lse_ptr + heads, mask=there, other=float("-inf"), cache_modifier=".cg")
            part_ptrs = parts_ptr + (heads * HEAD_DIM)[:, None] + dims[None, :]
            parts = tl.load(part_ptrs, mask=there[:, None], other=0.0, cache_modifier=".cg")
            new_maximum = tl.maximum(maximum, tl.max(lse, 0))
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weights = tl.exp2(lse - shift)
            decay = tl.exp2(maximum - shift)
            total = total * decay + tl.sum(weights, 0)
            acc = acc * decay + tl.sum(parts * weights[:, None], 0)
            maximum = new_maximum
        out = acc / tl.where(total > 0, total, 1.0)
        head = (row * num_kv_heads + kv_head) * GROUP + member
        tl.store(out_ptr + head * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty))


@triton.jit
@no_type_check
def attend(
    opened,  # the program's first item, see `open_item`
    q_norm,
    k_norm,
    qkv_ptr,  # [B, K, G + 2, D], before norm and rotation
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    pieces_ptr,  # int32 [pieces, 5], see `paged_decode.triton.plan_pieces`
    rows_ptr,  # int32 [B, 2], likewise
    num_items,
    out_ptr,  # [B, H, D]
    parts_ptr,  # float32 [pieces, H, D]
    lse_ptr,  # float32 [pieces, H]: log2 of the sum of exp2(scores)
    counters_ptr,
    num_kv_heads,
    table_width,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PIECES: tl.constexpr,
    NORM: tl.constexpr,
):
    """All items of this program. The last program at a row that is cut merges its pieces."""
    members = tl.arange(0, TILE_HEADS)
    one = tl.arange(0, 1)
    dims = tl.arange(0, HEAD_DIM)
    row, context, begin, end, newest, whole, cos, sin, k, v = opened
    for item in tl.range(tl.program_id(0), num_items, PROGRAMS, num_stages=1):
        kv_head = item % num_kv_heads
        piece = item // num_kv_heads
        first = 0
        if WINDOW > 0:
            first = tl.maximum(context - WINDOW, 0)

        group_row = (row * num_kv_heads + kv_head) * (GROUP + 2)
        present = members < GROUP
        q = rotated(qkv_ptr, (group_row + members) * HEAD_DIM, present, q_norm, cos, sin, EPS, HEAD_DIM, NORM)
        new_k = rotated(
            qkv_ptr, (group_row + GROUP + one) * HEAD_DIM, one == 0, k_norm, cos, sin, EPS, HEAD_DIM, NORM
        )
        new_v = tl.load(qkv_ptr + (group_row + GROUP + 1) * HEAD_DIM + dims, cache_modifier=".cg")[None, :]
        if newest:
            position = context - 1
            block = tl.load(tables_ptr + row.to(tl.int64) * table_width + position // BLOCK_SIZE).to(tl.int64)
            slot = (block * num_kv_heads + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
            tl.store(k_cache_ptr + slot * HEAD_DIM + dims[None, :], new_k)
            tl.store(v_cache_ptr + slot * HEAD_DIM + dims[None, :], new_v)
        score = scale_scores(tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1), 1.0, SCALE, 0.0)
        maximum = tl.where(newest, score, float("-inf"))
        total = tl.zeros([TILE_HEADS], tl.float32) + tl.where(newest, 1.0, 0.0)
        acc = tl.zeros([TILE_HEADS, HEAD_DIM], tl.float32) + tl.where(newest, new_v.to(tl.float32), 0.0)

        maximum, total, acc = fold(q, k, v, begin, first, end, maximum, total, acc, SCALE, TILE_TOKENS)
        for start in tl.range(begin + TILE_TOKENS, end, TILE_TOKENS, num_stages=STAGES):
            k, v = load_cached(
                k_cache_ptr, v_cache_ptr, tables_ptr, row.to(tl.int64), start, end, table_width, num_kv_heads, kv_head,
                BLOCK_SIZE, HEAD_DIM, TILE_TOKENS,
            )  # fmt: skip
            maximum, total, acc = fold(q, k, v, start, first, end, maximum, total, acc, SCALE, TILE_TOKENS)
        # What has seen no token has a total of 0 and gives zeros.
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        if whole:
            heads = (row * num_kv_heads + kv_head) * GROUP + members
            targets = out_ptr + (heads * HEAD_DIM)[:, None] + dims[None, :]
            tl.store(targets, out.to(out_ptr.dtype.element_ty), mask=present[:, None])
        else:
            part_heads = (piece * num_kv_heads + kv_head) * GROUP + members
            tl.store(lse_ptr + part_heads, maximum + tl.log2(total), mask=present)
            tl.store(parts_ptr + (part_heads * HEAD_DIM)[:, None] + dims[None, :], out, mask=present[:, None])
            tl.debug_barrier()
            first_piece = tl.load(rows_ptr + 2 * row)
            num_pieces = tl.load(rows_ptr + 2 * row + 1)
            counter_ptr = counters_ptr + row * num_kv_heads + kv_head
            arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
            if arrived == num_pieces - 1:
                merge_pieces(
                    parts_ptr, lse_ptr, out_ptr, row, kv_head, first_piece, first_piece + num_pieces,
                    num_kv_heads, GROUP, HEAD_DIM, PIECES,
                )  # fmt: skip
                tl.store(counter_ptr, 0)
        row, context, begin, end, newest, whole, cos, sin, k, v = open_item(
            item + PROGRAMS, num_items, pieces_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, table_width,
            num_kv_heads, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS,
        )  # fmt: skip
