"""One row's layer: programs pass numbers to each other as they become ready, and none waits for more than it reads.

Products are multiply-adds in float32. Split sums, and the pieces that the context is cut into, are added by those who
read them.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels._device import scale_scores
from nanovllm_kernels.decode_layer.attention import fold, load_cached, norm_weights, open_item
from nanovllm_kernels.decode_layer.exchange import receive, receive_both, send
from nanovllm_kernels.decode_layer.weights import load_weights, read_ahead, tile_columns

# What a product multiplies: what is in memory, the merged pieces of attention, the residual plus split sums, or the
# gated MLP's inner values; the last three are received.
STORED, PIECES_OF, SUMS_OF, SENT = (tl.constexpr(source) for source in range(4))


@triton.jit
@no_type_check
def received_pieces(
    parts_ptr,
    lse_ptr,
    num_pieces,
    inputs,
    first,
    end,
    call,
    failed_ptr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Attention output at `inputs` [K], from the pieces that the context was cut into."""
    HEADS: tl.constexpr = (inputs.shape[0] + HEAD_DIM - 1) // HEAD_DIM
    pieces = tl.arange(0, PIECES)
    there = (pieces < num_pieces)[:, None]
    mask = there & (inputs < end)[None, :]
    part_ptrs = parts_ptr + pieces[:, None] * WIDTH + inputs[None, :]
    if ALIGNED:
        heads = first // HEAD_DIM + tl.arange(0, HEADS)
        lse_mask = there & (heads < end // HEAD_DIM)[None, :]
        lse_ptrs = lse_ptr + pieces[:, None] * (WIDTH // HEAD_DIM) + heads[None, :]
    else:
        lse_mask = mask
        lse_ptrs = lse_ptr + pieces[:, None] * (WIDTH // HEAD_DIM) + inputs[None, :] // HEAD_DIM
    parts, lse = receive_both(part_ptrs, mask, lse_ptrs, lse_mask, call, failed_ptr)
    lse = tl.where(lse_mask, lse, float("-inf"))
    maximum = tl.max(lse, 0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.exp2(lse - shift[None, :])
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total > 0, total, 1.0)[None, :]
    if ALIGNED:
        parts = tl.reshape(parts, [PIECES, HEADS, inputs.shape[0] // HEADS])
        merged = tl.reshape(tl.sum(parts * weights[:, :, None], 0), [inputs.shape[0]])
    else:
        merged = tl.sum(parts * weights, 0)
    return merged


@triton.jit
@no_type_check
def activations(
    source_ptr,
    more_ptr,
    inputs,
    first,
    end,
    call,
    failed_ptr,
    num_pieces,
    SOURCE: tl.constexpr,
    INPUTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    SUMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    dtype: tl.constexpr,
):
    """What a product multiplies, at `inputs` [K], float32 rounded to the model's dtype; zero past `end`."""
    mask = inputs < end
    if SOURCE == STORED:
        x = tl.load(source_ptr + inputs, mask=mask, other=0.0)
    elif SOURCE == PIECES_OF:
        x = received_pieces(
            source_ptr, more_ptr, num_pieces, inputs, first, end, call, failed_ptr, HEAD_DIM, INPUTS, PIECES, ALIGNED
        )
    elif SOURCE == SUMS_OF:
        x = residual_plus_sums(source_ptr, more_ptr, inputs, mask, call, failed_ptr, INPUTS, SUMS)
    else:
        x = receive(source_ptr, inputs, call, mask, failed_ptr)
    return x.to(dtype).to(tl.float32)


@triton.jit
@no_type_check
def residual_plus_sums(x_ptr, sums_ptr, cols, mask, call, failed_ptr, WIDTH: tl.constexpr, SUMS: tl.constexpr):
    """Hidden states at `cols` with the split sums of a product added, in the order of the splits."""
    splits = tl.arange(0, triton.next_power_of_2(SUMS))
    mask_2d = (splits < SUMS)[:, None] & mask[None, :]
    residual = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    sums = receive(sums_ptr, splits[:, None] * WIDTH + cols[None, :], call, mask_2d, failed_ptr)
    return residual + tl.sum(sums, 0)


@triton.jit
@no_type_check
def first_tiles(
    w_ptr,
    task,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    GATED: tl.constexpr,
):
    """A task's first two tiles of the weight, or its only one twice."""
    first = load_weights(
        w_ptr, task, 0, INPUTS, OUTPUTS, COLS, TILE_COLS, TILE_INPUTS, SPLITS, SPLIT_INPUTS, 1, GATED
    )
    second = first
    if SPLIT_INPUTS > TILE_INPUTS:
        second = load_weights(
            w_ptr, task, 1, INPUTS, OUTPUTS, COLS, TILE_COLS, TILE_INPUTS, SPLITS, SPLIT_INPUTS, 1, GATED
        )
    return first, second


@triton.jit
@no_type_check
def row_product(
    tiles,  # the first two tiles of `w_ptr`, see `first_tiles`
    w_ptr,
    source_ptr,
    more_ptr,
    norm_ptr,
    bias_ptr,
    words_ptr,  # where the results are sent: [splits, N]
    call,
    failed_ptr,
    num_pieces,
    SOURCE: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    TASKS: tl.constexpr,
    GATED: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    SUMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """All tasks of this program: `act(norm(x) @ w + bias)`, a task a tile of the output and a split of K."""
    ALIGNED: tl.constexpr = SPLIT_INPUTS % HEAD_DIM == 0 and TILE_INPUTS % HEAD_DIM == 0
    STEPS: tl.constexpr = (SPLIT_INPUTS + TILE_INPUTS - 1) // TILE_INPUTS
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    even, odd = tiles
    steps = tl.arange(0, TILE_INPUTS)
    for task in tl.range(tl.program_id(0), TASKS, PROGRAMS, num_stages=1):
        first = task % SPLITS * SPLIT_INPUTS
        end = tl.minimum(first + SPLIT_INPUTS, INPUTS)
        acc = tl.zeros([TILE_COLS], tl.float32)
        squares = tl.zeros([TILE_INPUTS], tl.float32)
        for step in tl.static_range(STEPS):
            inputs = first + step * TILE_INPUTS + steps
            x = activations(
                source_ptr, more_ptr, inputs, first + step * TILE_INPUTS, end, call, failed_ptr, num_pieces, SOURCE,
                INPUTS, HEAD_DIM, PIECES, SUMS, ALIGNED, dtype,
            )  # fmt: skip
            if norm_ptr is not None:
                squares += x * x
                x = x * tl.load(norm_ptr + inputs, mask=inputs < end, other=0.0).to(tl.float32)
            w = even if step % 2 == 0 else odd
            acc += tl.sum(x[:, None] * w.to(tl.float32), 0)
            if step + 2 < STEPS:
                w = load_weights(
                    w_ptr, task, step + 2, INPUTS, OUTPUTS, COLS, TILE_COLS, TILE_INPUTS, SPLITS, SPLIT_INPUTS, 1,
                    GATED,
                )  # fmt: skip
                if step % 2 == 0:
                    even = w
                else:
                    odd = w
        if TASKS > PROGRAMS:
            even, odd = first_tiles(
                w_ptr, task + PROGRAMS, INPUTS, OUTPUTS, COLS, TILE_COLS, TILE_INPUTS, SPLITS, SPLIT_INPUTS, GATED
            )
        cols, present = tile_columns(task // SPLITS, OUTPUTS, COLS, TILE_COLS, GATED)
        if norm_ptr is not None:
            acc *= tl.rsqrt(tl.sum(squares, 0) / INPUTS + EPS)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=present, other=0.0).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, [2, TILE_COLS // 2]), (1, 0)))
            acc = gate * tl.sigmoid(gate) * up
            cols, present = tile_columns(task, OUTPUTS, COLS, TILE_COLS // 2, False)
        if SPLITS == 1:
            acc = acc.to(dtype)
        send(words_ptr, task % SPLITS * OUTPUTS + cols, acc, call, present)


@triton.jit
@no_type_check
def attend_row(
    opened,
    q_norm,
    k_norm,
    qkv_words,
    parts_words,
    lse_words,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    num_items,
    num_kv_heads,
    table_width,
    call,
    failed_ptr,
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
):
    """This program's piece of the context for one KV head, if it has one."""
    dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
    HALF: tl.constexpr = HEAD_DIM // 2
    item = tl.program_id(0)
    if item < num_items:
        row, context, begin, end, newest, whole, cos, sin, k, v = opened
        kv_head = item % num_kv_heads
        piece = item // num_kv_heads
        first = 0
        if WINDOW > 0:
            first = tl.maximum(context - WINDOW, 0)
        members = tl.arange(0, TILE_HEADS)  # the group's query heads, its key and its value
        dims = tl.arange(0, HEAD_DIM)
        # Each element with the one of the other half, which the rotation mixes in.
        pairs = (dims[None, :] + tl.arange(0, 2)[:, None] * HALF) % HEAD_DIM
        offsets = (kv_head * (GROUP + 2) + members)[None, :, None] * HEAD_DIM + pairs[:, None, :]
        sent = (members < GROUP + 2)[None, :, None] & (dims < HEAD_DIM)[None, None, :] & (tl.arange(0, 2) < 2)[:, None, None]
        both = receive(qkv_words, offsets, call, sent, failed_ptr)
        raw, other = tl.split(tl.permute(both, (1, 2, 0)))
        x = raw
        if NORM:
            is_query = (members < GROUP)[:, None]
            weight = tl.where(is_query, q_norm[0], k_norm[0])
            other_weight = tl.where(is_query, q_norm[1], k_norm[1])
            scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + EPS)[:, None]
            # Rounded to the model's dtype before and after the weight, as the reference does.
            x = ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
            other = ((other * scale).to(dtype).to(tl.float32) * other_weight).to(dtype).to(tl.float32)
        sign = tl.where(dims < HALF, -1.0, 1.0)[None, :]
        q = (x * cos + sign * other * sin).to(dtype)
        new_k = tl.sum(tl.where((members == GROUP)[:, None], q.to(tl.float32), 0.0), 0)[None, :]
        new_v = tl.sum(tl.where((members == GROUP + 1)[:, None], raw, 0.0), 0)[None, :]
        score = scale_scores(tl.sum(q.to(tl.float32) * new_k, 1), 1.0, SCALE, 0.0)
        maximum = tl.where(newest, score, float("-inf"))
        total = tl.zeros([TILE_HEADS], tl.float32) + tl.where(newest, 1.0, 0.0)
        acc = tl.zeros([TILE_HEADS, HEAD_DIM], tl.float32) + tl.where(newest, new_v, 0.0)

        maximum, total, acc = fold(q, k, v, begin, first, end, maximum, total, acc, SCALE, TILE_TOKENS)
        for start in tl.range(begin + TILE_TOKENS, end, TILE_TOKENS, num_stages=STAGES):
            k, v = load_cached(
                k_cache_ptr, v_cache_ptr, tables_ptr, row.to(tl.int64), start, end, table_width, num_kv_heads,
                kv_head, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS,
            )  # fmt: skip
            maximum, total, acc = fold(q, k, v, start, first, end, maximum, total, acc, SCALE, TILE_TOKENS)

        # What has seen no token has a total of 0 and gives zeros.
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        heads = (piece * num_kv_heads + kv_head) * GROUP + members
        present = members < GROUP
        send(lse_words, heads, maximum + tl.log2(total), call, present)
        part_mask = present[:, None] & (dims < HEAD_DIM)[None, :]
        send(parts_words, (heads * HEAD_DIM)[:, None] + dims[None, :], out, call, part_mask)
        if newest:
            position = context - 1
            block = tl.load(tables_ptr + row.to(tl.int64) * table_width + position // BLOCK_SIZE).to(tl.int64)
            slot = ((block * num_kv_heads + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
            tl.store(k_cache_ptr + slot + dims[None, :], new_k.to(dtype))
            tl.store(v_cache_ptr + slot + dims[None, :], new_v.to(dtype))


@triton.jit
@no_type_check
def add_down(x_ptr, o_words, down_words, out_ptr, call, failed_ptr, WIDTH: tl.constexpr, O_SPLITS: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, TASKS: tl.constexpr, PROGRAMS: tl.constexpr):
    """The layer's output: hidden states after attention plus the split sums of the last product."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for task in tl.range(tl.program_id(0), TASKS, PROGRAMS, num_stages=1):
        # The first split's program of each tile of columns adds.
        if task % SPLITS == 0:
            cols = task // SPLITS * TILE + tl.arange(0, TILE)
            mask = cols < WIDTH
            x = residual_plus_sums(x_ptr, o_words, cols, mask, call, failed_ptr, WIDTH, O_SPLITS)
            splits = tl.arange(0, triton.next_power_of_2(SPLITS))
            mask_2d = (splits < SPLITS)[:, None] & mask[None, :]
            sums = receive(down_words, splits[:, None] * WIDTH + cols[None, :], call, mask_2d, failed_ptr)
            x = x.to(dtype).to(tl.float32) + tl.sum(sums, 0)
            tl.store(out_ptr + cols, x.to(dtype), mask=mask)


@triton.jit
@no_type_check
def one_row_kernel(
    x_ptr,
    input_norm_ptr,
    qkv_w_ptr,
    qkv_bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    o_w_ptr,
    post_norm_ptr,
    gate_up_w_ptr,
    down_w_ptr,
    next_w_ptr,  # the weight that the next layer starts with, or None
    cos_ptr,
    sin_ptr,
    tables_ptr,
    pieces_ptr,  # int32 [pieces, 5], see `paged_decode.triton.plan_pieces`
    rows_ptr,  # int32 [B, 2], likewise
    num_pieces_ptr,
    call_ptr,
    words_ptr,  # int32, zero at first: whether a wait failed, then words of 64 bits
    k_cache_ptr,
    v_cache_ptr,
    num_kv_heads,
    table_width,
    out_ptr,  # [1, E]
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PROGRAMS: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PIECES: tl.constexpr,
    READ_AHEAD: tl.constexpr,
    OWN_WORDS: tl.constexpr,
    QKV_INPUTS: tl.constexpr,
    QKV_OUTPUTS: tl.constexpr,
    QKV_COLS: tl.constexpr,
    QKV_TILE_COLS: tl.constexpr,
    QKV_TILE_INPUTS: tl.constexpr,
    QKV_SPLITS: tl.constexpr,
    QKV_SPLIT_INPUTS: tl.constexpr,
    QKV_TASKS: tl.constexpr,
    O_INPUTS: tl.constexpr,
    O_OUTPUTS: tl.constexpr,
    O_COLS: tl.constexpr,
    O_TILE_COLS: tl.constexpr,
    O_TILE_INPUTS: tl.constexpr,
    O_SPLITS: tl.constexpr,
    O_SPLIT_INPUTS: tl.constexpr,
    O_TASKS: tl.constexpr,
    GATE_UP_INPUTS: tl.constexpr,
    GATE_UP_OUTPUTS: tl.constexpr,
    GATE_UP_COLS: tl.constexpr,
    GATE_UP_TILE_COLS: tl.constexpr,
    GATE_UP_TILE_INPUTS: tl.constexpr,
    GATE_UP_SPLITS: tl.constexpr,
    GATE_UP_SPLIT_INPUTS: tl.constexpr,
    GATE_UP_TASKS: tl.constexpr,
    DOWN_INPUTS: tl.constexpr,
    DOWN_OUTPUTS: tl.constexpr,
    DOWN_COLS: tl.constexpr,
    DOWN_TILE_COLS: tl.constexpr,
    DOWN_TILE_INPUTS: tl.constexpr,
    DOWN_SPLITS: tl.constexpr,
    DOWN_SPLIT_INPUTS: tl.constexpr,
    DOWN_TASKS: tl.constexpr,
):
    program = tl.program_id(0)
    NORM: tl.constexpr = q_norm_ptr is not None
    failed_ptr = words_ptr
    call = tl.load(call_ptr)
    num_pieces = tl.load(num_pieces_ptr)
    num_items = num_pieces * num_kv_heads
    qkv_words = (words_ptr + OWN_WORDS).to(tl.pointer_type(tl.int64))
    parts_words = qkv_words + QKV_OUTPUTS
    lse_words = parts_words + PIECES * O_INPUTS
    o_words = lse_words + PIECES * O_INPUTS // HEAD_DIM
    gated_words = o_words + O_SPLITS * O_OUTPUTS
    down_words = gated_words + DOWN_INPUTS

    if FIRST <= 0:
        tiles = first_tiles(
            qkv_w_ptr, program, QKV_INPUTS, QKV_OUTPUTS, QKV_COLS, QKV_TILE_COLS, QKV_TILE_INPUTS, QKV_SPLITS,
            QKV_SPLIT_INPUTS, False,
        )  # fmt: skip
    if FIRST <= 1 and LAST >= 1:
        opened = open_item(
            program, num_items, pieces_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, table_width,
            num_kv_heads, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS,
        )  # fmt: skip
        q_norm = norm_weights(q_norm_ptr, HEAD_DIM, NORM)
        k_norm = norm_weights(k_norm_ptr, HEAD_DIM, NORM)
    if FIRST <= 0:
        if READ_AHEAD >= 1:
            read_ahead(o_w_ptr, O_INPUTS * O_OUTPUTS * 2, PROGRAMS)
        if READ_AHEAD >= 2:
            read_ahead(gate_up_w_ptr, GATE_UP_INPUTS * GATE_UP_OUTPUTS * 4, PROGRAMS)
        if READ_AHEAD >= 3:
            read_ahead(down_w_ptr, DOWN_INPUTS * DOWN_OUTPUTS * 2, PROGRAMS)
        row_product(
            tiles, qkv_w_ptr, x_ptr, None, input_norm_ptr, qkv_bias_ptr, qkv_words, call, failed_ptr, num_pieces, STORED,
            QKV_INPUTS, QKV_OUTPUTS, QKV_COLS, QKV_TILE_COLS, QKV_TILE_INPUTS, QKV_SPLITS, QKV_SPLIT_INPUTS, QKV_TASKS,
            False, EPS, HEAD_DIM, PIECES, 1, PROGRAMS,
        )  # fmt: skip
        if READ_AHEAD == 1:
            read_ahead(gate_up_w_ptr, GATE_UP_INPUTS * GATE_UP_OUTPUTS * 4, PROGRAMS)

    if FIRST <= 1 and LAST >= 1:
        attend_row(
            opened, q_norm, k_norm, qkv_words, parts_words, lse_words, k_cache_ptr, v_cache_ptr, tables_ptr, num_items,
            num_kv_heads, table_width, call, failed_ptr, EPS, SCALE, WINDOW, GROUP, BLOCK_SIZE, HEAD_DIM, TILE_HEADS,
            TILE_TOKENS, STAGES, NORM,
        )  # fmt: skip

    if FIRST <= 2 and LAST >= 2:
        tiles = first_tiles(
            o_w_ptr, program, O_INPUTS, O_OUTPUTS, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS,
            O_SPLIT_INPUTS, False,
        )  # fmt: skip
        if READ_AHEAD == 1:
            read_ahead(down_w_ptr, DOWN_INPUTS * DOWN_OUTPUTS * 2, PROGRAMS)
        row_product(
            tiles, o_w_ptr, parts_words, lse_words, None, None, o_words, call, failed_ptr, num_pieces, PIECES_OF,
            O_INPUTS, O_OUTPUTS, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS, O_SPLIT_INPUTS, O_TASKS,
            False, EPS, HEAD_DIM, PIECES, 1, PROGRAMS,
        )  # fmt: skip

    if FIRST <= 3 and LAST >= 3:
        tiles = first_tiles(
            gate_up_w_ptr, program, GATE_UP_INPUTS, GATE_UP_OUTPUTS, GATE_UP_COLS, GATE_UP_TILE_COLS,
            GATE_UP_TILE_INPUTS, GATE_UP_SPLITS, GATE_UP_SPLIT_INPUTS, True,
        )  # fmt: skip
        if READ_AHEAD >= 1 and next_w_ptr is not None:
            read_ahead(next_w_ptr, QKV_INPUTS * QKV_OUTPUTS * 2, PROGRAMS)
        row_product(
            tiles, gate_up_w_ptr, x_ptr, o_words, post_norm_ptr, None, gated_words, call, failed_ptr, num_pieces, SUMS_OF,
            GATE_UP_INPUTS, GATE_UP_OUTPUTS, GATE_UP_COLS, GATE_UP_TILE_COLS, GATE_UP_TILE_INPUTS, GATE_UP_SPLITS,
            GATE_UP_SPLIT_INPUTS, GATE_UP_TASKS, True, EPS, HEAD_DIM, PIECES, O_SPLITS, PROGRAMS,
        )  # fmt: skip

    if FIRST <= 4 and LAST >= 4:
        tiles = first_tiles(
            down_w_ptr, program, DOWN_INPUTS, DOWN_OUTPUTS, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS,
            DOWN_SPLITS, DOWN_SPLIT_INPUTS, False,
        )  # fmt: skip
        row_product(
            tiles, down_w_ptr, gated_words, None, None, None, down_words, call, failed_ptr, num_pieces, SENT,
            DOWN_INPUTS, DOWN_OUTPUTS, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS, DOWN_SPLITS, DOWN_SPLIT_INPUTS,
            DOWN_TASKS, False, EPS, HEAD_DIM, PIECES, 1, PROGRAMS,
        )  # fmt: skip
    if FIRST <= 5 and LAST >= 5:
        add_down(
            x_ptr, o_words, down_words, out_ptr, call, failed_ptr, O_OUTPUTS, O_SPLITS, DOWN_SPLITS, DOWN_COLS,
            DOWN_TASKS, PROGRAMS,
        )  # fmt: skip
