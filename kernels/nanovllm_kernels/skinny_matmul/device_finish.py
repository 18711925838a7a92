"""Device code of the Triton implementation: what follows the product, and the sum of the parts of a K that is split."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def channel_epilogue(acc, cols, col_mask, w_scale_ptr, bias_ptr, SCALE_STRIDE: tl.constexpr):
    """Scale and bias of each output feature."""
    if w_scale_ptr is not None:
        acc *= tl.load(w_scale_ptr + cols * SCALE_STRIDE, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
@no_type_check
def given_squares(squares_ptr, rows, num_rows, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """Sums of squares of rows, of the parts that come with a scaled x."""
    total = tl.zeros(rows.shape, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(squares_ptr + part * STRIDE + rows, mask=rows < num_rows, other=0.0)
    return total


@triton.jit
@no_type_check
def store_outputs(
    acc,
    up,
    squares,
    rows,
    cols,
    num_rows,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    next_norm_ptr,
    out_ptr,
    scaled_ptr,
    out_squares_ptr,
    part,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    NORMED: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
):
    """Everything after the product, and the stores; `part` is the tile's number among those of the same rows."""
    row_mask = rows < num_rows
    col_mask = cols < NUM_OUTPUTS
    mask = row_mask[:, None] & col_mask[None, :]
    if NORMED:
        row_scale = tl.rsqrt(squares / NUM_INPUTS + EPS)[:, None]
        acc *= row_scale
        if GATED:
            up *= row_scale
    acc = channel_epilogue(acc, cols, col_mask, w_scale_ptr, bias_ptr, SCALE_STRIDE)
    if GATED:
        up = channel_epilogue(up, NUM_OUTPUTS + cols, col_mask, w_scale_ptr, bias_ptr, SCALE_STRIDE)
        acc = acc * tl.sigmoid(acc) * up
    offsets = rows[:, None] * NUM_OUTPUTS + cols[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    rounded = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, rounded, mask=mask)
    if next_norm_ptr is not None:
        wide = rounded.to(tl.float32)
        next_norm = tl.load(next_norm_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + offsets, (wide * next_norm[None, :]).to(scaled_ptr.dtype.element_ty), mask=mask)
        tl.store(out_squares_ptr + part * ROW_STRIDE + rows, tl.sum(wide * wide, 1), mask=row_mask)


@triton.jit
@no_type_check
def sum_splits(
    parts_ptr,
    squares_ptr,
    rows,
    cols,
    num_rows,
    norm_ptr,
    NUM_OUTPUTS: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    """Sums of the parts of one tile, in the order of the splits. Loads bypass L1, which may hold older values."""
    WIDTH: tl.constexpr = NUM_OUTPUTS * (2 if GATED else 1)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (cols < NUM_OUTPUTS)[None, :]
    acc = tl.zeros([TILE_ROWS, TILE_COLS], tl.float32)
    up = acc
    squares = tl.zeros([TILE_ROWS], tl.float32)
    for split in tl.static_range(SPLITS):
        part_rows = split * num_rows + rows
        part = parts_ptr + part_rows[:, None] * WIDTH + cols[None, :]
        acc += tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")
        if GATED:
            up += tl.load(part + NUM_OUTPUTS, mask=mask, other=0.0, cache_modifier=".cg")
        if norm_ptr is not None:
            squares += tl.load(squares_ptr + part_rows, mask=row_mask, other=0.0, cache_modifier=".cg")
    return acc, up, squares


@triton.jit
@no_type_check
def merge_splits_kernel(
    parts_ptr,
    squares_ptr,
    norm_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    given_ptr,
    next_norm_ptr,
    num_rows,
    out_ptr,
    scaled_ptr,
    out_squares_ptr,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    NORMED: tl.constexpr,
    GIVEN_PARTS: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    rows = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.program_id(1) * TILE_COLS + tl.arange(0, TILE_COLS)
    acc, up, squares = sum_splits(
        parts_ptr, squares_ptr, rows, cols, num_rows, norm_ptr, NUM_OUTPUTS, GATED, SPLITS, 1, TILE_COLS
    )
    if given_ptr is not None:
        squares = given_squares(given_ptr, rows, num_rows, GIVEN_PARTS, ROW_STRIDE)
    store_outputs(
        acc, up, squares, rows, cols, num_rows, w_scale_ptr, bias_ptr, residual_ptr, next_norm_ptr,
        out_ptr, scaled_ptr, out_squares_ptr, tl.program_id(1),
        NUM_INPUTS, NUM_OUTPUTS, EPS, GATED, SCALE_STRIDE, NORMED, ROW_STRIDE,
    )  # fmt: skip
