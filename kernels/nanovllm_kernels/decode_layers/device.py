"""Device code: one kernel, whose programs pass numbers to each other as they become ready."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels.decode_layers.attention import attend, cut_context, open_piece
from nanovllm_kernels.decode_layers.exchange import read_flag, reads_before_giving_up
from nanovllm_kernels.decode_layers.products import (
    PIECES_OF,
    SENT,
    SUMS_OF,
    hidden_states,
    load_weights,
    product,
)


@triton.jit
@no_type_check
def note_addresses(addresses_ptr, arrays):
    """Writes down where `arrays` are, so that they can be picked by a number. All programs write the same."""
    for index in tl.static_range(len(arrays)):
        tl.store(addresses_ptr + index, arrays[index].to(tl.int64))


@triton.jit
@no_type_check
def array_at(addresses_ptr):
    """A bfloat16 array that `note_addresses` wrote down."""
    return tl.multiple_of(tl.load(addresses_ptr).to(tl.pointer_type(tl.bfloat16)), 16)


@triton.jit
@no_type_check
def decode_layers_kernel(
    x_ptr,
    weights,  # of one layer after the other, in the order of WEIGHTS
    cos_ptr,
    sin_ptr,
    table_ptr,
    context_ptr,  # int32 [1]
    words_ptr,  # int32, see `num_words`
    caches,  # K and V of one layer after the other
    num_kv_heads,
    begin_layer,  # layers to run; all of them but in the interpreter, where no program can wait for another
    end_layer,
    out_ptr,  # [1, E]
    FIRST: tl.constexpr,  # phases to run, likewise
    LAST: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    MOST_PIECES: tl.constexpr,
    PIECES: tl.constexpr,  # that padded to a power of two
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    THREADS: tl.constexpr,
    FLAGS: tl.constexpr,
    WORDS: tl.constexpr,
    KEEPERS: tl.constexpr,
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
    NUM_WEIGHTS: tl.constexpr = 9
    failed_ptr = words_ptr
    words = (words_ptr + FLAGS).to(tl.pointer_type(tl.int64))
    addresses = words + 2 * WORDS
    cache_addresses = addresses + len(weights)
    kept_ptr = (cache_addresses + len(caches)).to(tl.pointer_type(tl.bfloat16)) + tl.program_id(0) * QKV_INPUTS
    kept_ptr = tl.multiple_of(kept_ptr, 8)
    context = tl.load(context_ptr)
    first_tile, piece_tiles, num_pieces = cut_context(context, WINDOW, TILE_TOKENS, MOST_PIECES)
    note_addresses(addresses, weights)
    note_addresses(cache_addresses, caches)
    tl.debug_barrier()

    qkv_w_ptr = array_at(addresses + begin_layer * NUM_WEIGHTS + 1)
    k_cache_ptr = array_at(cache_addresses + 2 * begin_layer)
    v_cache_ptr = array_at(cache_addresses + 2 * begin_layer + 1)
    for layer in range(begin_layer, end_layer):
        call = layer + 1
        flags = read_flag(failed_ptr, THREADS)
        # What a layer sends lies where the layer before the last one had it: until all of this layer's inputs are
        # there, programs may still read what the last layer sent.
        qkv_words = words + layer % 2 * WORDS
        parts_words = qkv_words + QKV_OUTPUTS
        lse_words = parts_words + PIECES * O_INPUTS
        o_words = lse_words + PIECES * (O_INPUTS // HEAD_DIM)
        gated_words = o_words + O_SPLITS * O_OUTPUTS
        down_words = gated_words + DOWN_INPUTS
        last_down_words = words + (layer + 1) % 2 * WORDS + (WORDS - DOWN_SPLITS * DOWN_OUTPUTS)
        own = addresses + layer * NUM_WEIGHTS
        following = tl.minimum(layer + 1, end_layer - 1)

        # Addresses are read a phase before what lies there.
        o_w_ptr = array_at(own + 5)
        if FIRST <= 0:
            w = load_weights(
                qkv_w_ptr, QKV_OUTPUTS, QKV_INPUTS, QKV_COLS, QKV_TILE_COLS, QKV_TILE_INPUTS, QKV_SPLITS,
                QKV_SPLIT_INPUTS, False,
            )  # fmt: skip
        if FIRST <= 1 and LAST >= 1:
            opened = open_piece(
                context, first_tile, piece_tiles, cos_ptr, sin_ptr, array_at(own + 3), array_at(own + 4), k_cache_ptr,
                v_cache_ptr, table_ptr, num_kv_heads, GROUP, BLOCK_SIZE, HEAD_DIM, TILE_HEADS, TILE_TOKENS, NORM,
            )  # fmt: skip
        most_reads = reads_before_giving_up(flags)
        if FIRST <= 0:
            before = kept_ptr
            if layer == 0:
                before = x_ptr
            product(
                w, before, last_down_words, kept_ptr, array_at(own), array_at(own + 2), qkv_words, layer > 0, call - 1,
                call, failed_ptr, most_reads, num_pieces, SUMS_OF, QKV_INPUTS, QKV_OUTPUTS, QKV_COLS, QKV_TILE_COLS,
                QKV_TILE_INPUTS, QKV_SPLITS, QKV_SPLIT_INPUTS, KEEPERS, False, True, BIAS, EPS, HEAD_DIM, PIECES,
                DOWN_SPLITS, THREADS,
            )  # fmt: skip
        if FIRST <= 1 and LAST >= 1:
            attend(
                opened, context, num_pieces, qkv_words, parts_words, lse_words, k_cache_ptr, v_cache_ptr, table_ptr,
                num_kv_heads, call, failed_ptr, most_reads, EPS, SCALE, WINDOW, GROUP, BLOCK_SIZE, HEAD_DIM,
                TILE_HEADS, TILE_TOKENS, STAGES, NORM, THREADS,
            )  # fmt: skip
        gate_up_w_ptr, post_norm_ptr = array_at(own + 7), array_at(own + 6)
        if FIRST <= 2 and LAST >= 2:
            w = load_weights(
                o_w_ptr, O_OUTPUTS, O_INPUTS, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS, O_SPLIT_INPUTS, False
            )
            product(
                w, parts_words, lse_words, None, None, None, o_words, True, call, call, failed_ptr, most_reads,
                num_pieces, PIECES_OF, O_INPUTS, O_OUTPUTS, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS,
                O_SPLIT_INPUTS, O_TASKS, False, False, False, EPS, HEAD_DIM, PIECES, 1, THREADS,
            )  # fmt: skip
        down_w_ptr = array_at(own + 8)
        if FIRST <= 3 and LAST >= 3:
            w = load_weights(
                gate_up_w_ptr, GATE_UP_OUTPUTS, GATE_UP_INPUTS, GATE_UP_COLS, GATE_UP_TILE_COLS,
                GATE_UP_TILE_INPUTS, GATE_UP_SPLITS, GATE_UP_SPLIT_INPUTS, True,
            )  # fmt: skip
            product(
                w, kept_ptr, o_words, kept_ptr, post_norm_ptr, None, gated_words, True, call, call, failed_ptr,
                most_reads, num_pieces, SUMS_OF, GATE_UP_INPUTS, GATE_UP_OUTPUTS, GATE_UP_COLS, GATE_UP_TILE_COLS,
                GATE_UP_TILE_INPUTS, GATE_UP_SPLITS, GATE_UP_SPLIT_INPUTS, KEEPERS, True, True, False, EPS, HEAD_DIM,
                PIECES, O_SPLITS, THREADS,
            )  # fmt: skip
        qkv_w_ptr = array_at(addresses + following * NUM_WEIGHTS + 1)
        k_cache_ptr = array_at(cache_addresses + 2 * following)
        v_cache_ptr = array_at(cache_addresses + 2 * following + 1)
        if FIRST <= 4 and LAST >= 4:
            w = load_weights(
                down_w_ptr, DOWN_OUTPUTS, DOWN_INPUTS, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS, DOWN_SPLITS,
                DOWN_SPLIT_INPUTS, False,
            )  # fmt: skip
            product(
                w, gated_words, None, None, None, None, down_words, True, call, call, failed_ptr, most_reads,
                num_pieces, SENT, DOWN_INPUTS, DOWN_OUTPUTS, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS, DOWN_SPLITS,
                DOWN_SPLIT_INPUTS, DOWN_TASKS, False, False, False, EPS, HEAD_DIM, PIECES, 1, THREADS,
            )  # fmt: skip

    if LAST >= 5 and tl.program_id(0) == 0:
        inputs = tl.arange(0, QKV_TILE_INPUTS)
        mask = inputs < QKV_INPUTS
        down_words = words + (end_layer - 1) % 2 * WORDS + (WORDS - DOWN_SPLITS * DOWN_OUTPUTS)
        most_reads = reads_before_giving_up(read_flag(failed_ptr, THREADS))
        x = hidden_states(
            kept_ptr, down_words, inputs, mask, True, end_layer, failed_ptr, most_reads, QKV_INPUTS, DOWN_SPLITS,
            THREADS,
        )  # fmt: skip
        tl.store(out_ptr + inputs, x, mask=mask)
