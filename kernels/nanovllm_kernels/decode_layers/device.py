"""Device code: one kernel, whose programs pass numbers to each other as they become ready."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels.decode_layers.attention import attend, cut_context, open_piece
from nanovllm_kernels.decode_layers.exchange import read_flag, reads_before_giving_up
from nanovllm_kernels.decode_layers.products import (
    hidden_states,
    load_weights,
    merged_pieces,
    multiply,
    receive_gated,
)


@triton.jit
@no_type_check
def note_addresses(addresses_ptr, arrays):
    """Writes down where `arrays` are, so that they can be picked by a number. All programs write the same."""
    for index in tl.static_range(len(arrays)):
        tl.store(addresses_ptr + index, arrays[index].to(tl.int64))


@triton.jit
@no_type_check
def array_at(addresses_ptr, dtype: tl.constexpr = tl.bfloat16):
    """An array that `note_addresses` wrote down."""
    return tl.multiple_of(tl.load(addresses_ptr).to(tl.pointer_type(dtype)), 16)


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
    out_ptr,  # [1, E]
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
    LAYERS: tl.constexpr,
    QKV_INPUTS: tl.constexpr,
    QKV_OUTPUTS: tl.constexpr,
    QKV_COLS: tl.constexpr,
    QKV_TILE_COLS: tl.constexpr,
    QKV_TILE_INPUTS: tl.constexpr,
    QKV_SPLITS: tl.constexpr,
    QKV_SPLIT_INPUTS: tl.constexpr,
    O_INPUTS: tl.constexpr,
    O_OUTPUTS: tl.constexpr,
    O_COLS: tl.constexpr,
    O_TILE_COLS: tl.constexpr,
    O_TILE_INPUTS: tl.constexpr,
    O_SPLITS: tl.constexpr,
    O_SPLIT_INPUTS: tl.constexpr,
    GATE_UP_INPUTS: tl.constexpr,
    GATE_UP_OUTPUTS: tl.constexpr,
    GATE_UP_COLS: tl.constexpr,
    GATE_UP_TILE_COLS: tl.constexpr,
    GATE_UP_TILE_INPUTS: tl.constexpr,
    GATE_UP_SPLITS: tl.constexpr,
    GATE_UP_SPLIT_INPUTS: tl.constexpr,
    DOWN_INPUTS: tl.constexpr,
    DOWN_OUTPUTS: tl.constexpr,
    DOWN_COLS: tl.constexpr,
    DOWN_TILE_COLS: tl.constexpr,
    DOWN_TILE_INPUTS: tl.constexpr,
    DOWN_SPLITS: tl.constexpr,
    DOWN_SPLIT_INPUTS: tl.constexpr,
):
    NUM_WEIGHTS: tl.constexpr = 9
    failed_ptr = words_ptr
    words = words_ptr + FLAGS
    addresses = (words + LAYERS * WORDS).to(tl.pointer_type(tl.int64))
    cache_addresses = addresses + len(weights)
    context = tl.load(context_ptr)
    first_tile, piece_tiles, num_pieces = cut_context(context, WINDOW, TILE_TOKENS, MOST_PIECES)
    note_addresses(addresses, weights)
    note_addresses(cache_addresses, caches)
    tl.debug_barrier()

    inputs = tl.arange(0, QKV_TILE_INPUTS)
    present = inputs < QKV_INPUTS
    x = tl.load(x_ptr + inputs, mask=present, other=0.0)
    qkv_w_ptr = array_at(addresses + 1, tl.int32)
    k_cache_ptr = array_at(cache_addresses)
    v_cache_ptr = array_at(cache_addresses + 1)
    for layer in range(LAYERS):
        flags = read_flag(failed_ptr, THREADS)
        down_words = words + layer * WORDS
        qkv_words = down_words + DOWN_SPLITS * DOWN_OUTPUTS
        parts_words = qkv_words + QKV_OUTPUTS
        lse_words = parts_words + PIECES * O_INPUTS
        o_words = lse_words + PIECES * (O_INPUTS // HEAD_DIM)
        gated_words = o_words + O_SPLITS * O_OUTPUTS
        own = addresses + layer * NUM_WEIGHTS
        following = tl.minimum(layer + 1, LAYERS - 1)

        # Addresses are read a phase before what lies there.
        o_w_ptr = array_at(own + 5, tl.int32)
        w = load_weights(
            qkv_w_ptr, QKV_OUTPUTS, QKV_INPUTS, QKV_COLS, QKV_TILE_COLS, QKV_TILE_INPUTS, QKV_SPLITS,
            QKV_SPLIT_INPUTS, False,
        )  # fmt: skip
        opened = open_piece(
            context, first_tile, piece_tiles, cos_ptr, sin_ptr, array_at(own + 3), array_at(own + 4), k_cache_ptr,
            v_cache_ptr, table_ptr, num_kv_heads, GROUP, BLOCK_SIZE, HEAD_DIM, TILE_HEADS, TILE_TOKENS, NORM,
        )  # fmt: skip
        norm = tl.load(array_at(own) + inputs, mask=present, other=0.0)
        most_reads = reads_before_giving_up(flags)
        if layer > 0:
            x = hidden_states(x, down_words - WORDS, failed_ptr, most_reads, DOWN_OUTPUTS, DOWN_SPLITS, THREADS)
        multiply(
            w, x, norm, array_at(own + 2), qkv_words, QKV_OUTPUTS, QKV_COLS, QKV_TILE_COLS, QKV_SPLITS, QKV_INPUTS,
            EPS, False, BIAS,
        )  # fmt: skip
        attend(
            opened, context, num_pieces, qkv_words, parts_words, lse_words, k_cache_ptr, v_cache_ptr, table_ptr,
            num_kv_heads, failed_ptr, most_reads, EPS, SCALE, WINDOW, GROUP, BLOCK_SIZE, HEAD_DIM, TILE_HEADS,
            TILE_TOKENS, STAGES, NORM, THREADS,
        )  # fmt: skip
        gate_up_w_ptr, post_norm_ptr = array_at(own + 7, tl.int32), array_at(own + 6)
        w = load_weights(
            o_w_ptr, O_OUTPUTS, O_INPUTS, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS, O_SPLIT_INPUTS, False
        )
        attended = merged_pieces(
            parts_words, lse_words, num_pieces, failed_ptr, most_reads, HEAD_DIM, O_INPUTS, O_TILE_INPUTS, O_SPLITS,
            O_SPLIT_INPUTS, PIECES, THREADS,
        )  # fmt: skip
        multiply(
            w, attended.to(x.dtype), 1.0, None, o_words, O_OUTPUTS, O_COLS, O_TILE_COLS, O_SPLITS, 0, EPS, False, False
        )
        down_w_ptr = array_at(own + 8, tl.int32)
        w = load_weights(
            gate_up_w_ptr, GATE_UP_OUTPUTS, GATE_UP_INPUTS, GATE_UP_COLS, GATE_UP_TILE_COLS, GATE_UP_TILE_INPUTS,
            GATE_UP_SPLITS, GATE_UP_SPLIT_INPUTS, True,
        )  # fmt: skip
        norm = tl.load(post_norm_ptr + inputs, mask=present, other=0.0)
        x = hidden_states(x, o_words, failed_ptr, most_reads, O_OUTPUTS, O_SPLITS, THREADS)
        multiply(
            w, x, norm, None, gated_words, GATE_UP_OUTPUTS, GATE_UP_COLS, GATE_UP_TILE_COLS, GATE_UP_SPLITS,
            GATE_UP_INPUTS, EPS, True, False,
        )  # fmt: skip
        qkv_w_ptr = array_at(addresses + following * NUM_WEIGHTS + 1, tl.int32)
        k_cache_ptr = array_at(cache_addresses + 2 * following)
        v_cache_ptr = array_at(cache_addresses + 2 * following + 1)
        w = load_weights(
            down_w_ptr, DOWN_OUTPUTS, DOWN_INPUTS, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS, DOWN_SPLITS,
            DOWN_SPLIT_INPUTS, False,
        )  # fmt: skip
        gated = receive_gated(
            gated_words, failed_ptr, most_reads, DOWN_INPUTS, DOWN_TILE_INPUTS, DOWN_SPLITS, DOWN_SPLIT_INPUTS, THREADS
        )
        multiply(
            w, gated.to(x.dtype), 1.0, None, down_words, DOWN_OUTPUTS, DOWN_COLS, DOWN_TILE_COLS, DOWN_SPLITS, 0, EPS,
            False, False,
        )  # fmt: skip

    if tl.program_id(0) == 0:
        down_words = words + (LAYERS - 1) * WORDS
        most_reads = reads_before_giving_up(read_flag(failed_ptr, THREADS))
        x = hidden_states(x, down_words, failed_ptr, most_reads, DOWN_OUTPUTS, DOWN_SPLITS, THREADS)
        tl.store(out_ptr + inputs, x, mask=present)
