"""Device code of `rope_paged_decode`: `paged_decode`'s, before whose loop queries and the newest key are made."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels._device import attend_range, load_rows, load_scale, scale_scores, to_cache
from nanovllm_kernels.paged_decode.device import divided, load_piece


@triton.jit
@no_type_check
def rotated(
    qkv_ptr,
    row_offsets,
    dims,
    row_mask,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    NORM: tl.constexpr,
):
    """Dims `dims` of heads, normed over all dims if NORM and rotated by the angles of one token, in qkv's dtype."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype = qkv_ptr.dtype.element_ty
    is_first = dims < HALF
    others = tl.where(is_first, dims + HALF, dims - HALF)
    x = load_rows(qkv_ptr, row_offsets, dims, row_mask, HEAD_DIM, True).to(tl.float32)
    other = load_rows(qkv_ptr, row_offsets, others, row_mask, HEAD_DIM, True).to(tl.float32)
    in_head = dims < HEAD_DIM
    cos = tl.load(cos_ptr + dims % HALF, mask=in_head, other=0.0)[None, :]
    sin = tl.load(sin_ptr + dims % HALF, mask=in_head, other=0.0)[None, :]
    if NORM:
        whole = load_rows(qkv_ptr, row_offsets, tl.arange(0, TILE_DIM), row_mask, HEAD_DIM, True).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole, 1) / HEAD_DIM + EPS)[:, None]
        weight = tl.load(norm_ptr + dims, mask=in_head, other=0.0).to(tl.float32)[None, :]
        other_weight = tl.load(norm_ptr + others, mask=in_head, other=0.0).to(tl.float32)[None, :]
        # Rounded to the model's dtype before and after the weight, as the reference does.
        x = ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        other = ((other * scale).to(dtype).to(tl.float32) * other_weight).to(dtype).to(tl.float32)
    return tl.where(is_first[None, :], x * cos - other * sin, x * cos + other * sin).to(dtype)


@triton.jit
@no_type_check
def repeated(tile, ROWS: tl.constexpr):
    """The rows of a tile over and over, until they are ROWS."""
    TIMES: tl.constexpr = ROWS // tile.shape[0]
    copies = tl.broadcast_to(tile[None, :, :], [TIMES, tile.shape[0], tile.shape[1]])
    return tl.reshape(copies, [ROWS, tile.shape[1]])


