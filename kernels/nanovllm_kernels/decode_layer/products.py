"""The products of a layer as phases of one kernel: which tile of which weight a program multiplies, and with what.

A program's first tile of the weight is loaded before it waits for the activations, so that the weight is on its way
while the other programs finish. For one row a product is multiply-adds in float32; for more it goes through tensor
cores, with K cut into as many slices as there are warps, whose sums are then added.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def tile_columns(
    tile,
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Columns of the weight in a tile, and which of them are there; the second half of a gated tile is the up half."""
    HALF: tl.constexpr = TILE_COLS // 2 if GATED else TILE_COLS
    lanes = tl.arange(0, TILE_COLS)
    cols = tile * COLS + lanes % HALF
    present = (lanes % HALF < COLS) & (cols < OUTPUTS)
    if GATED:
        cols = cols + lanes // HALF * OUTPUTS
    return cols, present


@triton.jit
@no_type_check
def inputs_of(first, TILE_INPUTS: tl.constexpr, SLICES: tl.constexpr):
    """Inputs of a tile from `first` on: [K] for one row, else [slices, K of a slice]."""
    DEPTH: tl.constexpr = TILE_INPUTS // SLICES
    if SLICES == 1:
        inputs = first + tl.arange(0, TILE_INPUTS)
    else:
        inputs = first + tl.arange(0, SLICES)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    return inputs


