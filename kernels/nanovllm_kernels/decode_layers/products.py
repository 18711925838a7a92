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

_UPPER = tl.constexpr(-(1 << 16))


@triton.jit
@no_type_check
def load_weights(
    w_ptr,  # int32: two bfloat16 columns each
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    GATED: tl.constexpr,
):
    """The weights of this program's task, [K, N / 2], zero where there are none; the second half of N is up if gated.

    Pairs of columns stay in one register until they are multiplied: taken apart before a wait, they would not fit.
    """
    task = tl.program_id(0)
    HALF: tl.constexpr = TILE_COLS // 4 if GATED else TILE_COLS // 2
    WIDTH: tl.constexpr = OUTPUTS if GATED else OUTPUTS // 2
    lanes = tl.arange(0, TILE_COLS // 2)
    pairs = task // SPLITS * (COLS // 2) + lanes % HALF
    present = (lanes % HALF < COLS // 2) & (pairs < OUTPUTS // 2)
    first = task % SPLITS * SPLIT_INPUTS
    inputs = first + tl.arange(0, TILE_INPUTS)
    mask = (inputs < tl.minimum(first + SPLIT_INPUTS, INPUTS))[:, None] & present[None, :]
    offsets = (inputs * WIDTH)[:, None] + (pairs + lanes // HALF * (OUTPUTS // 2))[None, :]
    return tl.load(w_ptr + offsets, mask=mask, other=0)


@triton.jit
@no_type_check
def merged_pieces(
    parts_ptr,
    lse_ptr,
    num_pieces,
    failed_ptr,
    most_reads,
    HEAD_DIM: tl.constexpr,
    INPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    PIECES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Attention output at this program's inputs of o [K], from the pieces that the context was cut into."""
    ALIGNED: tl.constexpr = SPLIT_INPUTS % HEAD_DIM == 0 and TILE_INPUTS % HEAD_DIM == 0
    HEADS: tl.constexpr = (TILE_INPUTS + HEAD_DIM - 1) // HEAD_DIM
    first = tl.program_id(0) % SPLITS * SPLIT_INPUTS
    end = tl.minimum(first + SPLIT_INPUTS, INPUTS)
    inputs = first + tl.arange(0, TILE_INPUTS)
    pieces = tl.arange(0, PIECES)
    there = (pieces < num_pieces)[:, None]
    mask = there & (inputs < end)[None, :]
    if ALIGNED:
        heads = first // HEAD_DIM + tl.arange(0, HEADS)
        lse_mask = there & (heads < end // HEAD_DIM)[None, :]
    else:
        heads = inputs // HEAD_DIM
        lse_mask = mask
    lse_ptrs = lse_ptr + pieces[:, None] * (INPUTS // HEAD_DIM) + heads[None, :]
    parts_ptrs = parts_ptr + pieces[:, None] * INPUTS + inputs[None, :]
    parts, lse = receive_both(parts_ptrs, mask, lse_ptrs, lse_mask, failed_ptr, most_reads, THREADS)
    lse = tl.where(lse_mask, lse, float("-inf"))
    maximum = tl.max(lse, 0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.exp2(lse - shift[None, :])
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total > 0, total, 1.0)[None, :]
    if ALIGNED:
        parts = tl.reshape(parts, [PIECES, HEADS, TILE_INPUTS // HEADS])
        merged = tl.reshape(tl.sum(parts * weights[:, :, None], 0), [TILE_INPUTS])
    else:
        merged = tl.sum(parts * weights, 0)
    return merged


@triton.jit
@no_type_check
def receive_gated(
    words_ptr,
    failed_ptr,
    most_reads,
    INPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """What gate and up made, at this program's inputs of down [K]."""
    first = tl.program_id(0) % SPLITS * SPLIT_INPUTS
    inputs = first + tl.arange(0, TILE_INPUTS)
    mask = inputs < tl.minimum(first + SPLIT_INPUTS, INPUTS)
    return receive(words_ptr + inputs, mask, failed_ptr, most_reads, THREADS)


@triton.jit
@no_type_check
def hidden_states(
    x,
    sums_ptr,
    failed_ptr,
    most_reads,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Hidden states [K] with the split sums of a product added, in the model's dtype."""
    inputs = tl.arange(0, x.shape[0])
    splits = tl.arange(0, triton.next_power_of_2(SPLITS))
    mask = (splits < SPLITS)[:, None] & (inputs < WIDTH)[None, :]
    sums = receive(sums_ptr + splits[:, None] * WIDTH + inputs[None, :], mask, failed_ptr, most_reads, THREADS)
    return (x.to(tl.float32) + tl.sum(sums, 0)).to(x.dtype)


@triton.jit
@no_type_check
def multiply(
    w,  # this program's part of the weight
    x,  # its inputs [K], in the model's dtype
    norm,  # weight of their RMS norm, likewise
    bias_ptr,
    words_ptr,  # where the results are sent: [splits, N]
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,  # of the hidden states that are to be normed; 0 if x is not
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The program's task, if it has one: `act(norm(x) @ w + bias)`, sent to whoever reads it."""
    task = tl.program_id(0)
    HALF: tl.constexpr = TILE_COLS // 2 if GATED else TILE_COLS
    lanes = tl.arange(0, HALF)
    cols = task // SPLITS * COLS + lanes
    present = (lanes < COLS) & (cols < OUTPUTS)
    x = x.to(tl.float32)
    scale = 1.0
    if WIDTH > 0:
        scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + EPS)
        x = x * norm.to(tl.float32)
    # A bfloat16 is the upper half of the float32 that it stands for.
    even = (w << 16).to(tl.float32, bitcast=True)
    odd = (w & _UPPER).to(tl.float32, bitcast=True)
    acc = tl.reshape(tl.sum(tl.join(x[:, None] * even, x[:, None] * odd), 0), [TILE_COLS]) * scale
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [2, HALF]), (1, 0)))
        acc = gate * tl.sigmoid(gate) * up
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=present, other=0.0).to(tl.float32)
    send(words_ptr + task % SPLITS * OUTPUTS + cols, acc, present)
