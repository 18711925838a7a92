"""Triton implementation: a program attends a piece of one row's context for one KV head; a second kernel merges.

The query heads of a KV head share every key and value that is read (Flash-Decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). How a row is cut into pieces is decided on the device from
all rows' lengths: pieces are about as long as what one resident program would get if all keys were dealt out evenly,
so one long row among many short ones, or one row alone, is spread over the whole chip, and equal rows are not cut.
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

from nanovllm_kernels._compat import current_target, triton_call, update_in_place
from nanovllm_kernels._device import (
    FP8,
    ceil_div,
    dot_dtype,
    high_of_pairs,
    load_rows,
    load_scale,
    low_of_pairs,
    next_power_of_2,
    scale_scores,
    slot_offsets,
    softmax_weights,
)

# tl.dot maps to tensor cores with 16 rows or more; smaller query groups are padded up to that.
MIN_DOT = 16
_TILE_BYTES = 16 * 1024  # of K, and as many of V, in flight for each stage
_MERGE_PARTS = 64  # pieces of a row that the merge reads at a time


@dataclass(frozen=True)
class Launch:
    """Launch parameters of the attention kernel.

    `programs_per_multiprocessor` is how many pieces for each multiprocessor the keys of a step are cut into.
    """

    tile_tokens: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


def launch_parameters(*, head_dim: int, itemsize: int) -> Launch:
    """Tiles of K and of V of 16 KB, two stages; `itemsize` is the cache's.

    Measured on an H200 at D=128 in 16 bits and float8; more stages or larger tiles leave fewer programs on a
    multiprocessor, and lost 4 to 15%. Two warps for float8, whose conversion then needs no exchange between more.
    """
    row_bytes = next_power_of_2(max(head_dim, MIN_DOT)) * itemsize
    tile_tokens = max(MIN_DOT, min(128, _TILE_BYTES // row_bytes))
    return Launch(tile_tokens, num_warps=2 if itemsize == 1 else 4, num_stages=2, programs_per_multiprocessor=4)


def plan_pieces(
    context_lens: Int[Array, " B"], *, window: int, tile_tokens: int, most_pieces: int
) -> tuple[Int[Array, "pieces 5"], Int[Array, "cuts 3"]]:
    """Cuts rows into pieces of whole tiles, at least one a row and at most `most_pieces` + B in all.

    Returns for each piece its row (-1 if there is no such piece), the context of the row, where the piece begins and
    ends, and whether it is all of the row; and for each row that is cut the row, its first piece and their number (0
    where there are fewer such rows). Longer pieces come first, since what starts last should be short. Plain XLA, the
    same for every layer of a step, so it runs once.
    """
    num_rows = len(context_lens)
    first_tile = jnp.maximum(context_lens - window, 0) // tile_tokens if window else jnp.zeros_like(context_lens)
    tiles = (context_lens + tile_tokens - 1) // tile_tokens - first_tile
    longest = jnp.maximum((jnp.sum(tiles) + most_pieces - 1) // most_pieces, 1)
    counts = jnp.maximum((tiles + longest - 1) // longest, 1)
    # Sums over [B, B] and [pieces, B] are one small kernel each; sorts and cumulative sums would be several.
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    whole = counts == 1
    length = (tiles + counts - 1) // counts
    earlier = (length > length[:, None]) | ((length == length[:, None]) & (rows < rows[:, None]))
    starts = jnp.sum(jnp.where(earlier, counts, 0), axis=1, dtype=jnp.int32)
    pieces = jnp.arange(num_rows + most_pieces, dtype=jnp.int32)[:, None]
    own = (pieces >= starts) & (pieces < starts + counts)
    begins = (first_tile + (pieces - starts) * length) * tile_tokens
    ends = jnp.minimum(context_lens, begins + length * tile_tokens)
    columns = [rows + 1, context_lens, begins, ends, whole]
    values = [jnp.sum(jnp.where(own, column, 0), axis=1, dtype=jnp.int32) for column in columns]
    # A row that is cut holds more than one of `most_pieces` equal parts of all tiles, so there are fewer of them.
    cuts = jnp.arange(min(num_rows, most_pieces), dtype=jnp.int32)[:, None]
    cut = ~whole & (cuts == jnp.sum(~whole & (rows < rows[:, None]), axis=1))
    cut_rows = [jnp.sum(jnp.where(cut, column, 0), axis=1, dtype=jnp.int32) for column in (rows, starts, counts)]
    return jnp.stack([values[0] - 1, *values[1:]], axis=1), jnp.stack(cut_rows, axis=1)


@triton.jit
@no_type_check
def load_halves(
    ptr,
    offsets,
    dims,
    row_mask,
    HEAD_DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows of the cache as two tiles: with PAIRS even and odd dims of float8, else all dims, and nothing."""
    if PAIRS:
        pairs_ptr = ptr.to(tl.pointer_type(tl.int16))
        pairs = load_rows(pairs_ptr, offsets // 2, dims, row_mask, HEAD_DIM // 2, MASKED)
        even, odd = low_of_pairs(pairs).to(DOT_DTYPE), high_of_pairs(pairs).to(DOT_DTYPE)
    else:
        even, odd = load_rows(ptr, offsets, dims, row_mask, HEAD_DIM, MASKED).to(DOT_DTYPE), 0.0
    return even, odd


@triton.jit
@no_type_check
def attend_piece(
    q,
    q_odd,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    query_positions,
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
    MASKED: tl.constexpr,
):
    """Folds positions begin..end into the softmax; without MASKED every query sees all of them."""
    for start in range(begin, end, TILE_TOKENS):
        positions = start + tl.arange(0, TILE_TOKENS)
        loaded = (positions >= first) & (positions < end)
        offsets = slot_offsets(table_ptr, positions, loaded, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM, MASKED)
        k, k_odd = load_halves(k_cache_ptr, offsets, dims, loaded, HEAD_DIM, DOT_DTYPE, PAIRS, MASKED)
        v, v_odd = load_halves(v_cache_ptr, offsets, dims, loaded, HEAD_DIM, DOT_DTYPE, PAIRS, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if PAIRS:
            scores = tl.dot(q_odd, tl.trans(k_odd), scores, input_precision="ieee")
        scores = scale_scores(scores, k_scale, SCALE, SOFT_CAP)
        if MASKED:
            visible = loaded[None, :] & (positions[None, :] <= query_positions[:, None])
            if WINDOW > 0:
                visible = visible & (positions[None, :] > query_positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        weights, decay, maximum, total = softmax_weights(scores, maximum, total)
        weights = weights.to(DOT_DTYPE)
        acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
        if PAIRS:
            acc_odd = tl.dot(weights, v_odd, acc_odd * decay[:, None], input_precision="ieee")
    return maximum, total, acc, acc_odd


@triton.jit
@no_type_check
def decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    pieces_ptr,  # int32 [pieces, 5], see `plan_pieces`
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
    row = tl.load(pieces_ptr + piece * 5).to(tl.int64)
    context = tl.load(pieces_ptr + piece * 5 + 1)
    begin = tl.load(pieces_ptr + piece * 5 + 2)
    end = tl.load(pieces_ptr + piece * 5 + 3)
    whole = tl.load(pieces_ptr + piece * 5 + 4)
    if row < 0:
        return
    first = 0  # the oldest position that any query sees
    if WINDOW > 0:
        first = tl.maximum(context - (QUERIES - 1) - WINDOW, 0)

    members = tl.arange(0, TILE_HEADS)  # query i of head g of the group is member i * GROUP + g
    STEP: tl.constexpr = 2 if PAIRS else 1  # of float8 the even dims lie in one tile and the odd ones in another
    dims = tl.arange(0, TILE_DIM // STEP)
    present = members < QUERIES * GROUP
    query_positions = context - QUERIES + members // GROUP
    heads = ((row * QUERIES + members // GROUP) * num_kv_heads + kv_head) * GROUP + members % GROUP
    q = load_rows(q_ptr, heads * HEAD_DIM, dims * STEP, present, HEAD_DIM, True).to(DOT_DTYPE)
    q_odd, acc_odd = 0.0, 0.0
    if PAIRS:
        q_odd = load_rows(q_ptr + 1, heads * HEAD_DIM, dims * STEP, present, HEAD_DIM, True).to(DOT_DTYPE)
        acc_odd = tl.zeros([TILE_HEADS, TILE_DIM // STEP], tl.float32)
    k_scale = load_scale(k_scale_ptr, kv_head, SCALED)
    maximum = tl.full([TILE_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_HEADS], tl.float32)
    acc = tl.zeros([TILE_HEADS, TILE_DIM // STEP], tl.float32)
    table_ptr = block_tables_ptr + row * table_width
    masked_from = begin
    if WINDOW == 0:
        # Whole tiles that every query sees need no mask.
        seen_by_all = tl.minimum(end, tl.maximum(context - (QUERIES - 1), 0))
        masked_from = begin + tl.maximum(seen_by_all - begin, 0) // TILE_TOKENS * TILE_TOKENS
        maximum, total, acc, acc_odd = attend_piece(
            q, q_odd, k_cache_ptr, v_cache_ptr, table_ptr, query_positions, k_scale, maximum, total, acc, acc_odd,
            begin, masked_from, first, num_kv_heads, kv_head, dims, SCALE, SOFT_CAP, WINDOW, BLOCK_SIZE, HEAD_DIM,
            TILE_TOKENS, DOT_DTYPE, PAIRS, False,
        )  # fmt: skip
    maximum, total, acc, acc_odd = attend_piece(
        q, q_odd, k_cache_ptr, v_cache_ptr, table_ptr, query_positions, k_scale, maximum, total, acc, acc_odd,
        masked_from, end, first, num_kv_heads, kv_head, dims, SCALE, SOFT_CAP, WINDOW, BLOCK_SIZE, HEAD_DIM,
        TILE_TOKENS, DOT_DTYPE, PAIRS, True,
    )  # fmt: skip

    # What has seen no token has a total of 0 and gives zeros.
    if PAIRS:
        acc = tl.interleave(acc, acc_odd)
        dims = tl.arange(0, TILE_DIM)
    out = acc * (load_scale(v_scale_ptr, kv_head, SCALED) / tl.where(total > 0, total, 1.0))[:, None]
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


def paged_decode_triton(
    q: Float[Array, "B Q H D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    k_scale: Float[Array, " K"] | None,
    v_scale: Float[Array, " K"] | None,
) -> Float[Array, "B Q H D"]:
    num_rows, queries, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group, window = num_heads // num_kv_heads, sliding_window or 0
    target = current_target()
    launch = launch_parameters(head_dim=head_dim, itemsize=k_cache.dtype.itemsize)
    tile_dim = next_power_of_2(max(head_dim, MIN_DOT))
    seen = window + queries - 1 if window else 0
    useful = num_rows * ceil_div(block_tables.shape[1] * block_size, launch.tile_tokens)
    wanted = ceil_div(target.multiprocessors * launch.programs_per_multiprocessor, num_kv_heads)
    most_pieces = min(wanted, useful)
    plan, cuts = plan_pieces(context_lens, window=seen, tile_tokens=launch.tile_tokens, most_pieces=most_pieces)
    pieces = num_rows + most_pieces
    out, parts, lse = triton_call(
        q,
        k_cache,
        v_cache,
        block_tables,
        plan,
        plan if k_scale is None else k_scale,  # not read where there are no scales
        plan if v_scale is None else v_scale,
        num_kv_heads,
        block_tables.shape[1],
        kernel=decode_kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((pieces, num_kv_heads, queries * group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((pieces, num_kv_heads, queries * group), jnp.float32),
        ),
        grid=(num_kv_heads, pieces),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        SCALE=scale,
        SOFT_CAP=soft_cap or 0.0,
        WINDOW=window,
        QUERIES=queries,
        GROUP=group,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        TILE_HEADS=max(MIN_DOT, next_power_of_2(queries * group)),
        TILE_TOKENS=launch.tile_tokens,
        TILE_DIM=tile_dim,
        DOT_DTYPE=dot_dtype(q.dtype, k_cache.dtype),
        PAIRS=k_cache.dtype == FP8,
        SCALED=k_scale is not None,
    )

    return merge_cut_rows(out, parts, lse, cuts)


def merge_cut_rows(
    out: Float[Array, "B *queries H D"],
    parts: Float[Array, "pieces K heads D"],
    lse: Float[Array, "pieces K heads"],
    cuts: Int[Array, "cuts 3"],
) -> Float[Array, "B *queries H D"]:
    """Fills in the rows that were cut, in place. `heads` are the Q * G queries of a KV head."""
    _, num_kv_heads, heads, head_dim = parts.shape
    group = out.shape[-2] // num_kv_heads

    def merge(out: jax.Ref) -> None:
        triton_call(
            parts,
            lse,
            cuts,
            out,
            num_kv_heads,
            kernel=merge_kernel,
            out_type=(),
            grid=(len(cuts), num_kv_heads, heads),
            num_warps=4,
            num_stages=1,
            QUERIES=heads // group,
            GROUP=group,
            HEAD_DIM=head_dim,
            TILE_DIM=next_power_of_2(max(head_dim, MIN_DOT)),
            TILE_PARTS=_MERGE_PARTS,
        )

    return update_in_place(merge, out)[0]
