"""Device code of `rope_paged_decode`: `paged_decode`'s, before whose loop queries and the newest key are made."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels._device import load_rows, load_scale, offsets_in_blocks, scale_scores, to_cache
from nanovllm_kernels.paged_decode.attend import attend_context, load_blocks, prefetch_tile
from nanovllm_kernels.paged_decode.device import divided, load_piece


@triton.jit
@no_type_check
def load_heads(
    qkv_ptr, heads, dims, q_norm_ptr, k_norm_ptr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr
):
    """Dims `dims` of a group's query heads and, after them, of its key, and of their norms' weights."""
    x = load_rows(qkv_ptr, heads * HEAD_DIM, dims, heads <= GROUP, HEAD_DIM, True)
    weight = 1.0
    if NORM:
        in_head = dims < HEAD_DIM
        q_weight = tl.load(q_norm_ptr + dims, mask=in_head, other=0.0)
        k_weight = tl.load(k_norm_ptr + dims, mask=in_head, other=0.0)
        weight = tl.where((heads < GROUP)[:, None], q_weight[None, :], k_weight[None, :])
    return x, weight


@triton.jit
@no_type_check
def normed(x, weight, scale):
    """Rounded to the model's dtype before and after the weight, as the reference does."""
    return ((x.to(tl.float32) * scale).to(x.dtype) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
@no_type_check
def even_and_odd(tile):
    """A tile's columns with even and with odd numbers."""
    return tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))


@triton.jit
@no_type_check
def first_and_last_of_four(tile):
    """Of each four columns the first two and the last two, as `load_keys` has the dims of float8."""
    fours = tl.reshape(tile, [tile.shape[0], tile.shape[1] // 4, 2, 2])
    first, last = tl.split(tl.permute(fours, (0, 1, 3, 2)))
    half: tl.constexpr = tile.shape[1] // 2
    return tl.reshape(first, [tile.shape[0], half]), tl.reshape(last, [tile.shape[0], half])


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
    pieces_ptr,  # int32 [pieces, 8], see `plan_pieces`
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
    TILE_TURNED: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    LINES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
):
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    row, context, begin, end, whole = load_piece(pieces_ptr, piece)
    if counters_ptr is not None:
        cut = tl.load(pieces_ptr + piece * 8 + 5)
        first_piece = tl.load(pieces_ptr + piece * 8 + 6)
        num_pieces = tl.load(pieces_ptr + piece * 8 + 7)
    if row < 0:
        return
    newest = context - 1
    is_newest = (end == context) & (context > 0)
    end = tl.minimum(end, newest)
    first = 0  # the oldest position that is seen
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)

    # All loads but those of the cache, before anything waits: a warp that waits for a sum asks for nothing more.
    table_ptr = block_tables_ptr + row * table_width
    blocks = load_blocks(table_ptr, begin, end, first, BLOCK_SIZE, TILE_TOKENS)
    block = tl.load(table_ptr + newest // BLOCK_SIZE, mask=is_newest, other=0)
    HALF: tl.constexpr = HEAD_DIM // 2
    heads = tl.arange(0, TILE_TURNED)  # the group's queries, then its key
    dims = tl.arange(0, TILE_DIM)
    in_head = dims < HEAD_DIM
    is_first = dims < HALF
    others = tl.where(is_first, dims + HALF, dims - HALF)
    qkv_ptr += (row * num_kv_heads + kv_head) * ((GROUP + 2) * HEAD_DIM)
    x, weight = load_heads(qkv_ptr, heads, dims, q_norm_ptr, k_norm_ptr, GROUP, HEAD_DIM, NORM)
    other, other_weight = load_heads(qkv_ptr, heads, others, q_norm_ptr, k_norm_ptr, GROUP, HEAD_DIM, NORM)
    stored = (in_head & is_newest)[None, :]
    v = tl.load(qkv_ptr + (GROUP + 1) * HEAD_DIM + dims[None, :], mask=stored, other=0.0)
    cos = tl.load(cos_ptr + row * HALF + dims % HALF, mask=in_head, other=0.0)[None, :]
    sin = tl.load(sin_ptr + row * HALF + dims % HALF, mask=in_head, other=0.0)[None, :]
    k_scale = load_scale(k_scale_ptr, kv_head, SCALED)
    v_scale = load_scale(v_scale_ptr, kv_head, SCALED)
    if end > begin:  # memory would be idle while queries are made
        prefetch_tile(
            k_cache_ptr, v_cache_ptr, table_ptr, begin, end, first, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM,
            TILE_TOKENS, LINES,
        )  # fmt: skip

    if NORM:
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / HEAD_DIM + EPS)[:, None]
        x, other = normed(x, weight, scale), normed(other, other_weight, scale)
    turned = x.to(tl.float32) * cos + other.to(tl.float32) * tl.where(is_first[None, :], -sin, sin)
    turned = turned.to(x.dtype)
    k = tl.sum(tl.where((heads == GROUP)[:, None], turned.to(tl.float32), 0.0), 0)[None, :].to(x.dtype)
    k = to_cache(k, k_cache_ptr, k_scale)
    v = to_cache(v, v_cache_ptr, v_scale)
    slot = offsets_in_blocks(block, newest, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM)
    tl.store(k_cache_ptr + slot + dims[None, :], k, mask=stored)
    tl.store(v_cache_ptr + slot + dims[None, :], v, mask=stored)

    # The newest token is seen by all: the softmax of it alone, which the cached ones are folded into. Tensor cores take
    # 16 rows or more: the group's heads again and again, of which the first are stored.
    members = tl.arange(0, TILE_HEADS)
    present = members < GROUP
    turned = turned.to(DOT_DTYPE)
    scores = tl.sum(turned.to(tl.float32) * k.to(DOT_DTYPE).to(tl.float32), 1)
    scores = tl.reshape(repeated(scores[:, None], TILE_HEADS), [TILE_HEADS])
    maximum = tl.where(is_newest, scale_scores(scores, k_scale, SCALE, SOFT_CAP), float("-inf"))
    total = tl.zeros([TILE_HEADS, 16], tl.float32) + tl.where(is_newest, 1.0, 0.0)
    q = repeated(turned, TILE_HEADS)
    acc = tl.broadcast_to(v.to(DOT_DTYPE).to(tl.float32), [TILE_HEADS, TILE_DIM])
    q_other, acc_odd = 0.0, 0.0
    if PAIRS:
        q, q_other = first_and_last_of_four(q)
        acc, acc_odd = even_and_odd(acc)
        dims = tl.arange(0, TILE_DIM // 2)
    maximum, total, acc, acc_odd = attend_context(
        q, q_other, k_cache_ptr, v_cache_ptr, table_ptr, blocks, None, k_scale, maximum, total, acc, acc_odd,
        begin, end, first, num_kv_heads, kv_head, dims, SCALE, SOFT_CAP, WINDOW, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS,
        DOT_DTYPE, PAIRS,
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
