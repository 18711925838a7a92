"""Device code of `paged_decode` and `rope_paged_decode`: the loop over a piece of a row's context."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels._device import load_rows, offsets_in_blocks, scale_scores, softmax_weights

# Of two neighbouring 16-bit elements, $1, which hold two e4m3 numbers each, into `pair`: both low bytes, both high
# bytes, the first element, or the second one.
_LOW_BYTES = tl.constexpr("prmt.b32 bytes, $1, $1, 0x0020; mov.b32 {pair, rest}, bytes;")
_HIGH_BYTES = tl.constexpr("prmt.b32 bytes, $1, $1, 0x0031; mov.b32 {pair, rest}, bytes;")
_FIRST_ELEMENT = tl.constexpr("mov.b32 {pair, rest}, $1;")
_SECOND_ELEMENT = tl.constexpr("mov.b32 {rest, pair}, $1;")


@triton.jit
@no_type_check
def numbers_of_pairs(pairs, TAKE: tl.constexpr):
    """Half of the numbers that 16-bit elements hold two of, as float16.

    Shared memory hands 16-bit elements transposed to the tensor cores, single bytes it does not.
    """
    ASM: tl.constexpr = "{ .reg .b32 bytes; .reg .b16 pair, rest; " + TAKE + " cvt.rn.f16x2.e4m3x2 $0, pair; }"
    return tl.inline_asm_elementwise(ASM, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
@no_type_check
def load_pairs(ptr, offsets, dims, loaded, HEAD_DIM: tl.constexpr):
    """Rows of a float8 cache, two dims an element."""
    return load_rows(ptr.to(tl.pointer_type(tl.int16)), offsets // 2, dims, loaded, HEAD_DIM // 2, True)


@triton.jit
@no_type_check
def load_keys(ptr, offsets, dims, loaded, HEAD_DIM: tl.constexpr, DOT_DTYPE: tl.constexpr, PAIRS: tl.constexpr):
    """Keys as two tiles: with PAIRS those of `query_dims` and those of two further on, else all dims, and nothing.

    The dims of a key may be in any order that the query has too, and in this one a pair becomes two numbers of one
    tile, which takes one instruction for two.
    """
    if PAIRS:
        pairs = load_pairs(ptr, offsets, dims, loaded, HEAD_DIM)
        one = numbers_of_pairs(pairs, _FIRST_ELEMENT).to(DOT_DTYPE)
        other = numbers_of_pairs(pairs, _SECOND_ELEMENT).to(DOT_DTYPE)
    else:
        one, other = load_rows(ptr, offsets, dims, loaded, HEAD_DIM, True).to(DOT_DTYPE), 0.0
    return one, other


@triton.jit
@no_type_check
def query_dims(dims):
    """The dims of a query, two adjacent ones of every four, that meet the first of the tiles of `load_keys`."""
    return dims // 2 * 4 + dims % 2


@triton.jit
@no_type_check
def load_values(ptr, offsets, dims, loaded, HEAD_DIM: tl.constexpr, DOT_DTYPE: tl.constexpr, PAIRS: tl.constexpr):
    """Values as two tiles: with PAIRS even and odd dims, else all dims, and nothing."""
    if PAIRS:
        pairs = load_pairs(ptr, offsets, dims, loaded, HEAD_DIM)
        even = numbers_of_pairs(pairs, _LOW_BYTES).to(DOT_DTYPE)
        odd = numbers_of_pairs(pairs, _HIGH_BYTES).to(DOT_DTYPE)
    else:
        even, odd = load_rows(ptr, offsets, dims, loaded, HEAD_DIM, True).to(DOT_DTYPE), 0.0
    return even, odd


@triton.jit
@no_type_check
def load_blocks(table_ptr, begin, end, first, BLOCK_SIZE: tl.constexpr, TILE_TOKENS: tl.constexpr):
    """Of each position of the tile that starts at `begin`, the block it is in; 0 where it is not read."""
    positions = begin + tl.arange(0, TILE_TOKENS)
    return tl.load(table_ptr + positions // BLOCK_SIZE, mask=(positions >= first) & (positions < end), other=0)


@triton.jit
@no_type_check
def prefetch(pointers):
    """Asks for the 128 bytes at each pointer to come into L2, and does not wait."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
@no_type_check
def prefetch_tile(
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    begin,
    end,
    first,
    num_kv_heads,
    kv_head,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    LINES: tl.constexpr,
):
    """Asks for the tile of keys and values that starts at `begin`: LINES lines of 128 bytes a token.

    Positions that are not read stand for the newest that is. `end` > `begin`.
    """
    lines = tl.arange(0, TILE_TOKENS * LINES)
    positions = tl.minimum(tl.maximum(begin + lines // LINES, first), end - 1)
    blocks = tl.load(table_ptr + positions // BLOCK_SIZE)
    offsets = offsets_in_blocks(blocks, positions, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM)
    offsets += lines % LINES * HEAD_DIM // LINES
    prefetch(k_cache_ptr + offsets)
    prefetch(v_cache_ptr + offsets)


@triton.jit
@no_type_check
def attend_context(
    q,
    q_other,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    blocks,  # `load_blocks` of the first tile
    query_positions,  # None: those of one query, which sees all that is loaded
    k_scale,
    maximum,
    total,
    acc,
    acc_odd,
    begin,
    end,
    first,
    num_kv_heads,
    kv_head,
    dims,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Folds positions begin..end, of which those from `first` on are seen, into the softmax; returns its parts.

    `total` is [heads, 16] with equal columns, as the tensor cores make it; what comes back is one of them.
    One loop, whose every tile is masked: a second one, for the last tile alone, would begin again with nothing on its
    way. A tile's blocks are asked for an iteration before its keys and values, which wait for them.
    """
    ones = tl.full([TILE_TOKENS, total.shape[1]], 1.0, tl.float32).to(DOT_DTYPE)
    for start in range(begin, end, TILE_TOKENS):
        positions = start + tl.arange(0, TILE_TOKENS)
        loaded = (positions >= first) & (positions < end)
        offsets = offsets_in_blocks(blocks, positions, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM)
        blocks = load_blocks(table_ptr, start + TILE_TOKENS, end, first, BLOCK_SIZE, TILE_TOKENS)
        k, k_other = load_keys(k_cache_ptr, offsets, dims, loaded, HEAD_DIM, DOT_DTYPE, PAIRS)
        v, v_odd = load_values(v_cache_ptr, offsets, dims, loaded, HEAD_DIM, DOT_DTYPE, PAIRS)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if PAIRS:
            scores = tl.dot(q_other, tl.trans(k_other), scores, input_precision="ieee")
        scores = scale_scores(scores, k_scale, SCALE, SOFT_CAP)
        visible = loaded[None, :]
        if query_positions is not None:  # of several the later ones see more
            visible = visible & (positions[None, :] <= query_positions[:, None])
            if WINDOW > 0:
                visible = visible & (positions[None, :] > query_positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        weights, decay, maximum = softmax_weights(scores, maximum)
        weights = weights.to(DOT_DTYPE)
        # Summed by the tensor cores: for a sum over tokens the warps, which share them, would wait for each other.
        total = tl.dot(weights, ones, total * decay[:, None], input_precision="ieee")
        acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
        if PAIRS:
            acc_odd = tl.dot(weights, v_odd, acc_odd * decay[:, None], input_precision="ieee")
    return maximum, tl.max(total, 1), acc, acc_odd
