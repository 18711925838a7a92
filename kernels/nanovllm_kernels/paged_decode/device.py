"""Device code of `paged_decode`, whose pieces and last division `rope_paged_decode` shares."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels._device import load_rows, load_scale
from nanovllm_kernels.paged_decode.attend import attend_context, load_blocks, query_dims


@triton.jit
@no_type_check
def load_piece(pieces_ptr, piece):
    """Of a line of `plan_pieces`: row, context, begin, end, and whether it is all of the row."""
    row = tl.load(pieces_ptr + piece * 8).to(tl.int64)
    context = tl.load(pieces_ptr + piece * 8 + 1)
    begin = tl.load(pieces_ptr + piece * 8 + 2)
    end = tl.load(pieces_ptr + piece * 8 + 3)
    whole = tl.load(pieces_ptr + piece * 8 + 4)
    return row, context, begin, end, whole


@triton.jit
@no_type_check
def divided(
    acc,
    acc_odd,
    total,
    dims,
    v_scale_ptr,
    kv_head,
    TILE_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """What is left of the softmax, and its dims in order; what has seen no token has a total of 0 and gives zeros."""
    if PAIRS:
        acc = tl.interleave(acc, acc_odd)
        dims = tl.arange(0, TILE_DIM)
    return acc * (load_scale(v_scale_ptr, kv_head, SCALED) / tl.where(total > 0, total, 1.0))[:, None], dims


@triton.jit
@no_type_check
def decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    pieces_ptr,  # int32 [pieces, 8], see `plan_pieces`
    k_scale_ptr,
    v_scale_ptr,
    num_kv_heads,
    table_width,
    out_ptr,  # [B, Q, H, D]; rows that are cut are left to the merge
    parts_ptr,  # float32 [pieces, K, Q * G, D]
    lse_ptr,  # float32 [pieces, K, Q * G]: log2 of the sum of exp2(scores)
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    SCALED: tl.constexpr,
):
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    row, context, begin, end, whole = load_piece(pieces_ptr, piece)
    if row < 0:
        return
    first = 0  # the oldest position that any query sees
    if WINDOW > 0:
        first = tl.maximum(context - (QUERIES - 1) - WINDOW, 0)
    table_ptr = block_tables_ptr + row * table_width
    blocks = load_blocks(table_ptr, begin, end, first, BLOCK_SIZE, TILE_TOKENS)

    members = tl.arange(0, TILE_HEADS)  # query i of head g of the group is member i * GROUP + g
    STEP: tl.constexpr = 2 if PAIRS else 1  # of float8 half the dims lie in one tile and half in another
    dims = tl.arange(0, TILE_DIM // STEP)
    present = members < QUERIES * GROUP
    query_positions = context - QUERIES + members // GROUP if QUERIES > 1 else None
    heads = ((row * QUERIES + members // GROUP) * num_kv_heads + kv_head) * GROUP + members % GROUP
    q_dims = query_dims(dims) if PAIRS else dims
    q = load_rows(q_ptr, heads * HEAD_DIM, q_dims, present, HEAD_DIM, True).to(DOT_DTYPE)
    q_other, acc_odd = 0.0, 0.0
    if PAIRS:
        q_other = load_rows(q_ptr, heads * HEAD_DIM, q_dims + 2, present, HEAD_DIM, True).to(DOT_DTYPE)
        acc_odd = tl.zeros([TILE_HEADS, TILE_DIM // STEP], tl.float32)
    k_scale = load_scale(k_scale_ptr, kv_head, SCALED)
    maximum = tl.full([TILE_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_HEADS, 16], tl.float32)
    acc = tl.zeros([TILE_HEADS, TILE_DIM // STEP], tl.float32)
    maximum, total, acc, acc_odd = attend_context(
        q, q_other, k_cache_ptr, v_cache_ptr, table_ptr, blocks, query_positions, k_scale, maximum, total, acc, acc_odd,
        begin, end, first, num_kv_heads, kv_head, dims, SCALE, SOFT_CAP, WINDOW, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS,
        DOT_DTYPE, PAIRS,
    )  # fmt: skip
    out, dims = divided(acc, acc_odd, total, dims, v_scale_ptr, kv_head, TILE_DIM, PAIRS, SCALED)
    stored = present[:, None] & (dims[None, :] < HEAD_DIM)
    if whole:
        target = (heads * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        parts = (piece.to(tl.int64) * num_kv_heads + kv_head) * (QUERIES * GROUP) + members
        tl.store(lse_ptr + parts, maximum + tl.log2(total), mask=present)
        tl.store(parts_ptr + (parts * HEAD_DIM)[:, None] + dims[None, :], out, mask=stored)


@triton.jit
@no_type_check
def merge_kernel(
    parts_ptr,
    lse_ptr,
    cuts_ptr,  # int32 [cuts, 3], see `plan_pieces`
    out_ptr,
    num_kv_heads,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_PARTS: tl.constexpr,
):
    cut = tl.program_id(0)
    kv_head = tl.program_id(1)
    member = tl.program_id(2)
    row = tl.load(cuts_ptr + 3 * cut).to(tl.int64)
    begin = tl.load(cuts_ptr + 3 * cut + 1)
    num_pieces = tl.load(cuts_ptr + 3 * cut + 2)
    end = begin + num_pieces
    if num_pieces == 0:
        return
    dims = tl.arange(0, TILE_DIM)
    maximum = float("-inf")
    total = 0.0
    acc = tl.zeros([TILE_DIM], tl.float32)
    for start in range(begin, end, TILE_PARTS):
        pieces = start + tl.arange(0, TILE_PARTS)
        parts = (pieces.to(tl.int64) * num_kv_heads + kv_head) * (QUERIES * GROUP) + member
        lse = tl.load(lse_ptr + parts, mask=pieces < end, other=float("-inf"))
        present = (pieces < end)[:, None] & (dims[None, :] < HEAD_DIM)
        values = tl.load(parts_ptr + (parts * HEAD_DIM)[:, None] + dims[None, :], mask=present, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(lse, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(lse - shift)
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(values * weights[:, None], 0)
        maximum = new_maximum
    out = acc / tl.where(total > 0, total, 1.0)
    head = ((row * QUERIES + member // GROUP) * num_kv_heads + kv_head) * GROUP + member % GROUP
    tl.store(out_ptr + head * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
