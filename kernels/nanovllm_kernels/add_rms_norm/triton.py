"""Triton implementation: a program takes a few whole rows and holds them in registers between addition and norm."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float

from nanovllm_kernels._compat import triton_call
from nanovllm_kernels._integers import ceil_div, next_power_of_2

_TILE_ELEMENTS = 4096
_MOST_ELEMENTS_A_WARP = 2048  # 64 float32 registers a thread


@triton.jit
@no_type_check
def tile_of(num_rows, SIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_SIZE: tl.constexpr):
    """Offsets of this program's rows, which of them are there, and their columns."""
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = tl.arange(0, TILE_SIZE)
    mask = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    return (rows.to(tl.int64) * SIZE)[:, None] + columns[None, :], mask, columns


@triton.jit
@no_type_check
def store_norm(x, weight_ptr, out_ptr, at, mask, columns, EPS: tl.constexpr, SIZE: tl.constexpr):
    """Rounded to the model's dtype before and after the weight, as the reference does."""
    dtype = x.dtype
    wide = x.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + EPS)
    normalised = (wide * scale[:, None]).to(dtype).to(tl.float32)
    tl.store(out_ptr + at, (normalised * weight[None, :]).to(dtype), mask=mask)


@triton.jit
@no_type_check
def add_rms_norm_kernel(
    x_ptr,
    update_ptr,
    weight_ptr,
    num_rows,
    total_ptr,
    out_ptr,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    at, mask, columns = tile_of(num_rows, SIZE, TILE_ROWS, TILE_SIZE)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + at, mask=mask, other=0.0).to(tl.float32)
    total = (x + update).to(x_ptr.dtype.element_ty)
    tl.store(total_ptr + at, total, mask=mask)
    store_norm(total, weight_ptr, out_ptr, at, mask, columns, EPS, SIZE)


@triton.jit
@no_type_check
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    num_rows,
    out_ptr,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    at, mask, columns = tile_of(num_rows, SIZE, TILE_ROWS, TILE_SIZE)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    store_norm(x, weight_ptr, out_ptr, at, mask, columns, EPS, SIZE)


def add_rms_norm_triton(
    x: Float[Array, "T E"], update: Float[Array, "T E"] | None, weight: Float[Array, " E"], *, eps: float
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    num_rows, size = x.shape
    tile_size = next_power_of_2(size)
    tile_rows = max(1, _TILE_ELEMENTS // tile_size)
    tile = tile_rows * tile_size
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    launch = {
        "grid": (ceil_div(num_rows, tile_rows),),
        "num_warps": min(16, max(4, tile // _MOST_ELEMENTS_A_WARP)),
        "num_stages": 1,
        "EPS": eps,
        "SIZE": size,
        "TILE_ROWS": tile_rows,
        "TILE_SIZE": tile_size,
    }
    if update is None:
        return x, triton_call(x, weight, num_rows, kernel=rms_norm_kernel, out_type=shape, **launch)
    total, normalised = triton_call(
        x, update, weight, num_rows, kernel=add_rms_norm_kernel, out_type=(shape, shape), **launch
    )
    return total, normalised
