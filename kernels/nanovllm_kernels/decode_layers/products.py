"""The products of one row's layer: a task is a tile of a weight's columns, and all inputs or a split of them.

A task's weights are loaded into registers before its program waits for what they are multiplied with, so that they are
on their way while other programs finish. Products are multiply-adds in float32.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels.decode_layers.exchange import receive, receive_both, send

# What a product multiplies: pieces of attention, to be merged; hidden states plus split sums; what the gated MLP made.
PIECES_OF, SUMS_OF, SENT = (tl.constexpr(source) for source in range(3))


@triton.jit
@no_type_check
def task_columns(task, OUTPUTS: tl.constexpr, COLS: tl.constexpr, TILE_COLS: tl.constexpr, SPLITS: tl.constexpr):
    """Columns of a task's outputs, and which of them are there."""
    lanes = tl.arange(0, TILE_COLS)
    cols = task // SPLITS * COLS + lanes
    return cols, (lanes < COLS) & (cols < OUTPUTS)


@triton.jit
@no_type_check
def load_weights(
    w_ptr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    GATED: tl.constexpr,
):
    """The weights of this program's task, [K, N], zero where there are none; the second half of N is up if gated."""
    task = tl.program_id(0)
    HALF: tl.constexpr = TILE_COLS // 2 if GATED else TILE_COLS
    WIDTH: tl.constexpr = OUTPUTS * 2 if GATED else OUTPUTS
    lanes = tl.arange(0, TILE_COLS)
    cols = task // SPLITS * COLS + lanes % HALF
    present = (lanes % HALF < COLS) & (cols < OUTPUTS)
    first = task % SPLITS * SPLIT_INPUTS
    inputs = first + tl.arange(0, TILE_INPUTS)
    mask = (inputs < tl.minimum(first + SPLIT_INPUTS, INPUTS))[:, None] & present[None, :]
    return tl.load(w_ptr + (inputs * WIDTH)[:, None] + (cols + lanes // HALF * OUTPUTS)[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def merged_pieces(
    parts_ptr,
    lse_ptr,
    num_pieces,
    first,
    inputs,
    end,
    call,
    failed_ptr,
    most_reads,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGNED: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Attention output at `inputs` [K], from the pieces that the context was cut into; ALIGNED if K is whole heads."""
    NUM_INPUTS: tl.constexpr = inputs.shape[0]
    HEADS: tl.constexpr = (NUM_INPUTS + HEAD_DIM - 1) // HEAD_DIM
    pieces = tl.arange(0, PIECES)
    there = (pieces < num_pieces)[:, None]
    mask = there & (inputs < end)[None, :]
    if ALIGNED:
        heads = first // HEAD_DIM + tl.arange(0, HEADS)
        lse_mask = there & (heads < end // HEAD_DIM)[None, :]
    else:
        heads = inputs // HEAD_DIM
        lse_mask = mask
    parts, lse = receive_both(
        parts_ptr + pieces[:, None] * WIDTH + inputs[None, :], mask,
        lse_ptr + pieces[:, None] * (WIDTH // HEAD_DIM) + heads[None, :], lse_mask, call, failed_ptr, most_reads,
        THREADS,
    )  # fmt: skip
    lse = tl.where(lse_mask, lse, float("-inf"))
    maximum = tl.max(lse, 0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.exp2(lse - shift[None, :])
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total > 0, total, 1.0)[None, :]
    if ALIGNED:
        parts = tl.reshape(parts, [PIECES, HEADS, NUM_INPUTS // HEADS])
        merged = tl.reshape(tl.sum(parts * weights[:, :, None], 0), [NUM_INPUTS])
    else:
        merged = tl.sum(parts * weights, 0)
    return merged


@triton.jit
@no_type_check
def hidden_states(
    x_ptr,
    sums_ptr,
    inputs,
    mask,
    waits,
    call,
    failed_ptr,
    most_reads,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Hidden states [K] with the split sums of a product added, if there are any; in the model's dtype."""
    x = tl.load(x_ptr + inputs, mask=mask, other=0.0)
    SPLIT_TILE: tl.constexpr = triton.next_power_of_2(SPLITS)
    splits = tl.arange(0, SPLIT_TILE)
    sums_mask = (splits < SPLITS)[:, None] & mask[None, :] & waits
    sums_ptrs = sums_ptr + splits[:, None] * WIDTH + inputs[None, :]
    sums = receive(sums_ptrs, call, sums_mask, failed_ptr, most_reads, THREADS)
    return (x.to(tl.float32) + tl.sum(sums, 0)).to(x.dtype)


@triton.jit
@no_type_check
def product(
    w,  # this program's part of the weight
    source_ptr,
    more_ptr,  # what SOURCE needs besides: log-sum-exps or split sums
    kept_ptr,  # where this program keeps the hidden states
    norm_ptr,
    bias_ptr,
    words_ptr,  # where the results are sent: [splits, N]
    waits,  # whether anything is to be received
    source_call,
    call,
    failed_ptr,
    most_reads,
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
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    SUMS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The program's task, if it has one: `act(norm(x) @ w + bias)`, sent to whoever reads it."""
    dtype: tl.constexpr = w.dtype
    task = tl.program_id(0)
    if task < TASKS:
        first = task % SPLITS * SPLIT_INPUTS
        end = tl.minimum(first + SPLIT_INPUTS, INPUTS)
        inputs = first + tl.arange(0, TILE_INPUTS)
        mask = inputs < end
        weight = 1.0
        if NORM:
            weight = tl.load(norm_ptr + inputs, mask=mask, other=0.0)
        if BIAS:
            cols, present = task_columns(task, OUTPUTS, COLS, TILE_COLS, SPLITS)
            bias = tl.load(bias_ptr + cols, mask=present, other=0.0)
        if SOURCE == PIECES_OF:
            ALIGNED: tl.constexpr = SPLIT_INPUTS % HEAD_DIM == 0 and TILE_INPUTS % HEAD_DIM == 0
            x = merged_pieces(
                source_ptr, more_ptr, num_pieces, first, inputs, end, source_call, failed_ptr, most_reads, HEAD_DIM,
                INPUTS, PIECES, ALIGNED, THREADS,
            ).to(dtype)  # fmt: skip
        elif SOURCE == SUMS_OF:
            x = hidden_states(
                source_ptr, more_ptr, inputs, mask, waits, source_call, failed_ptr, most_reads, INPUTS, SUMS, THREADS
            )
            tl.store(kept_ptr + inputs, x, mask=mask)
            tl.debug_barrier()  # other threads of this program read it again
        else:
            x = receive(source_ptr + inputs, source_call, mask, failed_ptr, most_reads, THREADS).to(dtype)
        x = x.to(tl.float32)
        row_scale = 1.0
        if NORM:
            row_scale = tl.rsqrt(tl.sum(x * x, 0) / INPUTS + EPS)
            x = x * weight.to(tl.float32)
        acc = tl.sum(x[:, None] * w.to(tl.float32), 0) * row_scale
        HALF: tl.constexpr = TILE_COLS // 2 if GATED else TILE_COLS
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, [2, HALF]), (1, 0)))
            acc = gate * tl.sigmoid(gate) * up
        cols, present = task_columns(task, OUTPUTS, COLS, HALF, SPLITS)
        if BIAS:
            acc += bias.to(tl.float32)
        send(words_ptr + task % SPLITS * OUTPUTS + cols, acc, call, present)
