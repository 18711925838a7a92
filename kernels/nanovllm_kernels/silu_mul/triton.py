"""Triton implementation: a program takes a part of one token's row."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float

from nanovllm_kernels._compat import triton_call
from nanovllm_kernels._integers import ceil_div, next_power_of_2

_TILE = 4096
_ELEMENTS_A_WARP = 256  # a 16-byte load for each thread, in bfloat16


@triton.jit
@no_type_check
def silu_mul_kernel(gate_up_ptr, out_ptr, SIZE: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < SIZE
    gate = tl.load(gate_up_ptr + row * (2 * SIZE) + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * SIZE) + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul_triton(gate_up: Float[Array, "T 2 F"]) -> Float[Array, "T F"]:
    num_rows, _, size = gate_up.shape
    tile = min(_TILE, next_power_of_2(size))
    return triton_call(
        gate_up,
        kernel=silu_mul_kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, size), gate_up.dtype),
        grid=(num_rows, ceil_div(size, tile)),
        num_warps=max(1, tile // _ELEMENTS_A_WARP),
        num_stages=1,
        SIZE=size,
        TILE=tile,
    )
