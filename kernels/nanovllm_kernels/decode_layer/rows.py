"""Several rows' layer: the programs go through the phases together and meet at a barrier after each."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels.decode_layer.attention import attend, norm_weights, open_item
from nanovllm_kernels.decode_layer.barrier import arrive, wait_for
from nanovllm_kernels.decode_layer.products import product
from nanovllm_kernels.decode_layer.weights import load_weights, read_ahead

QKV, ATTEND, O, GATE_UP, DOWN = (tl.constexpr(phase) for phase in range(5))


@triton.jit
@no_type_check
def rows_kernel(
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
    words_ptr,  # int32, zero at first: whether a wait failed, barriers, counters
    k_cache_ptr,
    v_cache_ptr,
    num_rows,
    num_kv_heads,
    table_width,
    out_ptr,  # [B, E]
    qkv_ptr,  # [B, K, G + 2, D]
    parts_ptr,
    lse_ptr,
    heads_ptr,  # [B, H, D]
    middle_ptr,  # [B, E]
    gated_ptr,  # [B, F]
    o_sums_ptr,
    down_sums_ptr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SLICES: tl.constexpr,
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
    failed_ptr = words_ptr
    barriers_ptr = words_ptr + 1
    counters_ptr = words_ptr + OWN_WORDS
    num_items = tl.load(num_pieces_ptr) * num_kv_heads
    NORM: tl.constexpr = q_norm_ptr is not None
    if FIRST <= ATTEND and LAST >= ATTEND:
        opened = open_item(
            program, num_items, pieces_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, table_width,
            num_kv_heads, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS,
        )  # fmt: skip
        q_norm = norm_weights(q_norm_ptr, HEAD_DIM, NORM)
        k_norm = norm_weights(k_norm_ptr, HEAD_DIM, NORM)

    if FIRST <= QKV:
        w = load_weights(
            qkv_w_ptr, program, 0, QKV_INPUTS, QKV_OUTPUTS, QKV_COLS, QKV_TILE_COLS, QKV_TILE_INPUTS, QKV_SPLITS,
            QKV_SPLIT_INPUTS, SLICES, False,
        )  # fmt: skip
        if READ_AHEAD >= 1:
            read_ahead(o_w_ptr, O_INPUTS * O_OUTPUTS * 2, PROGRAMS)
        if READ_AHEAD >= 2:
            read_ahead(gate_up_w_ptr, GATE_UP_INPUTS * GATE_UP_OUTPUTS * 4, PROGRAMS)
        if READ_AHEAD >= 3:
            read_ahead(down_w_ptr, DOWN_INPUTS * DOWN_OUTPUTS * 2, PROGRAMS)
        if LAST > FIRST:
            if program == 0:
                tl.store(barriers_ptr + 3, 0)  # left by the launch before
        product(
            w, x_ptr, qkv_w_ptr, num_rows, input_norm_ptr, qkv_bias_ptr, None, qkv_ptr, None, None,
            QKV_INPUTS, QKV_OUTPUTS, EPS, False, QKV_COLS, QKV_TILE_COLS, QKV_TILE_INPUTS, QKV_SPLITS,
            QKV_SPLIT_INPUTS, QKV_TASKS, TILE_ROWS, SLICES, PROGRAMS,
        )  # fmt: skip
        if LAST > QKV:
            arrive(barriers_ptr)
            if READ_AHEAD == 1:
                read_ahead(gate_up_w_ptr, GATE_UP_INPUTS * GATE_UP_OUTPUTS * 4, PROGRAMS)

    if FIRST <= ATTEND and LAST >= ATTEND:
        if FIRST < ATTEND:
            wait_for(barriers_ptr, failed_ptr, PROGRAMS)
        attend(
            opened, q_norm, k_norm, qkv_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, pieces_ptr,
            rows_ptr, num_items, heads_ptr, parts_ptr, lse_ptr, counters_ptr, num_kv_heads, table_width, EPS, SCALE,
            WINDOW, GROUP, BLOCK_SIZE, HEAD_DIM, TILE_HEADS, TILE_TOKENS, STAGES, PROGRAMS, PIECES, NORM,
        )  # fmt: skip
        if LAST > ATTEND:
            arrive(barriers_ptr + 1)
            if READ_AHEAD == 1:
                read_ahead(down_w_ptr, DOWN_INPUTS * DOWN_OUTPUTS * 2, PROGRAMS)

    if FIRST <= O and LAST >= O:
        w = load_weights(
            o_w_ptr, program, 0, O_INPUTS, O_OUTPUTS, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS,
            O_SPLIT_INPUTS, SLICES, False,
        )  # fmt: skip
        if FIRST < O:
            wait_for(barriers_ptr + 1, failed_ptr, PROGRAMS)
            if program == 0:
                tl.store(barriers_ptr, 0)
        product(
            w, heads_ptr, o_w_ptr, num_rows, None, None, x_ptr, middle_ptr, o_sums_ptr, counters_ptr,
            O_INPUTS, O_OUTPUTS, EPS, False, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS,
            O_SPLIT_INPUTS, O_TASKS, TILE_ROWS, SLICES, PROGRAMS,
        )  # fmt: skip
        if LAST > O:
            arrive(barriers_ptr + 2)
            if READ_AHEAD >= 1 and next_w_ptr is not None:
                read_ahead(next_w_ptr, QKV_INPUTS * QKV_OUTPUTS * 2, PROGRAMS)

    if FIRST <= GATE_UP and LAST >= GATE_UP:
        w = load_weights(
            gate_up_w_ptr, program, 0, GATE_UP_INPUTS, GATE_UP_OUTPUTS, GATE_UP_COLS, GATE_UP_TILE_COLS,
            GATE_UP_TILE_INPUTS, GATE_UP_SPLITS, GATE_UP_SPLIT_INPUTS, SLICES, True,
        )  # fmt: skip
        if FIRST < GATE_UP:
            wait_for(barriers_ptr + 2, failed_ptr, PROGRAMS)
            if program == 0:
                tl.store(barriers_ptr + 1, 0)
        product(
            w, middle_ptr, gate_up_w_ptr, num_rows, post_norm_ptr, None, None, gated_ptr, None, None,
            GATE_UP_INPUTS, GATE_UP_OUTPUTS, EPS, True, GATE_UP_COLS, GATE_UP_TILE_COLS, GATE_UP_TILE_INPUTS,
            GATE_UP_SPLITS, GATE_UP_SPLIT_INPUTS, GATE_UP_TASKS, TILE_ROWS, SLICES, PROGRAMS,
        )  # fmt: skip
        if LAST > GATE_UP:
            arrive(barriers_ptr + 3)

    if FIRST <= DOWN and LAST >= DOWN:
        w = load_weights(
            down_w_ptr, program, 0, DOWN_INPUTS, DOWN_OUTPUTS, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS,
            DOWN_SPLITS, DOWN_SPLIT_INPUTS, SLICES, False,
        )  # fmt: skip
        if FIRST < DOWN:
            wait_for(barriers_ptr + 3, failed_ptr, PROGRAMS)
            if program == 0:
                tl.store(barriers_ptr + 2, 0)
        product(
            w, gated_ptr, down_w_ptr, num_rows, None, None, middle_ptr, out_ptr, down_sums_ptr, counters_ptr,
            DOWN_INPUTS, DOWN_OUTPUTS, EPS, False, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS, DOWN_SPLITS,
            DOWN_SPLIT_INPUTS, DOWN_TASKS, TILE_ROWS, SLICES, PROGRAMS,
        )  # fmt: skip