@triton.jit
@no_type_check
def load_weights(
    w_ptr,
    task,
    step,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    SLICES: tl.constexpr,
    GATED: tl.constexpr,
):
    """A task's tile of the weight at a step of its inputs: [K, N], or [slices, K of a slice, N]; zero past the end."""
    WIDTH: tl.constexpr = OUTPUTS * 2 if GATED else OUTPUTS
    first = task % SPLITS * SPLIT_INPUTS
    end = tl.minimum(first + SPLIT_INPUTS, INPUTS)
    first += step * TILE_INPUTS
    inputs = inputs_of(first, TILE_INPUTS, SLICES)
    cols, present = tile_columns(task // SPLITS, OUTPUTS, COLS, TILE_COLS, GATED)
    rows = inputs.to(tl.int64) * WIDTH
    if SLICES == 1:
        w = tl.load(w_ptr + rows[:, None] + cols[None, :], mask=(inputs < end)[:, None] & present[None, :], other=0.0)
    else:
        pointers = w_ptr + rows[:, :, None] + cols[None, None, :]
        w = tl.load(pointers, mask=(inputs < end)[:, :, None] & present[None, None, :], other=0.0)
    return w


@triton.jit
@no_type_check
def load_vector(ptr, inputs, end):
    return tl.load(ptr + inputs, mask=inputs < end, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
@no_type_check
def merged_heads(parts_ptr, lse_ptr, num_pieces, inputs, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr):
    """Attention output of one row at `inputs` [K], from the pieces that its context was cut into."""
    pieces = tl.arange(0, PIECES)
    present = (pieces < num_pieces)[:, None] & (inputs < WIDTH)[None, :]
    lse_offsets = pieces[:, None] * (WIDTH // HEAD_DIM) + inputs[None, :] // HEAD_DIM
    lse = tl.load(lse_ptr + lse_offsets, mask=present, other=float("-inf"), cache_modifier=".cg")
    parts = tl.load(parts_ptr + pieces[:, None] * WIDTH + inputs[None, :], mask=present, other=0.0, cache_modifier=".cg")
    maximum = tl.max(lse, 0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.exp2(lse - shift[None, :])
    total = tl.sum(weights, 0)
    return tl.sum(parts * weights, 0) / tl.where(total > 0, total, 1.0)


@triton.jit
@no_type_check
def add_step(
    acc,
    squares,
    w,
    x_ptr,
    norm_ptr,
    task,
    step,
    num_rows,
    INPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    SLICES: tl.constexpr,
    # One row only: x is what these say instead.
    residual_ptr,
    sums_ptr,
    SUMS: tl.constexpr,
    parts_ptr,
    lse_ptr,
    num_pieces,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    stored_ptr,
):
    """Adds the products of one tile of inputs, and their sums of squares if there is a norm."""
    dtype: tl.constexpr = w.dtype
    first = task % SPLITS * SPLIT_INPUTS
    end = tl.minimum(first + SPLIT_INPUTS, INPUTS)
    first += step * TILE_INPUTS
    inputs = inputs_of(first, TILE_INPUTS, SLICES)
    if SLICES == 1:
        if PIECES > 0:
            x = merged_heads(parts_ptr, lse_ptr, num_pieces, inputs, HEAD_DIM, INPUTS, PIECES).to(dtype).to(tl.float32)
        elif SUMS > 0:
            x = tl.zeros([TILE_INPUTS], tl.float32)
            for part in tl.static_range(SUMS):
                x += load_vector(sums_ptr + part * INPUTS, inputs, end)
            x = (x + load_vector(residual_ptr, inputs, end)).to(dtype)
            if tl.program_id(0) == 0:
                tl.store(stored_ptr + inputs, x, mask=inputs < end)
            x = x.to(tl.float32)
        else:
            x = load_vector(x_ptr, inputs, end)
        if norm_ptr is not None:
            squares += x * x
            x = x * tl.load(norm_ptr + inputs, mask=inputs < end, other=0.0).to(tl.float32)
        acc += tl.sum(x[:, None] * w.to(tl.float32), 0)[None, :]
    else:
        rows = tl.arange(0, TILE_ROWS)
        pointers = x_ptr + (rows * INPUTS)[None, :, None] + inputs[:, None, :]
        mask = (rows < num_rows)[None, :, None] & (inputs < end)[:, None, :]
        x = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            squares += tl.sum(tl.sum(wide * wide, 2), 0)
            norm = tl.load(norm_ptr + inputs, mask=inputs < end, other=0.0).to(tl.float32)
            x = (wide * norm[:, None, :]).to(dtype)
        acc = tl.dot(x, w, acc)
    return acc, squares


@triton.jit
@no_type_check
def finish(
    acc,
    squares,
    task,
    num_rows,
    norm_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    sums_ptr,
    counters_ptr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    EPS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    SPLITS: tl.constexpr,
    TASKS: tl.constexpr,
    SLICES: tl.constexpr,
    GATED: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Everything after a task's product. Split sums are added by the tile's last program, or by their readers."""
    if SLICES > 1:
        acc = tl.sum(acc, 0)
    rows = tl.arange(0, TILE_ROWS)
    if norm_ptr is not None:
        if SLICES == 1:
            squares = tl.sum(squares[None, :], 1)
        acc *= tl.rsqrt(squares / INPUTS + EPS)[:, None]
    cols, present = tile_columns(task // SPLITS, OUTPUTS, COLS, TILE_COLS, GATED)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=present, other=0.0).to(tl.float32)[None, :]
    if GATED:
        halves = tl.permute(tl.reshape(acc, [TILE_ROWS, 2, TILE_COLS // 2]), (0, 2, 1))
        gate, up = tl.split(halves)
        acc = gate * tl.sigmoid(gate) * up
        cols, present = tile_columns(task, OUTPUTS, COLS, TILE_COLS // 2, False)
    mask = (rows < num_rows)[:, None] & present[None, :] & (task < TASKS)
    offsets = rows[:, None] * OUTPUTS + cols[None, :]
    if SPLITS == 1:
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(sums_ptr + task % SPLITS * num_rows * OUTPUTS + offsets, acc, mask=mask)
        if MERGE:
            if task < TASKS:
                tl.debug_barrier()
                arrived = tl.atomic_add(counters_ptr + task // SPLITS, 1, sem="acq_rel", scope="gpu")
                if arrived == SPLITS - 1:
                    total = tl.load(residual_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
                    sums = tl.zeros([TILE_ROWS, TILE_COLS], tl.float32)
                    for split in tl.static_range(SPLITS):
                        part_ptr = sums_ptr + split * num_rows * OUTPUTS
                        sums += tl.load(part_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
                    tl.store(out_ptr + offsets, (total + sums).to(out_ptr.dtype.element_ty), mask=mask)
                    tl.store(counters_ptr + task // SPLITS, 0)


@triton.jit
@no_type_check
def product(
    w,  # the first tile of `w_ptr`
    x_ptr,
    w_ptr,
    num_rows,
    norm_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    sums_ptr,
    counters_ptr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    COLS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    TASKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MERGE: tl.constexpr,
    SUMS: tl.constexpr = 0,
    earlier_ptr=None,
    earlier_sums_ptr=None,
    stored_ptr=None,
    PIECES: tl.constexpr = 0,
    HEAD_DIM: tl.constexpr = 1,
    parts_ptr=None,
    lse_ptr=None,
    num_pieces=0,
):
    """All tasks of this program: `out = residual + act(norm(x) @ w + bias)`, a task a tile of the output and of K."""
    STEPS: tl.constexpr = (SPLIT_INPUTS + TILE_INPUTS - 1) // TILE_INPUTS
    UNITS: tl.constexpr = (TASKS + PROGRAMS - 1) // PROGRAMS * STEPS
    if SLICES == 1:
        empty = tl.zeros([1, TILE_COLS], tl.float32)
        no_squares = tl.zeros([TILE_INPUTS], tl.float32)
    else:
        empty = tl.zeros([SLICES, TILE_ROWS, TILE_COLS], tl.float32)
        no_squares = tl.zeros([TILE_ROWS], tl.float32)
    acc, squares = empty, no_squares
    if UNITS == 1:
        task = tl.program_id(0)
        acc, squares = add_step(
            acc, squares, w, x_ptr, norm_ptr, task, 0, num_rows, INPUTS, TILE_INPUTS, TILE_ROWS, SPLITS,
            SPLIT_INPUTS, SLICES, earlier_ptr, earlier_sums_ptr, SUMS, parts_ptr, lse_ptr, num_pieces, HEAD_DIM,
            PIECES, stored_ptr,
        )  # fmt: skip
        finish(
            acc, squares, task, num_rows, norm_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, counters_ptr,
            INPUTS, OUTPUTS, EPS, COLS, TILE_ROWS, TILE_COLS, SPLITS, TASKS, SLICES, GATED, MERGE,
        )  # fmt: skip
    else:
        for unit in tl.range(0, UNITS, num_stages=1):
            task = tl.program_id(0) + unit // STEPS * PROGRAMS
            step = unit % STEPS
            after = unit + 1
            next_task = tl.program_id(0) + after // STEPS * PROGRAMS
            if after < UNITS:
                w_next = load_weights(
                    w_ptr, next_task, after % STEPS, INPUTS, OUTPUTS, COLS, TILE_COLS, TILE_INPUTS, SPLITS,
                    SPLIT_INPUTS, SLICES, GATED,
                )  # fmt: skip
            else:
                w_next = w
            acc, squares = add_step(
                acc, squares, w, x_ptr, norm_ptr, task, step, num_rows, INPUTS, TILE_INPUTS, TILE_ROWS, SPLITS,
                SPLIT_INPUTS, SLICES, earlier_ptr, earlier_sums_ptr, SUMS, parts_ptr, lse_ptr, num_pieces, HEAD_DIM,
                PIECES, stored_ptr,
            )  # fmt: skip
            w = w_next
            if step == STEPS - 1:
                finish(
                    acc, squares, task, num_rows, norm_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, counters_ptr,
                    INPUTS, OUTPUTS, EPS, COLS, TILE_ROWS, TILE_COLS, SPLITS, TASKS, SLICES, GATED, MERGE,
                )  # fmt: skip
                acc, squares = empty, no_squares
