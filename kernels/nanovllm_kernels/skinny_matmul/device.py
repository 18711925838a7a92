"""Device code of the Triton implementation: a program multiplies a tile of the output and a part of K.

The root-mean-square norm needs no pass of its own: (x * norm) @ w is scaled by the row's 1 / rms at the end, and the
sum of squares is taken from the tiles of x that the product reads anyway.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels.skinny_matmul.device_finish import given_squares, store_outputs, sum_splits


@triton.jit
@no_type_check
def load_tile(pointers, first, second, MASK_FIRST: tl.constexpr, MASK_SECOND: tl.constexpr):
    """A tile that is zero where a mask of its first or second axis is false; an axis that fits needs no mask."""
    if MASK_FIRST and MASK_SECOND:
        tile = tl.load(pointers, mask=first[:, None] & second[None, :], other=0.0)
    elif MASK_FIRST:
        tile = tl.load(pointers, mask=first[:, None], other=0.0)
    elif MASK_SECOND:
        tile = tl.load(pointers, mask=second[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
@no_type_check
def load_vector(ptr, first, NUM: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr):
    """TILE elements from `first` on as float32, zero past NUM.

    Two 16-bit elements are loaded as one word: Triton pipelines a load only if each thread has 4 bytes of it, and one
    that is not pipelined costs its whole latency (some 300 ns) in every iteration.
    """
    if NUM % 2 == 0:
        pairs = first // 2 + tl.arange(0, TILE // 2)
        words = ptr.to(tl.pointer_type(tl.int32)) + pairs
        word = tl.load(words, mask=pairs < NUM // 2, other=0) if MASK else tl.load(words)
        low = word.to(tl.int16).to(ptr.dtype.element_ty, bitcast=True)
        high = (word >> 16).to(tl.int16).to(ptr.dtype.element_ty, bitcast=True)
        vector = tl.interleave(low, high)
    else:
        elements = first + tl.arange(0, TILE)
        vector = tl.load(ptr + elements, mask=elements < NUM, other=0.0)
    return vector.to(tl.float32)


@triton.jit
@no_type_check
def add_product(acc, x, w, DOT_DTYPE: tl.constexpr, ROW: tl.constexpr, SWAP: tl.constexpr):
    """Adds x @ w: element by element before the sum over K for one row, else on tensor cores, perhaps transposed."""
    if ROW:
        acc += x[:, None] * w.to(tl.float32)
    elif SWAP:
        acc = tl.dot(tl.trans(w.to(DOT_DTYPE)), tl.trans(x), acc)
    else:
        acc = tl.dot(x, w.to(DOT_DTYPE), acc)
    return acc


@triton.jit
@no_type_check
def product_kernel(
    x_ptr,
    w_ptr,
    norm_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    given_ptr,  # float32 [parts, rows]: sums of squares of what x was before it was multiplied with a norm
    next_norm_ptr,
    counters_ptr,  # int32, zero before and after; None: parts are merged by another kernel
    num_rows,
    out_ptr,
    scaled_ptr,  # outputs times next_norm
    out_squares_ptr,  # float32 [tiles of columns, rows]: sums of the outputs' squares
    parts_ptr,  # float32 [splits, M, N], or [splits, M, 2, N] for gate and up
    squares_ptr,  # float32 [splits, M]: sums of squares of x; every tile of columns writes the same
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    W_STRIDE_IN: tl.constexpr,
    W_STRIDE_OUT: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    NORMED: tl.constexpr,  # with a norm or with the squares of a scaled x
    GIVEN_PARTS: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROW: tl.constexpr = TILE_ROWS == 1
    MASK_IN: tl.constexpr = NUM_INPUTS != SPLITS * SPLIT_INPUTS
    MASK_OUT: tl.constexpr = NUM_OUTPUTS % TILE_COLS != 0
    # Tiles of rows that share columns of the weight are neighbours, so that the second finds them in L2.
    tile = tl.program_id(0)
    split = tl.program_id(1)
    num_row_tiles = tl.cdiv(num_rows, TILE_ROWS)
    first_row = tile % num_row_tiles * TILE_ROWS
    col_tile = tile // num_row_tiles
    first_col = col_tile * TILE_COLS
    first_input = split * SPLIT_INPUTS
    rows = first_row + tl.arange(0, TILE_ROWS)
    cols = first_col + tl.arange(0, TILE_COLS)
    row_mask = rows < num_rows
    col_mask = cols < NUM_OUTPUTS

    steps = tl.arange(0, TILE_INPUTS)
    # Only where a tile starts may be past 2^31 elements.
    w_tile = w_ptr + first_input.to(tl.int64) * W_STRIDE_IN + first_col.to(tl.int64) * W_STRIDE_OUT
    w_tile += steps[:, None] * W_STRIDE_IN + tl.arange(0, TILE_COLS)[None, :] * W_STRIDE_OUT
    if ROW:
        acc = tl.zeros([TILE_INPUTS, TILE_COLS], tl.float32)
        squares = tl.zeros([TILE_INPUTS], tl.float32)
    elif SWAP:
        acc = tl.zeros([TILE_COLS, TILE_ROWS], tl.float32)
        squares = tl.zeros([TILE_ROWS], tl.float32)
    else:
        acc = tl.zeros([TILE_ROWS, TILE_COLS], tl.float32)
        squares = tl.zeros([TILE_ROWS], tl.float32)
    up = acc
    if given_ptr is not None:
        given = given_squares(given_ptr, rows, num_rows, GIVEN_PARTS, ROW_STRIDE)
    for step in tl.range(0, SPLIT_INPUTS, TILE_INPUTS, num_stages=STAGES):
        inputs = first_input + step + steps
        in_mask = inputs < NUM_INPUTS
        w = load_tile(w_tile, in_mask, col_mask, MASK_IN, MASK_OUT)
        if ROW:
            x = load_vector(x_ptr + first_row * NUM_INPUTS, first_input + step, NUM_INPUTS, TILE_INPUTS, MASK_IN)
        else:
            x = load_tile(x_ptr + rows[:, None] * NUM_INPUTS + inputs[None, :], row_mask, in_mask, True, MASK_IN)
        if norm_ptr is not None:
            norm = load_vector(norm_ptr, first_input + step, NUM_INPUTS, TILE_INPUTS, MASK_IN)
            wide = x.to(tl.float32)
            if ROW:
                squares += wide * wide
                x = wide * norm
            else:
                squares += tl.sum(wide * wide, 1)
                x = (wide * norm[None, :]).to(DOT_DTYPE)
        acc = add_product(acc, x, w, DOT_DTYPE, ROW, SWAP)
        if GATED:
            w_up = load_tile(w_tile + NUM_OUTPUTS * W_STRIDE_OUT, in_mask, col_mask, MASK_IN, MASK_OUT)
            up = add_product(up, x, w_up, DOT_DTYPE, ROW, SWAP)
        w_tile += TILE_INPUTS * W_STRIDE_IN
    if ROW:
        acc = tl.sum(acc, 0)[None, :]
        squares = tl.sum(squares[None, :], 1)
        if GATED:
            up = tl.sum(up, 0)[None, :]
    elif SWAP:
        acc = tl.trans(acc)
        if GATED:
            up = tl.trans(up)

    if given_ptr is not None:
        squares = given

    if SPLITS == 1:
        store_outputs(
            acc, up, squares, rows, cols, num_rows, w_scale_ptr, bias_ptr, residual_ptr, next_norm_ptr,
            out_ptr, scaled_ptr, out_squares_ptr, col_tile,
            NUM_INPUTS, NUM_OUTPUTS, EPS, GATED, SCALE_STRIDE, NORMED, ROW_STRIDE,
        )  # fmt: skip
    else:
        WIDTH: tl.constexpr = NUM_OUTPUTS * (2 if GATED else 1)
        part_rows = split * num_rows + rows
        part = parts_ptr + part_rows[:, None] * WIDTH + cols[None, :]
        mask = row_mask[:, None] & col_mask[None, :]
        tl.store(part, acc, mask=mask)
        if GATED:
            tl.store(part + NUM_OUTPUTS, up, mask=mask)
        if norm_ptr is not None:
            tl.store(squares_ptr + part_rows, squares, mask=row_mask)
        if counters_ptr is not None:
            # The barrier orders this program's stores before its release, and the acquire orders the others'
            # before what follows.
            tl.debug_barrier()
            arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
            if arrived == SPLITS - 1:
                total, total_up, total_squares = sum_splits(
                    parts_ptr, squares_ptr, rows, cols, num_rows, norm_ptr,
                    NUM_OUTPUTS, GATED, SPLITS, TILE_ROWS, TILE_COLS,
                )  # fmt: skip
                if given_ptr is not None:
                    total_squares = given
                store_outputs(
                    total, total_up, total_squares, rows, cols, num_rows,
                    w_scale_ptr, bias_ptr, residual_ptr, next_norm_ptr,
                    out_ptr, scaled_ptr, out_squares_ptr, col_tile,
                    NUM_INPUTS, NUM_OUTPUTS, EPS, GATED, SCALE_STRIDE, NORMED, ROW_STRIDE,
                )  # fmt: skip
                tl.store(counters_ptr + tile, 0)
