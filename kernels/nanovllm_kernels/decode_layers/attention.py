"""Attention of one row's newest token: a program takes a piece of the context for one KV head.

Keys and values that are in the cache do not depend on this layer's products: a program loads its first tile of them at
its layer's start. The newest token's key and value do not come from the cache: the piece that ends with them starts
its softmax with them, and writes them for the steps to come.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels._device import load_rows, scale_scores, slot_offsets, softmax_weights
from nanovllm_kernels.decode_layers.exchange import receive, send


@triton.jit
@no_type_check
def load_cached(
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    start,
    end,
    num_kv_heads,
    kv_head,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    """Keys and values of a tile of positions from `start` on, [TILE_TOKENS, D] each, zero from `end` on."""
    positions = start + tl.arange(0, TILE_TOKENS)
    visible = positions < end
    dims = tl.arange(0, HEAD_DIM)
    offsets = slot_offsets(table_ptr, positions, visible, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM, True)
    k = load_rows(k_cache_ptr, offsets, dims, visible, HEAD_DIM, True)
    v = load_rows(v_cache_ptr, offsets, dims, visible, HEAD_DIM, True)
    return k, v


@triton.jit
@no_type_check
def cut_context(context, WINDOW: tl.constexpr, TILE_TOKENS: tl.constexpr, MOST_PIECES: tl.constexpr):
    """The first tile of tokens that is seen, tiles a piece, and the number of pieces: at least one, and none empty."""
    first_tile = 0
    if WINDOW > 0:
        first_tile = tl.maximum(context - WINDOW, 0) // TILE_TOKENS
    tiles = (context + TILE_TOKENS - 1) // TILE_TOKENS - first_tile
    piece_tiles = tl.maximum((tiles + MOST_PIECES - 1) // MOST_PIECES, 1)
    return first_tile, piece_tiles, tl.maximum((tiles + piece_tiles - 1) // piece_tiles, 1)


@triton.jit
@no_type_check
def open_piece(
    context,
    first_tile,
    piece_tiles,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    num_kv_heads,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    NORM: tl.constexpr,
):
    """All that this program's piece needs and no other program makes; an empty piece if there is none for it.

    Cached positions from where to where, and whether the newest token is in the piece; rotary angles; weights
    of the heads' norms, and those of the other half's elements; the first tile of keys and of values.
    """
    piece = tl.program_id(0) // num_kv_heads
    begin = (first_tile + piece * piece_tiles) * TILE_TOKENS
    end = tl.minimum(context, begin + piece_tiles * TILE_TOKENS)
    newest = (end == context) & (context > 0)
    end = tl.minimum(end, context - 1)
    dims = tl.arange(0, HEAD_DIM)
    cos = tl.load(cos_ptr + dims % (HEAD_DIM // 2))[None, :]
    sin = tl.load(sin_ptr + dims % (HEAD_DIM // 2))[None, :]
    weight, other_weight = 1.0, 1.0
    if NORM:
        is_query = (tl.arange(0, TILE_HEADS) < GROUP)[:, None]
        others = (dims + HEAD_DIM // 2) % HEAD_DIM
        weight = tl.where(is_query, tl.load(q_norm_ptr + dims)[None, :], tl.load(k_norm_ptr + dims)[None, :])
        other_weight = tl.where(is_query, tl.load(q_norm_ptr + others)[None, :], tl.load(k_norm_ptr + others)[None, :])
    k, v = load_cached(
        k_cache_ptr, v_cache_ptr, table_ptr, begin, end, num_kv_heads, tl.program_id(0) % num_kv_heads, BLOCK_SIZE,
        HEAD_DIM, TILE_TOKENS,
    )  # fmt: skip
    return begin, end, newest, cos, sin, weight, other_weight, k, v


@triton.jit
@no_type_check
def receive_heads(
    qkv_words,
    kv_head,
    failed_ptr,
    most_reads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The group's query heads, its key and its value, [heads, D], and for each element the one of the other half."""
    members = tl.arange(0, TILE_HEADS)
    dims = tl.arange(0, HEAD_DIM)
    sides = tl.arange(0, 2)
    both = (dims[None, :] + sides[:, None] * (HEAD_DIM // 2)) % HEAD_DIM
    offsets = (kv_head * (GROUP + 2) + members)[None, :, None] * HEAD_DIM + both[:, None, :]
    mask = (members < GROUP + 2)[None, :, None] & ((dims >= 0)[None, :] & (sides >= 0)[:, None])[:, None, :]
    heads = receive(qkv_words + offsets, mask, failed_ptr, most_reads, THREADS)
    return tl.split(tl.permute(heads, (1, 2, 0)))


@triton.jit
@no_type_check
def normed_and_rotated(
    x,
    other,
    weight,
    other_weight,
    cos,
    sin,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    dtype: tl.constexpr,
):
    """Heads [heads, D], in the model's dtype, from float32 values and those of the other half."""
    x, other = x.to(dtype).to(tl.float32), other.to(dtype).to(tl.float32)
    if NORM:
        # Rounded to the model's dtype before and after the weight, as the reference does.
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + EPS)[:, None]
        x = ((x * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)
        other = ((other * scale).to(dtype).to(tl.float32) * other_weight.to(tl.float32)).to(dtype).to(tl.float32)
    sign = tl.where(tl.arange(0, HEAD_DIM) < HEAD_DIM // 2, -1.0, 1.0)[None, :]
    return (x * cos + sign * other * sin).to(dtype)


@triton.jit
@no_type_check
def fold(q, k, v, start, first, end, maximum, total, acc, SCALE: tl.constexpr, TILE_TOKENS: tl.constexpr):
    """Folds a tile of cached tokens, of which those from `first` to `end` are seen, into the softmax."""
    positions = start + tl.arange(0, TILE_TOKENS)
    visible = (positions >= first) & (positions < end)
    scores = scale_scores(tl.dot(q, tl.trans(k)), 1.0, SCALE, 0.0)
    scores = tl.where(visible[None, :], scores, float("-inf"))
    weights, decay, maximum = softmax_weights(scores, maximum)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
    return maximum, total, acc


@triton.jit
@no_type_check
def attend(
    opened,  # see `open_piece`
    context,
    num_pieces,
    qkv_words,
    parts_words,  # [pieces, H, D], where what the pieces make is sent
    lse_words,  # [pieces, H]: log2 of the sum of exp2(scores)
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    num_kv_heads,
    failed_ptr,
    most_reads,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The program's piece of the context for one KV head, if it has one."""
    dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
    piece, kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    if piece < num_pieces:
        begin, end, newest, cos, sin, weight, other_weight, k, v = opened
        first = 0
        if WINDOW > 0:
            first = tl.maximum(context - WINDOW, 0)
        members = tl.arange(0, TILE_HEADS)
        dims = tl.arange(0, HEAD_DIM)
        x, other = receive_heads(qkv_words, kv_head, failed_ptr, most_reads, GROUP, HEAD_DIM, TILE_HEADS, THREADS)
        q = normed_and_rotated(x, other, weight, other_weight, cos, sin, EPS, HEAD_DIM, NORM, dtype)
        new_k = tl.sum(tl.where((members == GROUP)[:, None], q.to(tl.float32), 0.0), 0)[None, :]
        new_v = tl.sum(tl.where((members == GROUP + 1)[:, None], x, 0.0), 0)[None, :]

        score = scale_scores(tl.sum(q.to(tl.float32) * new_k, 1), 1.0, SCALE, 0.0)
        maximum = tl.where(newest, score, float("-inf"))
        total = tl.zeros([TILE_HEADS], tl.float32) + tl.where(newest, 1.0, 0.0)
        acc = tl.zeros([TILE_HEADS, HEAD_DIM], tl.float32) + tl.where(newest, new_v.to(dtype).to(tl.float32), 0.0)
        maximum, total, acc = fold(q, k, v, begin, first, end, maximum, total, acc, SCALE, TILE_TOKENS)
        for start in tl.range(begin + TILE_TOKENS, end, TILE_TOKENS, num_stages=STAGES):
            k, v = load_cached(
                k_cache_ptr, v_cache_ptr, table_ptr, start, end, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM,
                TILE_TOKENS,
            )  # fmt: skip
            maximum, total, acc = fold(q, k, v, start, first, end, maximum, total, acc, SCALE, TILE_TOKENS)

        # What has seen no token has a total of 0 and gives zeros.
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        heads = (piece * num_kv_heads + kv_head) * GROUP + members
        present = members < GROUP
        send(lse_words + heads, maximum + tl.log2(total), present)
        parts = parts_words + (heads * HEAD_DIM)[:, None] + dims[None, :]
        send(parts, out, present[:, None] & (dims >= 0)[None, :])
        if newest:
            position = context - 1
            block = tl.load(table_ptr + position // BLOCK_SIZE).to(tl.int64)
            slot = ((block * num_kv_heads + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
            tl.store(k_cache_ptr + slot + dims[None, :], new_k.to(dtype))
            tl.store(v_cache_ptr + slot + dims[None, :], new_v.to(dtype))
