"""Triton implementation: a program a tile of the output and a part of K; the weight is read once.

With few output tiles K is split over programs (split-K, as in Stream-K, https://arxiv.org/abs/2301.03598). Their
partial sums are added in a fixed order, so results repeat to the bit: by the tile's last program to arrive, which
an atomic counter tells, or by a second kernel.

The root-mean-square norm needs no pass of its own: (x * norm) @ w is scaled by the row's 1 / rms at the end, and the
sum of squares is taken from the tiles of x that the product reads anyway.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from nanovllm_kernels._compat import triton_call
from nanovllm_kernels._device import ceil_div, dot_dtype, next_power_of_2
from nanovllm_kernels.skinny_matmul.launch import Launch

_MERGE_COLS = 128


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
def channel_epilogue(acc, cols, col_mask, w_scale_ptr, bias_ptr, SCALE_STRIDE: tl.constexpr):
    """Scale and bias of each output feature."""
    if w_scale_ptr is not None:
        acc *= tl.load(w_scale_ptr + cols * SCALE_STRIDE, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
@no_type_check
def store_outputs(
    acc,
    up,
    squares,
    rows,
    cols,
    num_rows,
    norm_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
):
    """Everything after the product, and the store."""
    row_mask = rows < num_rows
    col_mask = cols < NUM_OUTPUTS
    mask = row_mask[:, None] & col_mask[None, :]
    if norm_ptr is not None:
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
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


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
def product_kernel(
    x_ptr,
    w_ptr,
    norm_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    counters_ptr,  # int32, zero before and after; None: parts are merged by another kernel
    num_rows,
    out_ptr,
    parts_ptr,  # float32 [splits, M, N], or [splits, M, 2, N] for gate and up
    squares_ptr,  # float32 [splits, M]: sums of squares of x; every tile of columns writes the same
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    W_STRIDE_IN: tl.constexpr,
    W_STRIDE_OUT: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
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
    first_col = tile // num_row_tiles * TILE_COLS
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

    if SPLITS == 1:
        store_outputs(
            acc, up, squares, rows, cols, num_rows, norm_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_ptr,
            NUM_INPUTS, NUM_OUTPUTS, EPS, GATED, SCALE_STRIDE,
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
                store_outputs(
                    total, total_up, total_squares, rows, cols, num_rows,
                    norm_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_ptr,
                    NUM_INPUTS, NUM_OUTPUTS, EPS, GATED, SCALE_STRIDE,
                )  # fmt: skip
                tl.store(counters_ptr + tile, 0)


@triton.jit
@no_type_check
def merge_splits_kernel(
    parts_ptr,
    squares_ptr,
    norm_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    num_rows,
    out_ptr,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    rows = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.program_id(1) * TILE_COLS + tl.arange(0, TILE_COLS)
    acc, up, squares = sum_splits(
        parts_ptr, squares_ptr, rows, cols, num_rows, norm_ptr, NUM_OUTPUTS, GATED, SPLITS, 1, TILE_COLS
    )
    store_outputs(
        acc, up, squares, rows, cols, num_rows, norm_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_ptr,
        NUM_INPUTS, NUM_OUTPUTS, EPS, GATED, SCALE_STRIDE,
    )  # fmt: skip


def skinny_matmul_triton(
    x: Float[Array, "M K"],
    w: Array,
    *,
    norm: Float[Array, " K"] | None,
    eps: float,
    w_scale: Array | None,
    bias: Array | None,
    residual: Float[Array, "M N"] | None,
    w_layout: str,
    out_dtype: jnp.dtype,
    counters: jax.Ref | None,
    launch: Launch,
) -> Float[Array, "M N"]:
    (num_rows, num_inputs), gated = x.shape, w.ndim == 3
    num_outputs = w.shape[0] if w_layout == "nk" else w.shape[-1]
    if norm is not None:
        norm = norm.astype(x.dtype)
    splits = launch.splits
    tiles = ceil_div(num_rows, launch.tile_rows) * ceil_div(num_outputs, launch.tile_cols)
    if splits == 1 or (counters is not None and tiles > counters.shape[0]):
        counters = None
    merged = splits > 1 and counters is None
    out = jax.ShapeDtypeStruct((num_rows, num_outputs), out_dtype)
    unused = jax.ShapeDtypeStruct((1,), jnp.float32)
    parts = jax.ShapeDtypeStruct((splits, num_rows, num_outputs * (1 + gated)), jnp.float32)
    squares = jax.ShapeDtypeStruct((splits, num_rows), jnp.float32)
    constants = {
        "NUM_INPUTS": num_inputs,
        "NUM_OUTPUTS": num_outputs,
        "EPS": eps,
        "GATED": gated,
        "SCALE_STRIDE": int(w_scale is not None and w_scale.ndim > 0),
        "SPLITS": splits,
    }
    first, parts, squares = triton_call(
        x,
        w,
        norm,
        w_scale,
        bias,
        residual,
        counters,
        num_rows,
        kernel=product_kernel,
        out_type=(
            unused if merged else out,
            parts if splits > 1 else unused,
            squares if splits > 1 and norm is not None else unused,
        ),
        grid=(tiles, splits),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        W_STRIDE_IN=1 if w_layout == "nk" else num_outputs * (1 + gated),
        W_STRIDE_OUT=num_inputs if w_layout == "nk" else 1,
        DOT_DTYPE=dot_dtype(x.dtype, x.dtype),
        SPLIT_INPUTS=ceil_div(num_inputs, splits * launch.tile_inputs) * launch.tile_inputs,
        TILE_ROWS=launch.tile_rows,
        TILE_COLS=launch.tile_cols,
        TILE_INPUTS=launch.tile_inputs,
        SWAP=launch.swap,
        STAGES=launch.num_stages,
        **constants,
    )
    if not merged:
        return first
    tile_cols = min(_MERGE_COLS, next_power_of_2(num_outputs))
    return triton_call(
        parts,
        squares,
        norm,
        w_scale,
        bias,
        residual,
        num_rows,
        kernel=merge_splits_kernel,
        out_type=out,
        grid=(num_rows, ceil_div(num_outputs, tile_cols)),
        num_warps=1,
        num_stages=1,
        TILE_COLS=tile_cols,
        **constants,
    )
