"""Device code of the Triton implementation: the loop over a sequence's context."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels._device import load_rows, scale_scores, slot_offsets, softmax_weights


@triton.jit
@no_type_check
def attend_piece(
    q,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    query_positions,
    k_scale,
    maximum,
    total,
    acc,
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
    MASKED: tl.constexpr,
):
    """Folds positions begin..end into the softmax; without MASKED every query sees all of them."""
    for start in range(begin, end, TILE_TOKENS):
        positions = start + tl.arange(0, TILE_TOKENS)
        loaded = (positions >= first) & (positions < end)
        offsets = slot_offsets(table_ptr, positions, loaded, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM, MASKED)
        k = load_rows(k_cache_ptr, offsets, dims, loaded, HEAD_DIM, MASKED).to(DOT_DTYPE)
        v = load_rows(v_cache_ptr, offsets, dims, loaded, HEAD_DIM, MASKED).to(DOT_DTYPE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = scale_scores(scores, k_scale, SCALE, SOFT_CAP)
        if MASKED:
            visible = loaded[None, :] & (positions[None, :] <= query_positions[:, None])
            if WINDOW > 0:
                visible = visible & (positions[None, :] > query_positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        weights, decay, maximum = softmax_weights(scores, maximum)
        total = total * decay + tl.sum(weights, 1)
        weights = weights.to(DOT_DTYPE)
        acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
    return maximum, total, acc


@triton.jit
@no_type_check
def attend_range(
    q,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    query_positions,
    k_scale,
    maximum,
    total,
    acc,
    begin,
    end,
    seen_by_all,  # positions up to here are visible to every query, but for a window
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
):
    """Folds positions begin..end into the softmax: whole tiles that every query sees without a mask, then the rest."""
    masked_from = begin
    if WINDOW == 0:
        masked_from = begin + tl.maximum(seen_by_all - begin, 0) // TILE_TOKENS * TILE_TOKENS
        maximum, total, acc = attend_piece(
            q, k_cache_ptr, v_cache_ptr, table_ptr, query_positions, k_scale, maximum, total, acc,
            begin, masked_from, first, num_kv_heads, kv_head, dims, SCALE, SOFT_CAP, WINDOW, BLOCK_SIZE, HEAD_DIM,
            TILE_TOKENS, DOT_DTYPE, False,
        )  # fmt: skip
    return attend_piece(
        q, k_cache_ptr, v_cache_ptr, table_ptr, query_positions, k_scale, maximum, total, acc,
        masked_from, end, first, num_kv_heads, kv_head, dims, SCALE, SOFT_CAP, WINDOW, BLOCK_SIZE, HEAD_DIM,
        TILE_TOKENS, DOT_DTYPE, True,
    )  # fmt: skip