@triton.jit
@no_type_check
def merge_pieces(
    parts_ptr,
    lse_ptr,
    begin,
    end,
    num_kv_heads,
    kv_head,
    out_ptr,  # of the row's first query head in the group
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_PARTS: tl.constexpr,
):
    """Merges a row's pieces by their log-sum-exp. Loads bypass L1, which may hold older values."""
    heads = tl.arange(0, TILE_GROUP)
    dims = tl.arange(0, TILE_DIM)
    maximum = tl.full([TILE_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([TILE_GROUP], tl.float32)
    acc = tl.zeros([TILE_GROUP, TILE_DIM], tl.float32)
    for start in range(begin, end, TILE_PARTS):
        pieces = start + tl.arange(0, TILE_PARTS)
        parts = ((pieces.to(tl.int64) * num_kv_heads + kv_head) * GROUP)[:, None] + heads[None, :]
        present = (pieces < end)[:, None] & (heads < GROUP)[None, :]
        lse = tl.load(lse_ptr + parts, mask=present, other=float("-inf"), cache_modifier=".cg")
        pointers = parts_ptr + (parts * HEAD_DIM)[:, :, None] + dims[None, None, :]
        mask = present[:, :, None] & (dims < HEAD_DIM)[None, None, :]
        values = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, tl.max(lse, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(lse - shift[None, :])
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay[:, None] + tl.sum(values * weights[:, :, None], 0)
        maximum = new_maximum
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    stored = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptr + (heads * HEAD_DIM)[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
@no_type_check
def rope_decode_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_scale_ptr,
    v_scale_ptr,
    block_tables_ptr,
    pieces_ptr,  # int32 [pieces, 5], see `plan_pieces`
    merges_ptr,  # int32 [pieces, 3], see `plan_merges`
    counters_ptr,  # int32, zero before and after; None: pieces are merged by another kernel
    k_cache_ptr,
    v_cache_ptr,
    num_kv_heads,
    table_width,
    out_ptr,  # [B, H, D]
    parts_ptr,  # float32 [pieces, K, G, D]
    lse_ptr,  # float32 [pieces, K, G]: log2 of the sum of exp2(scores)
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    EPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
):
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    row, context, begin, end, whole = load_piece(pieces_ptr, piece)
    if counters_ptr is not None:
        cut = tl.load(merges_ptr + piece * 3)
        first_piece = tl.load(merges_ptr + piece * 3 + 1)
        num_pieces = tl.load(merges_ptr + piece * 3 + 2)
    if row < 0:
        return
    newest = context - 1
    is_newest = (end == context) & (context > 0)
    first = 0  # the oldest position that is seen
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    table_ptr = block_tables_ptr + row * table_width

    members = tl.arange(0, TILE_HEADS)
    # Tensor cores take 16 rows or more: the group's heads again and again, of which the first are stored.
    heads = tl.arange(0, TILE_GROUP)
    STEP: tl.constexpr = 2 if PAIRS else 1  # of float8 the even dims lie in one tile and the odd ones in another
    dims = tl.arange(0, TILE_DIM // STEP)
    present = members < GROUP
    group_ptr = qkv_ptr + (row * num_kv_heads + kv_head) * ((GROUP + 2) * HEAD_DIM)
    cos_ptr += row * (HEAD_DIM // 2)
    sin_ptr += row * (HEAD_DIM // 2)
    k_scale = load_scale(k_scale_ptr, kv_head, SCALED)
    v_scale = load_scale(v_scale_ptr, kv_head, SCALED)
    one = tl.arange(0, 1)
    block = tl.load(table_ptr + newest // BLOCK_SIZE, mask=is_newest, other=0).to(tl.int64)
    slot = ((block * num_kv_heads + kv_head) * BLOCK_SIZE + newest % BLOCK_SIZE) * HEAD_DIM
    scores = tl.zeros([TILE_GROUP], tl.float32)
    q_odd, acc_odd = 0.0, 0.0
    for parity in tl.static_range(STEP):
        some = dims * STEP + parity
        stored = (one == 0)[:, None] & is_newest & (some < HEAD_DIM)[None, :]
        q_part = rotated(
            group_ptr, heads * HEAD_DIM, some, heads < GROUP, q_norm_ptr, cos_ptr, sin_ptr, EPS, HEAD_DIM, TILE_DIM,
            NORM,
        ).to(DOT_DTYPE)  # fmt: skip
        k = rotated(
            group_ptr + GROUP * HEAD_DIM, one, some, (one == 0) & is_newest, k_norm_ptr, cos_ptr, sin_ptr,
            EPS, HEAD_DIM, TILE_DIM, NORM,
        )  # fmt: skip
        k = to_cache(k, k_cache_ptr, k_scale)
        value_ptr = group_ptr + (GROUP + 1) * HEAD_DIM
        v = to_cache(tl.load(value_ptr + one[:, None] + some[None, :], mask=stored, other=0.0), v_cache_ptr, v_scale)
        tl.store(k_cache_ptr + slot + one[:, None] + some[None, :], k, mask=stored)
        tl.store(v_cache_ptr + slot + one[:, None] + some[None, :], v, mask=stored)
        scores += tl.sum(q_part.to(tl.float32) * k.to(DOT_DTYPE).to(tl.float32), 1)
        q_part = repeated(q_part, TILE_HEADS)
        acc_part = tl.broadcast_to(v.to(DOT_DTYPE).to(tl.float32), [TILE_HEADS, TILE_DIM // STEP])
        if parity == 0:
            q, acc = q_part, acc_part
        else:
            q_odd, acc_odd = q_part, acc_part
    # The newest token is seen by all: the softmax of it alone, which the cached ones are folded into.
    scores = tl.reshape(repeated(scores[:, None], TILE_HEADS), [TILE_HEADS])
    maximum = tl.where(is_newest, scale_scores(scores, k_scale, SCALE, SOFT_CAP), float("-inf"))
    total = tl.zeros([TILE_HEADS], tl.float32) + tl.where(is_newest, 1.0, 0.0)

    end = tl.minimum(end, newest)
    positions = tl.zeros([TILE_HEADS], tl.int32) + newest
    maximum, total, acc, acc_odd = attend_range(
        q, q_odd, k_cache_ptr, v_cache_ptr, table_ptr, positions, k_scale, maximum, total, acc, acc_odd, begin, end,
        end, first, num_kv_heads, kv_head, dims, SCALE, SOFT_CAP, WINDOW, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS, DOT_DTYPE,
        PAIRS,
    )  # fmt: skip
    out, dims = divided(acc, acc_odd, total, dims, v_scale_ptr, kv_head, TILE_DIM, PAIRS, SCALED)
    stored = present[:, None] & (dims[None, :] < HEAD_DIM)
    heads_ptr = out_ptr + (row * num_kv_heads + kv_head) * (GROUP * HEAD_DIM)
    if whole:
        target = heads_ptr + (members * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        parts = (piece.to(tl.int64) * num_kv_heads + kv_head) * GROUP + members
        tl.store(lse_ptr + parts, maximum + tl.log2(total), mask=present)
        tl.store(parts_ptr + (parts * HEAD_DIM)[:, None] + dims[None, :], out, mask=stored)
        if counters_ptr is not None:
            counter = counters_ptr + cut * num_kv_heads + kv_head
            # The barrier orders this program's stores before its release, and the acquire orders the others'
            # before what follows.
            tl.debug_barrier()
            arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if arrived == num_pieces - 1:
                merge_pieces(
                    parts_ptr, lse_ptr, first_piece, first_piece + num_pieces, num_kv_heads, kv_head, heads_ptr,
                    GROUP, HEAD_DIM, TILE_GROUP, TILE_DIM, TILE_PARTS,
                )  # fmt: skip
                tl.store(counter, 0)
