"""Which tile of which weight a program multiplies, and how it comes to be there in time.

A program's first tile of a product's weight is loaded before it waits for what it multiplies, and weights further on
are asked for while others are multiplied, so that memory is never idle: a layer's weights fit in the L2 cache.
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
def read_ahead(ptr, BYTES: tl.constexpr, PROGRAMS: tl.constexpr):
    """Asks for this program's share of BYTES from `ptr` on to be brought into L2."""
    SHARE: tl.constexpr = (BYTES // PROGRAMS + 127) // 128 * 128
    first = tl.program_id(0) * SHARE
    size = tl.minimum(SHARE, BYTES - first)
    tl.inline_asm_elementwise(
        """{
        .reg .pred one, some;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 one, thread, 0;
        setp.gt.s32 some, $2, 0;
        and.pred one, one, some;
        @one cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [ptr.to(tl.int64) + first, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
