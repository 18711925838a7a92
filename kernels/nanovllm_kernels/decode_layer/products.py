"""The products of several rows' layer as phases of one kernel, on tensor cores.

K is cut into as many slices as there are warps, whose sums are then added: with 16 or 32 rows and as many columns there
would be work for few warps otherwise. Where the outputs are few, K is also split over programs; the last one to arrive
at a tile adds the splits in their order.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels.decode_layer.weights import inputs_of, load_weights, tile_columns


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
):
    """Adds the products of one tile of inputs, and their sums of squares if there is a norm."""
    dtype: tl.constexpr = w.dtype
    first = task % SPLITS * SPLIT_INPUTS
    end = tl.minimum(first + SPLIT_INPUTS, INPUTS)
    inputs = inputs_of(first + step * TILE_INPUTS, TILE_INPUTS, SLICES)
    rows = tl.arange(0, TILE_ROWS)
    pointers = x_ptr + (rows * INPUTS)[None, :, None] + inputs[:, None, :]
    mask = (rows < num_rows)[None, :, None] & (inputs < end)[:, None, :]
    x = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
    if norm_ptr is not None:
        wide = x.to(tl.float32)
        squares += tl.sum(tl.sum(wide * wide, 2), 0)
        norm = tl.load(norm_ptr + inputs, mask=inputs < end, other=0.0).to(tl.float32)
        x = (wide * norm[:, None, :]).to(dtype)
    return tl.dot(x, w, acc), squares


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
    GATED: tl.constexpr,
):
    """Everything after a task's product, and after the last split's arrival if K is split."""
    acc = tl.sum(acc, 0)
    rows = tl.arange(0, TILE_ROWS)
    if norm_ptr is not None:
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
):
    """All tasks of this program: `out = residual + act(norm(x) @ w + bias)`, a task a tile of the output and of K."""
    STEPS: tl.constexpr = (SPLIT_INPUTS + TILE_INPUTS - 1) // TILE_INPUTS
    UNITS: tl.constexpr = (TASKS + PROGRAMS - 1) // PROGRAMS * STEPS
    empty = tl.zeros([SLICES, TILE_ROWS, TILE_COLS], tl.float32)
    no_squares = tl.zeros([TILE_ROWS], tl.float32)
    acc, squares = empty, no_squares
    if UNITS == 1:
        task = tl.program_id(0)
        acc, squares = add_step(
            acc, squares, w, x_ptr, norm_ptr, task, 0, num_rows, INPUTS, TILE_INPUTS, TILE_ROWS, SPLITS,
            SPLIT_INPUTS, SLICES,
        )  # fmt: skip
        finish(
            acc, squares, task, num_rows, norm_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, counters_ptr,
            INPUTS, OUTPUTS, EPS, COLS, TILE_ROWS, TILE_COLS, SPLITS, TASKS, GATED,
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
                SPLIT_INPUTS, SLICES,
            )  # fmt: skip
            w = w_next
            if step == STEPS - 1:
                finish(
                    acc, squares, task, num_rows, norm_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, counters_ptr,
                    INPUTS, OUTPUTS, EPS, COLS, TILE_ROWS, TILE_COLS, SPLITS, TASKS, GATED,
                )  # fmt: skip
                acc, squares = empty, no_squares
